"""What an engine is: an observation in, a chunk of actions out, in the joints' units.

`predict` and the lockstep cell hold one engine for as long as its bundle is active; `understudy bundle run` and `check`
open one for a moment. They know this protocol only; which runtime and which family of policy is behind it, they need
not. Inputs and output are allocated once, so that a caller decodes a JPEG straight into what inference reads, and an
inference allocates nothing that the caller sees. An engine refuses to hand out numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from device.arrays import Array
from device.bundle import NOISE, POLICY, STEP_NOISE, Bundle, Manifest
from device.errors import UnderstudyError

Signature = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""What a graph takes or gives: name -> (shape, dtype)."""

NOT_FINITE = (
    "the policy answered NaN or infinity; check the observation (a camera that is black, a joint far outside what it "
    "was trained on) or export again"
)


class EngineError(UnderstudyError, RuntimeError):
    """A network that cannot be loaded or run, or that answered with something that is no motion."""


class Engine(Protocol):
    """A loaded policy.

    A caller fills `inputs` with one observation step, names it with `observe`, and asks with `infer` for the chunk that
    follows from the steps of these names. A step that the engine knows already is not filled in again, which spares
    its pictures' decoding and encoding. Where a policy looks at one step only, `infer()` alone does for all of it.
    """

    inputs: dict[str, Array]
    """One observation step by LeRobot's names, to be filled in place: observation.state float32 [S] (joint units),
    observation.images.<camera> uint8 [H, W, 3] RGB, observation.environment_state float32 [E]. Never a leading axis,
    however many steps the policy looks at."""

    def observe(self, key: Hashable) -> None:
        """Take in what `inputs` holds under `key`, such as its capture time; a key that is known is overwritten.

        `inputs` may be filled anew afterwards, unless the policy is one graph, which reads them in `infer`.
        Raises EngineError where the runtime fails or the encoding is not finite; the key is then unknown.
        """

    def knows(self, key: Hashable) -> bool:
        """Whether `infer` can use `key` as it is. What was observed, asked for or used most recently is kept: a key
        that is known stays so for at least as many further steps observed as the policy looks at."""

    def infer(
        self, keys: Sequence[Hashable] | None = None, *, noise: Array | None = None, step_noise: Array | None = None
    ) -> Array:
        """The chunk for the observation steps `keys` (as many as the manifest's observation_steps, oldest first), or,
        without them, for what `inputs` holds: float32 [K, A] in joint units, a view that the next call overwrites.

        Of policies that sample: `noise` float32 [H, A] is x_T, `step_noise` float32 [S, H, A] is what the steps draw
        (row i for step i; S - 1 rows do where the last step draws none). Drawn from the engine's generator if None.
        Raises EngineError where the result is not finite or the runtime fails, for a key that it does not know, for
        noise that does not fit, and for no keys where the policy looks at several steps.
        """


class HeldStep:
    """The memory of an engine of one graph: its inputs hold one step, and this is that step's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key: Hashable = object()  # nobody's at first

    def observe(self, key: Hashable) -> None:
        """See Engine.observe."""
        self._key = key

    def knows(self, key: Hashable) -> bool:
        """See Engine.knows."""
        return key == self._key

    def check(self, keys: Sequence[Hashable] | None, noise: Array | None, step_noise: Array | None) -> None:
        """Raise EngineError unless `infer` can be asked so: for the step that is held, and without noise."""
        if keys is not None and tuple(keys) != (self._key,):
            raise EngineError(f"{self._path}: its inputs hold another step than {list(keys)}; observe that one first")
        if noise is not None or step_noise is not None:
            raise EngineError(f"{self._path}: this policy does not sample, so it takes no noise")


def open_engine(bundle: Bundle, threads: int = 1, seed: int | None = None) -> Engine:
    """Load a bundle's network on this machine. `seed` is of the noise of policies that sample; None: the operating
    system's entropy. Raises EngineError, or BundleError for a table of steps that is not the manifest's."""
    if bundle.manifest.family == "diffusion":
        from device.engine_sampling import SamplingEngine

        return SamplingEngine(bundle, threads, seed)
    from device.engine_onnx import OnnxEngine

    return OnnxEngine(bundle.path / POLICY, bundle.manifest, threads)


def infer_observation(engine: Engine, manifest: Manifest, arrays: Mapping[str, Array]) -> Array:
    """One inference from named arrays, as golden.npz and the files of `understudy bundle run` hold them.

    With several observation steps the inputs have a leading axis of them, oldest first. `noise` and `step_noise` are
    used where they are given. Returns what Engine.infer does. Raises EngineError.
    """
    steps = manifest.observation_steps
    keys = [("named arrays", step) for step in range(steps)]
    for step, key in enumerate(keys):
        for name, target in engine.inputs.items():
            target[...] = arrays[name] if steps == 1 else arrays[name][step]
        engine.observe(key)
    return engine.infer(keys, noise=arrays.get(NOISE), step_noise=arrays.get(STEP_NOISE))
