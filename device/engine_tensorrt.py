"""Runs a bundle's engines in TensorRT: fixed buffers, and each inference a recorded CUDA graph that is launched.

`open_best_engine` makes one where engines were built (`understudy bundle build`); it is an Engine like onnxruntime's. A
policy of one graph is one recording: copy in, network, copy out. A policy that samples has two: the encoder, which runs
for observation steps that are new, and the whole denoising loop with all its steps. The rows of sampler.npz lie on the
device from the start; what changes from one inference to the next is copied at the recording's beginning. Everything
is given back by `close`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from device.arrays import Array
from device.bundle import ACTION, DENOISE, ENCODER, POLICY, Bundle, Manifest, SamplerTable
from device.cuda_runtime import ALIGNMENT, Buffer, Cuda
from device.engine import NOT_FINITE, EngineError, HeldStep, Signature
from device.engine_cache import EngineCache
from device.sampling import FEATURES, EncodedSteps, NoiseSource, denoise_signature
from device.tensorrt_network import Network, TensorRt

_FLOAT = np.dtype(np.float32)


class TensorRtEngine:
    """A policy of one graph. `inputs`, and what `infer` gives, must not be touched after `close`."""

    def __init__(self, bundle: Bundle, precision: str, cache: EngineCache) -> None:
        """Raises EngineError where TensorRT, a GPU or a built engine is missing, or does not do."""
        manifest = bundle.manifest
        self._path = bundle.path / POLICY
        self._held = HeldStep(self._path)
        with ExitStack() as opening:
            self._gpu = _Gpu(bundle, precision, cache, opening)
            network = self._gpu.open(POLICY)
            action = (manifest.chunk_size, len(manifest.joints))
            network.check(manifest.input_shapes(), {ACTION: (action, _FLOAT)})
            buffers = self._gpu.buffers(manifest.input_shapes())
            self._action = self._gpu.cuda.buffer(action, _FLOAT)
            self._launch = self._gpu.record(network, buffers, {ACTION: self._action})
            self.inputs: dict[str, Array] = {name: buffer.host for name, buffer in buffers.items()}
            self._owned = opening.pop_all()

    def observe(self, key: Hashable) -> None:
        """See Engine.observe."""
        self._held.observe(key)

    def knows(self, key: Hashable) -> bool:
        """See Engine.knows."""
        return self._held.knows(key)

    def infer(
        self, keys: Sequence[Hashable] | None = None, *, noise: Array | None = None, step_noise: Array | None = None
    ) -> Array:
        """See Engine.infer."""
        self._held.check(keys, noise, step_noise)
        self._launch()
        if not np.isfinite(self._action.host).all():
            raise EngineError(f"{self._path}: {NOT_FINITE}")
        return self._action.host

    def close(self) -> None:
        """Give memory, recordings and engines back."""
        self.inputs = {}
        self._owned.close()


class TensorRtSamplingEngine:
    """A policy that samples. `seed` of the noise; None: the operating system's entropy. `inputs`, and what `infer`
    gives, must not be touched after `close`."""

    def __init__(self, bundle: Bundle, precision: str, cache: EngineCache, seed: int | None = None) -> None:
        """Raises EngineError where TensorRT, a GPU or a built engine is missing, or does not do."""
        manifest, table = bundle.manifest, bundle.sampler_table()
        self._path = bundle.path
        self._noise = NoiseSource(bundle.path, manifest, table, seed)
        with ExitStack() as opening:
            gpu = _Gpu(bundle, precision, cache, opening)
            network = gpu.open(ENCODER)
            features = _feature_count(bundle.path / ENCODER, network)
            network.check(manifest.input_shapes(), {FEATURES: ((features,), _FLOAT)})
            buffers = gpu.buffers(manifest.input_shapes())
            encoding = gpu.cuda.buffer((features,), _FLOAT)
            encode = gpu.record(network, buffers, {FEATURES: encoding})
            self._steps = EncodedSteps(bundle.path, manifest.observation_steps, encoding.host, encode)
            self._loop = _Loop(gpu, manifest, table, features)
            self.inputs: dict[str, Array] = {name: buffer.host for name, buffer in buffers.items()}
            self._owned = opening.pop_all()

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
        self._steps.fill(self._loop.condition.host, keys)
        action = self._loop.run(self._noise, noise, step_noise)
        if action is None:
            raise EngineError(f"{self._path}: {NOT_FINITE}")
        return action

    def close(self) -> None:
        """Give memory, recordings and engines back."""
        self.inputs = {}
        self._owned.close()


class _Loop:
    """denoise.onnx with all its steps in one recording. `condition`: host float32 [T, F], to be filled in place."""

    def __init__(self, gpu: _Gpu, manifest: Manifest, table: SamplerTable, features: int) -> None:
        self._cuda, self._network = gpu.cuda, gpu.open(DENOISE)
        inputs, outputs = denoise_signature(manifest, table, features)
        self._network.check(inputs, outputs)
        sample, steps = inputs["sample"][0], len(table.time)
        self.condition = gpu.cuda.buffer((manifest.observation_steps, features), _FLOAT)
        self._action = gpu.cuda.buffer(outputs[ACTION][0], _FLOAT)
        # What one step writes the next one reads; `previous` of the first and noise of steps that draw none are zeros.
        self._samples = [gpu.cuda.buffer(sample, _FLOAT) for _ in range(2)]
        self._denoised = [gpu.cuda.buffer(sample, _FLOAT) for _ in range(2)]
        self._zeros = gpu.cuda.buffer(sample, _FLOAT)
        self._time, self._coefficients = _Rows(gpu.cuda, table.time), _Rows(gpu.cuda, table.coefficients)
        self._drawn = _Rows(gpu.cuda, np.zeros((steps, *sample), np.float32))
        self._draws = table.draws
        self._last = self._samples[steps % 2]
        self._launch = gpu.cuda.capture(self._record)

    def run(self, source: NoiseSource, noise: Array | None, step_noise: Array | None) -> Array | None:
        """All steps, for what `condition` holds: the action, or None where it is not finite."""
        source.start(self._samples[0].host, noise)
        for step, draws in enumerate(self._draws):
            if draws:
                source.draw(step, self._drawn.host(step), step_noise)
        self._launch()
        self._cuda.synchronize()
        # Clipping can hide a NaN in the action; the last `next` carries that of any step.
        finite = np.isfinite(self._last.host).all() and np.isfinite(self._action.host).all()
        return self._action.host if finite else None

    def _record(self) -> None:
        self._cuda.upload(self.condition)
        self._cuda.upload(self._samples[0])
        if any(self._draws):
            self._cuda.upload(self._drawn.buffer)
        self._network.bind({"condition": self.condition.device, ACTION: self._action.device})
        for step in range(len(self._draws)):
            self._network.bind(self._addresses(step))
            self._network.enqueue(self._cuda.stream)
        self._cuda.download(self._action)
        self._cuda.download(self._last)

    def _addresses(self, step: int) -> dict[str, int]:
        reads, writes = step % 2, 1 - step % 2
        return {
            "sample": self._samples[reads].device,
            "previous": self._denoised[reads].device if step else self._zeros.device,
            "time": self._time.address(step),
            "coefficients": self._coefficients.address(step),
            "noise": self._drawn.address(step) if self._draws[step] else self._zeros.device,
            "next": self._samples[writes].device,
            "denoised": self._denoised[writes].device,
        }


class _Rows:
    """A table on the device whose rows can each be a tensor: they begin at addresses that TensorRT takes."""

    def __init__(self, cuda: Cuda, rows: Array) -> None:
        self._shape = rows.shape[1:]
        self._size = int(np.prod(self._shape))
        self._stride = -(-self._size * rows.itemsize // ALIGNMENT) * ALIGNMENT  # bytes
        self.buffer = cuda.buffer((len(rows), self._stride // rows.itemsize), rows.dtype)
        self.buffer.host[:, : self._size] = rows.reshape(len(rows), -1)
        cuda.upload(self.buffer)
        cuda.synchronize()

    def host(self, row: int) -> Array:
        """One row, to be filled in place before the table is uploaded."""
        values: Array = self.buffer.host[row, : self._size].reshape(self._shape)
        return values

    def address(self, row: int) -> int:
        """One row on the device."""
        return self.buffer.device + row * self._stride


class _Gpu:
    """CUDA and TensorRT, opened for one bundle; `owned` gives back whatever was taken."""

    def __init__(self, bundle: Bundle, precision: str, cache: EngineCache, owned: ExitStack) -> None:
        self.cuda = Cuda.open()
        owned.callback(self.cuda.close)
        self._tensorrt = TensorRt(bundle, precision, cache, self.cuda)
        owned.callback(self._tensorrt.close)
        self._owned = owned

    def open(self, graph: str) -> Network:
        network = self._tensorrt.open(graph)
        self._owned.callback(network.close)
        return network

    def buffers(self, signature: Signature) -> dict[str, Buffer]:
        return {name: self.cuda.buffer(shape, dtype) for name, (shape, dtype) in signature.items()}

    def record(
        self, network: Network, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """A recording of copies in, one run and copies out; calling it launches it and waits for the end."""

        def work() -> None:
            for buffer in inputs.values():
                self.cuda.upload(buffer)
            network.enqueue(self.cuda.stream)
            for buffer in outputs.values():
                self.cuda.download(buffer)

        network.bind({name: buffer.device for name, buffer in {**inputs, **outputs}.items()})
        launch = self.cuda.capture(work)

        def run() -> None:
            launch()
            self.cuda.synchronize()

        return run


def _feature_count(path: Path, network: Network) -> int:
    shape, _ = network.outputs.get(FEATURES, ((), None))
    if len(shape) != 1:
        raise EngineError(f"{path}: its engine does not give {FEATURES} float32 [F]; export the policy again")
    return shape[0]


def open_tensorrt(
    bundle: Bundle, precision: str, cache: EngineCache, seed: int | None = None
) -> TensorRtEngine | TensorRtSamplingEngine:
    """The engine of this bundle's family. Raises EngineError."""
    if bundle.manifest.sampler is None:
        return TensorRtEngine(bundle, precision, cache)
    return TensorRtSamplingEngine(bundle, precision, cache, seed)
