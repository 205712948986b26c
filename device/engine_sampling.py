"""Policies that sample (Diffusion Policy and what is distilled from it) in onnxruntime.

encoder.onnx runs once for every observation step that is new, its features are kept by the step's key. denoise.onnx
runs once a row of sampler.npz; this loop hands it the row, the noise and what the step before gave, and knows no
solver. All buffers are bound once: two bindings of the same session swap their samples, so that a step copies one row
of numbers and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from device.arrays import Array
from device.bundle import ACTION, DENOISE, ENCODER, Bundle, Manifest, SamplerTable
from device.engine import NOT_FINITE, EngineError
from device.engine_onnx import (
    ON_CPU,
    BoundGraph,
    Provider,
    check_signature,
    open_session,
    signature,
    zeros,
)
from device.sampling import FEATURES, EncodedSteps, NoiseSource, denoise_signature

_FLOAT = np.dtype(np.float32)


class SamplingEngine:
    """Both graphs of one bundle on the CPU. `seed` of the noise; None: the operating system's entropy."""

    def __init__(
        self, bundle: Bundle, threads: int = 1, seed: int | None = None, providers: Sequence[Provider] = ON_CPU
    ) -> None:
        manifest, table = bundle.manifest, bundle.sampler_table()
        self._path = bundle.path
        self._noise = NoiseSource(bundle.path, manifest, table, seed)
        self._encoder = _Encoder(bundle.path / ENCODER, manifest, threads, providers)
        self._denoiser = _Denoiser(bundle.path / DENOISE, manifest, table, self._encoder.size, threads, providers)
        self._steps = EncodedSteps(
            bundle.path, manifest.observation_steps, self._encoder.features, self._encoder.graph.run
        )
        self.inputs = self._encoder.inputs

    @property
    def encoded(self) -> int:
        """Observation steps that were encoded so far: a figure of what the memory of keys spares."""
        return self._steps.encoded

    def observe(self, key: Hashable) -> None:
        """See Engine.observe."""
        self._steps.observe(key)

    def knows(self, key: Hashable) -> bool:
        """See Engine.knows."""
        return self._steps.knows(key)

    def infer(
        self, keys: Sequence[Hashable] | None = None, *, noise: Array | None = None, step_noise: Array | None = None
    ) -> Array:
        """See Engine.infer."""
        self._noise.check(noise, step_noise)
        self._steps.fill(self._denoiser.condition, keys)
        action = self._denoiser.run(self._noise, noise, step_noise)
        if action is None:
            raise EngineError(f"{self._path}: {NOT_FINITE}")
        return action


class _Encoder:
    """encoder.onnx: `inputs` to `features`, float32 [size]."""

    def __init__(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[Provider]) -> None:
        session = open_session(path, threads, providers)
        shape, dtype = signature(session.get_outputs()).get(FEATURES, ((), None))
        if len(shape) != 1 or not isinstance(shape[0], int) or dtype != _FLOAT:
            raise EngineError(f"{path} does not give {FEATURES} float32 [F] of a fixed length; export the policy again")
        self.size: int = shape[0]
        check_signature(path, session, manifest.input_shapes(), {FEATURES: (shape, _FLOAT)})
        self.inputs = zeros(manifest.input_shapes())
        self.features: Array = np.zeros(shape, np.float32)
        self.graph = BoundGraph(path, session, self.inputs, {FEATURES: self.features})


class _Denoiser:
    """denoise.onnx and its rows. `condition`: float32 [T, F], to be filled in place, oldest step first."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        table: SamplerTable,
        features: int,
        threads: int,
        providers: Sequence[Provider],
    ) -> None:
        session = open_session(path, threads, providers)
        inputs, outputs = denoise_signature(manifest, table, features)
        check_signature(path, session, inputs, outputs)
        arrays = zeros(inputs)
        self.condition: Array = arrays["condition"].reshape(manifest.observation_steps, features)
        self._time, self._coefficients, self._noise = arrays["time"], arrays["coefficients"], arrays["noise"]
        self._rows = list(zip(table.time, table.coefficients, strict=True))
        self._action: Array = np.zeros(outputs[ACTION][0], np.float32)
        shape = inputs["sample"][0]
        self._samples: list[Array] = [np.zeros(shape, np.float32) for _ in range(2)]
        self._denoised: list[Array] = [np.zeros(shape, np.float32) for _ in range(2)]
        self._graphs = [self._bind(path, session, arrays, turn) for turn in range(2)]

    def _bind(self, path: Path, session: Any, arrays: dict[str, Array], turn: int) -> BoundGraph:
        """The graph for every second step, beginning with `turn`: it reads what the other one wrote."""
        other = 1 - turn
        inputs = arrays | {"sample": self._samples[turn], "previous": self._denoised[turn]}
        outputs = {"next": self._samples[other], "denoised": self._denoised[other], ACTION: self._action}
        return BoundGraph(path, session, inputs, outputs)

    def run(self, source: NoiseSource, noise: Array | None, step_noise: Array | None) -> Array | None:
        """All steps, for what `condition` holds: the action, or None where it is not finite."""
        source.start(self._samples[0], noise)
        self._denoised[0].fill(0)
        for step, (time, coefficients) in enumerate(self._rows):
            np.copyto(self._time, time)
            np.copyto(self._coefficients, coefficients)
            if source.draws[step]:
                source.draw(step, self._noise, step_noise)
            else:
                self._noise.fill(0)
            self._graphs[step % 2].run()
        # `action` alone would not do, as clipping can hide a NaN there; `next` has terms in x and in the network's
        # output that are not clipped, so that it carries a NaN or an infinity of any step to the end.
        last = self._samples[len(self._rows) % 2]
        return self._action if np.isfinite(last).all() and np.isfinite(self._action).all() else None
