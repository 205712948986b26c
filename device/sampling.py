"""What every engine of a policy that samples needs, whichever runtime it is of: noise, and a memory of encodings.

`engine_sampling.py` (onnxruntime) and `engine_tensorrt.py` hold one of each. Noise comes from the caller or from a
seeded generator, into memory that the engine names; what does not fit is refused with an EngineError before anything
has run. Observation steps are encoded once and found again by their keys, in a fixed number of places; an encoding
that failed leaves nothing behind under its key. What denoise.onnx must take and give stands here too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np

from device.arrays import Array
from device.bundle import ACTION, NOISE, STEP_NOISE, Manifest, SamplerTable
from device.engine import NOT_FINITE, EngineError, Signature

FEATURES = "features"

_FLOAT = np.dtype(np.float32)

# Steps that come round again are those between the oldest step that a policy looks at and the newest: T times the
# camera's frames per action. Features are a few kilobytes, so there is room for a camera much faster than the policy.
ENCODINGS_PER_STEP = 8


def draw_noise(manifest: Manifest, rng: np.random.Generator) -> dict[str, Array]:
    """Noise for one inference, by the names that `infer` takes; empty for a policy that does not sample."""
    shapes = manifest.noise_shapes()
    return {name: rng.standard_normal(shapes[name], np.float32) for name in needed_noise(manifest)}


def needed_noise(manifest: Manifest) -> tuple[str, ...]:
    """The names of the noise that decides what an inference answers."""
    if manifest.sampler is None:
        return ()
    return (NOISE, STEP_NOISE) if manifest.sampler.draws_noise else (NOISE,)


class NoiseSource:
    """Fills an engine's buffers with the caller's noise, or with the generator's: x_T first, then step by step."""

    def __init__(self, path: Path, manifest: Manifest, table: SamplerTable, seed: int | None) -> None:
        if manifest.sampler is None:
            raise EngineError(f"{path}: a policy of family {manifest.family} does not sample")
        self._path = path
        self._shapes = manifest.noise_shapes()
        self._scale = np.float32(manifest.sampler.initial_scale)
        self._rng = np.random.default_rng(seed)
        self.draws = table.draws
        """Which steps draw; the others are to be given zeros."""

    def check(self, noise: Array | None, step_noise: Array | None) -> None:
        """Raise EngineError for noise from the caller that is not what this policy takes."""
        if noise is not None:
            self._check(NOISE, noise, (self._shapes[NOISE],))
        if step_noise is not None:
            steps, *drawn = self._shapes[STEP_NOISE]
            shorter = () if self.draws[-1] else ((steps - 1, *drawn),)
            self._check(STEP_NOISE, step_noise, (self._shapes[STEP_NOISE], *shorter))

    def start(self, sample: Array, noise: Array | None) -> None:
        """Fill `sample`, float32 [H, A], with x_T times the initial scale."""
        if noise is None:
            self._rng.standard_normal(dtype=np.float32, out=sample)
            np.multiply(sample, self._scale, out=sample)
        else:
            np.multiply(noise, self._scale, out=sample)

    def draw(self, step: int, out: Array, step_noise: Array | None) -> None:
        """Fill `out`, float32 [H, A], with what `step` draws; for steps that `draws` names."""
        if step_noise is None:
            self._rng.standard_normal(dtype=np.float32, out=out)
        else:
            np.copyto(out, step_noise[step])

    def _check(self, name: str, array: Array, shapes: tuple[tuple[int, ...], ...]) -> None:
        if array.dtype != np.float32 or array.shape not in shapes:
            wanted = " or ".join(f"float32 {list(shape)}" for shape in shapes)
            raise EngineError(f"{self._path}: {name} should be {wanted}, found {array.dtype} {list(array.shape)}")
        if not np.isfinite(array).all():
            raise EngineError(f"{self._path}: {name} holds NaN or infinity")


class EncodedSteps:
    """The encodings of the latest observation steps, by the steps' keys.

    `features`: float32 [F], where `encode` leaves the encoding of what the engine's inputs hold.
    """

    def __init__(self, path: Path, steps: int, features: Array, encode: Callable[[], object]) -> None:
        self._path = path
        self._steps = steps
        self._features = features
        self._run_encoder = encode
        places = ENCODINGS_PER_STEP * steps
        self._keys = RecentKeys(places)
        self._encodings: Array = np.zeros((places, len(features)), np.float32)
        self.encoded = 0

    def observe(self, key: Hashable) -> None:
        """See Engine.observe."""
        self._keys.forget(key)
        features = self._encode()
        np.copyto(self._encodings[self._keys.claim(key)], features)

    def knows(self, key: Hashable) -> bool:
        """See Engine.knows."""
        return self._keys.find(key) is not None

    def fill(self, condition: Array, keys: Sequence[Hashable] | None) -> None:
        """Fill `condition`, float32 [T, F], with the encodings of `keys`, oldest first; without keys, and where the
        policy looks at one step, with that of what the inputs hold. Raises EngineError."""
        found = 0 if keys is None else len(keys)
        if keys is None and self._steps == 1:
            np.copyto(condition[0], self._encode())
            return
        if keys is None or found != self._steps:
            raise EngineError(
                f"{self._path}: the policy looks at {self._steps} observation steps, {found} keys were given; "
                "observe each step and name them, oldest first"
            )
        for row, key in zip(condition, keys, strict=True):
            place = self._keys.find(key)
            if place is None:
                raise EngineError(f"{self._path}: no observation step {key} is known (any more); observe it first")
            np.copyto(row, self._encodings[place])

    def _encode(self) -> Array:
        self._run_encoder()
        self.encoded += 1
        # Said here because a policy may clip what it makes of it to something that looks like motion.
        if not np.isfinite(self._features).all():
            raise EngineError(f"{self._path}: {NOT_FINITE}")
        return self._features


class RecentKeys:
    """Which key lies in which of `places`; the one that was asked for or claimed longest ago makes room."""

    def __init__(self, places: int) -> None:
        self._free = list(range(places))
        self._place: dict[Hashable, int] = {}  # in order of use

    def find(self, key: Hashable) -> int | None:
        """The key's place, None if it is not known. Counts as use."""
        place = self._place.pop(key, None)
        if place is not None:
            self._place[key] = place
        return place

    def claim(self, key: Hashable) -> int:
        """A place for `key`: its own, a free one or that of the key used longest ago, which is forgotten."""
        place = self.find(key)
        if place is None:
            place = self._free.pop() if self._free else self._place.pop(next(iter(self._place)))
            self._place[key] = place
        return place

    def forget(self, key: Hashable) -> None:
        """Give the key's place back, if it has one."""
        if key in self._place:
            self._free.append(self._place.pop(key))


def denoise_signature(manifest: Manifest, table: SamplerTable, features: int) -> tuple[Signature, Signature]:
    """Inputs and outputs that denoise.onnx must have. `features`: F of encoder.onnx."""
    if manifest.sampler is None:
        raise EngineError(f"a policy of family {manifest.family} does not sample")
    joints = len(manifest.joints)
    sample = (manifest.sampler.horizon, joints)
    inputs: dict[str, tuple[int, ...]] = {
        "sample": sample,
        "condition": (manifest.observation_steps * features,),
        "time": table.time.shape[1:],
        "coefficients": table.coefficients.shape[1:],
        "noise": sample,
        "previous": sample,
    }
    outputs: dict[str, tuple[int, ...]] = {"next": sample, "denoised": sample, ACTION: (manifest.chunk_size, joints)}
    return (
        {name: (shape, _FLOAT) for name, shape in inputs.items()},
        {name: (shape, _FLOAT) for name, shape in outputs.items()},
    )
