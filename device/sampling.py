"""What every engine of a policy that samples needs, whichever runtime it is of: noise, and a memory of keys.

`engine_sampling.py` (onnxruntime) and `engine_tensorrt.py` hold one of each. Noise comes from the caller or from a
seeded generator, into memory that the engine names; what does not fit is refused with an EngineError before anything
has run. The memory of keys says in which of a fixed number of places the encoding of an observation step lies.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import numpy as np

from device.arrays import Array
from device.bundle import NOISE, STEP_NOISE, Manifest, SamplerTable
from device.engine import EngineError

# Steps that come round again are those between the oldest step that a policy looks at and the newest: T times the
# camera's frames per action. Features are a few kilobytes, so there is room for a camera much faster than the policy.
ENCODINGS_PER_STEP = 8


def draw_noise(manifest: Manifest, rng: np.random.Generator) -> dict[str, Array]:
    """Noise for one inference, by the names that `infer` takes; empty for a policy that does not sample."""
    if manifest.sampler is None:
        return {}
    names = (NOISE, STEP_NOISE) if manifest.sampler.draws_noise else (NOISE,)
    return {name: rng.standard_normal(manifest.noise_shapes()[name], np.float32) for name in names}


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
