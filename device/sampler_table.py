"""sampler.npz: a sampler as numbers, one row for every denoising step, in the order they run.

`export` fills a table for whichever solver a policy samples with, the engines feed its rows to denoise.onnx without
knowing which solver that is. Here is the one list of the columns' names and order, and the reader, which refuses with a
BundleError what is not the table that the manifest announces.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.arrays import Array, load_arrays
from device.errors import BundleError
from device.manifest import Sampler

# With x = `sample` and m = network(c_in * x, time, condition):
#   denoised = clip(p_x * x + p_m * m, -clip, clip)
#   next     = k_denoised * denoised + k_x * x + k_m * m + k_noise * noise + k_previous * previous
COEFFICIENTS = ("c_in", "p_x", "p_m", "clip", "k_denoised", "k_x", "k_m", "k_noise", "k_previous")


@dataclass(frozen=True)
class SamplerTable:
    """All float32 and finite. S steps, D numbers of time embedding."""

    timesteps: Array  # [S], in training's schedule; for people, no engine reads it
    time: Array  # [S, D], what the network is given as `time`
    coefficients: Array  # [S, 9], columns as in COEFFICIENTS

    def column(self, name: str) -> Array:
        """One of COEFFICIENTS for all steps: float32 [S]."""
        found: Array = self.coefficients[:, COEFFICIENTS.index(name)]
        return found

    @property
    def draws(self) -> tuple[bool, ...]:
        """Which steps draw noise."""
        return tuple(bool(k) for k in self.column("k_noise"))


def read_sampler_table(path: Path, sampler: Sampler) -> SamplerTable:
    """Read sampler.npz and hold it against the manifest. Raises BundleError."""
    arrays = load_arrays(path)
    steps = sampler.steps
    time = arrays.get("time")
    width = time.shape[1] if time is not None and time.ndim == 2 else 1
    expected = {"timesteps": (steps,), "time": (steps, width), "coefficients": (steps, len(COEFFICIENTS))}
    if unknown := sorted(set(arrays) - set(expected)):
        raise BundleError(
            f"{path}: {unknown[0]} is nothing that a table of steps holds; it holds {', '.join(expected)}"
        )
    for name, shape in expected.items():
        _check(path, name, arrays.get(name), shape)
    table = SamplerTable(**arrays)
    if not (table.column("clip") > 0).all():
        raise BundleError(f"{path}: a clip of zero or less leaves no action; export the policy again")
    if any(table.draws) != sampler.draws_noise:
        says = "draws" if sampler.draws_noise else "draws no"
        raise BundleError(f"{path}: the manifest's sampler {says} noise, the table has it otherwise; export it again")
    return table


def _check(path: Path, name: str, array: Array | None, shape: tuple[int, ...]) -> None:
    if array is None:
        raise BundleError(f"{path}: {name} is missing; export the policy again")
    if array.dtype != np.float32 or array.shape != shape or 0 in shape:
        raise BundleError(
            f"{path}: {name} should be float32 {list(shape)}, found {array.dtype} {list(array.shape)}; "
            "export the policy again"
        )
    if not np.isfinite(array).all():
        raise BundleError(f"{path}: {name} holds NaN or infinity; export the policy again")
