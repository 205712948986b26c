"""A sampler as a table: one row of nine numbers a denoising step, which is all that the device knows of samplers.

`solvers` writes tables for diffusion policies, `consistency` and `ctm` for their distilled students; the exporter
stores one as `sampler.npz` (docs/formats.md, Bundle). `run` executes a table in numpy and defines what a row means: the
denoising graph and the engine agree with it. Coefficients are computed in float64 or in the framework's own roundings,
whichever gives the framework's samples, and stored as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.errors import ExportError

COLUMNS = ("c_in", "p_x", "p_m", "clip", "k_denoised", "k_x", "k_m", "k_noise", "k_previous")
NO_CLIP = float(np.finfo(np.float32).max)  # rows are finite, so that a table with an infinity in it is a damaged one

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Network = Callable[[Float32, Float64], Float32]


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """S steps in the order they run.

    `times` float64, [S] or [S, 2], is what the network is told of time, before it is embedded: the training timestep,
    or for a trajectory consistency model the pair (c_noise(t), c_noise(s)). `coefficients` float32 [S, 9] has the
    columns of `COLUMNS`. The first sample is standard normal noise times `initial_scale`.
    Raises ExportError for a table that no device could run.
    """

    solver: str
    spacing: str
    times: Float64
    coefficients: Float32
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        steps = len(self.times)
        if steps == 0 or self.coefficients.shape != (steps, len(COLUMNS)):
            raise ExportError(
                f"sampler {self.solver}: expected a row of {len(COLUMNS)} coefficients for each of at least one time, "
                f"found {self.coefficients.shape} coefficients for {steps} times; choose other steps or another spacing"
            )
        if not (np.isfinite(self.coefficients).all() and np.isfinite(self.times).all()):
            row = int(np.argmin(np.isfinite(self.coefficients).all(axis=1)))
            raise ExportError(
                f"sampler {self.solver}: row {row} holds a number that is not finite; choose fewer steps or another "
                "spacing, or correct the schedule in the checkpoint's config"
            )

    @property
    def steps(self) -> int:
        """S: how often the network runs."""
        return len(self.times)

    @property
    def draws_noise(self) -> bool:
        """True when a step adds fresh noise: the same x_T then does not always give the same action."""
        return bool(self.column("k_noise").any())

    def column(self, name: str) -> Float32:
        """float32 [S], by the name in `COLUMNS`."""
        return self.coefficients[:, COLUMNS.index(name)]


def table(
    solver: str, spacing: str, times: npt.ArrayLike, columns: dict[str, npt.ArrayLike], initial_scale: float = 1.0
) -> SamplerTable:
    """A table from its columns, each [S] or one number for all steps; those not named are zeros, `c_in` ones and `clip`
    none."""
    at = np.asarray(times, np.float64)
    rows = np.zeros((len(at), len(COLUMNS)), np.float32)
    for name, values in ({"c_in": 1.0, "clip": NO_CLIP} | columns).items():
        rows[:, COLUMNS.index(name)] = values
    return SamplerTable(solver, spacing, at, rows, initial_scale)


def run(sampler: SamplerTable, network: Network, x: Float32, step_noise: Float32 | None = None) -> Float32:
    """Samples with a table, in float32 as the device does. Returns x after every step, float32 [S, H, A]; the last is
    the result.

    `x` float32 [H, A] is x_T, `initial_scale` included. `network(sample, time)` gets `c_in * x` and the row of `times`
    ([] or [2]). `step_noise` float32 [S, H, A], row i for step i, may be None for a sampler that draws none.
    """
    if sampler.draws_noise and step_noise is None:
        raise ExportError(f"sampler {sampler.solver} draws noise in between: give step_noise [S, H, A] for its steps")
    previous, after = np.zeros_like(x), []
    for i, row in enumerate(sampler.coefficients):
        c_in, p_x, p_m, clip, k_denoised, k_x, k_m, k_noise, k_previous = row
        m = network(c_in * x, sampler.times[i])
        denoised = np.clip(p_x * x + p_m * m, -clip, clip)
        x = k_denoised * denoised + k_x * x + k_m * m + k_previous * previous
        if k_noise and step_noise is not None:
            x = x + k_noise * step_noise[i]
        previous = denoised
        after.append(x)
    return np.stack(after)
