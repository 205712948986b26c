"""The table of Consistency Policy's student, a consistency trajectory model, in one step or chained.

Prasad et al. 2024 (arXiv:2405.07503) after Kim et al. 2024 (arXiv:2310.02279); constants and quirks are those of the
published code (Aaditya-Prasad/consistency-policy, MIT), since its checkpoints were trained with them. The importer of
these checkpoints calls `ctm`. Its network is told two times, where x is (t) and where the jump ends (s), so that the
table's `times` are [S, 2]; noise levels are absolute (x = data + t * noise), and x_T is still drawn with scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.diffusion.sampler import NO_CLIP, SamplerTable, table
from export.errors import ExportError

READINGS = ("sigma", "bins")
SCALINGS = ("boundary", "no_boundary")

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CtmSchedule:
    """The Karras schedule of a checkpoint (Karras et al. 2022, arXiv:2206.00364, eq. 5), under its config's names and
    with the published code's values."""

    time_min: float = 0.02
    time_max: float = 80.0
    rho: float = 7.0
    bins: int = 80
    data_std: float = 0.5
    scaling: str = "boundary"

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ExportError(f"scaling: {self.scaling!r} is not supported; supported are {', '.join(SCALINGS)}")
        if not (0 < self.time_min < self.time_max and self.rho > 0 and self.bins > 1 and self.data_std > 0):
            raise ExportError(
                "the noise scheduler: expected 0 < time_min < time_max, more than one bin, and positive rho and "
                f"data_std, found {self}; correct the config"
            )

    def sigma(self, bins: npt.ArrayLike) -> Float64:
        """Noise levels of bins, any shape: bin 0 is time_max, bin `bins - 1` is time_min."""
        ends = self.time_max ** (1 / self.rho), self.time_min ** (1 / self.rho)
        roots = ends[0] + np.asarray(bins, np.float64) / (self.bins - 1) * (ends[1] - ends[0])
        return np.asarray(np.clip(roots**self.rho, self.time_min, self.time_max))

    def scalings(self, t: npt.ArrayLike) -> tuple[Float64, Float64, Float64]:
        """c_skip, c_out and c_in at noise levels t; with `boundary`, 1 and 0 for the first two at time_min."""
        at, std = np.asarray(t, np.float64), self.data_std
        left = at - self.time_min if self.scaling == "boundary" else at
        total = at**2 + std**2
        return std**2 / (left**2 + std**2), left * std / np.sqrt(total), 1 / np.sqrt(total)


def jump(schedule: CtmSchedule, t: npt.ArrayLike, s: npt.ArrayLike) -> tuple[Float64, Float64, Float64]:
    """G(x, t, s) = (s/t) * x + (1 - s/t) * (c_skip * x + c_out * m), m = network(c_in * x), as what it takes of x, what
    it takes of m, and c_in. G(x, t, t) = x."""
    c_skip, c_out, c_in = schedule.scalings(t)
    ratio = np.asarray(s, np.float64) / np.asarray(t, np.float64)
    return ratio + (1 - ratio) * c_skip, (1 - ratio) * c_out, c_in


def told_time(sigma: npt.ArrayLike) -> Float64:
    """What the network is told of a noise level, before the sinusoids: 250 * ln(sigma).

    In the float32 roundings of the published code, because the numbers (1095.5 to -978) are radians of the fastest
    sinusoid: they must never be stored in less than float32.
    """
    logarithm = np.log(np.asarray(sigma, np.float32).astype(np.float64)).astype(np.float32)
    return np.asarray(np.float32(250) * logarithm, np.float64)


def ctm(
    chaining: Sequence[float] = (),
    *,
    reading: str = "sigma",
    schedule: CtmSchedule | None = None,
    clamp: float | None = 1.0,
) -> SamplerTable:
    """One jump from time_max to time_min, then for each time t of `chaining` noise of scale t and another jump.

    `reading` says what those times are: `sigma`, noise levels as they stand, or `bins`. A config's `chaining_times` is
    a letter and the times: the published code takes them for bins only after "C", so that its default, ["D", 27, 54],
    adds noise of scale 27 and then 54, where the paper means bins 27 and 54 (12.0 and 0.885). It chains only when asked
    to. `clamp` bounds each jump's result, as the published code does at inference.
    Raises ExportError for an unknown reading and for times outside the schedule.
    """
    known = schedule or CtmSchedule()
    if reading not in READINGS:
        raise ExportError(f"reading: {reading!r} is not supported; supported are {', '.join(READINGS)}")
    low, high = (0, known.bins - 1) if reading == "bins" else (known.time_min, known.time_max)
    outside = [time for time in chaining if not low <= time <= high]
    if outside:
        raise ExportError(f"chaining times: expected {reading} from {low} to {high}, found {outside}")
    chained = known.sigma(chaining) if reading == "bins" else np.array(chaining, np.float64)
    t = np.append(known.time_max, chained)
    s = np.full_like(t, known.time_min)
    of_x, of_m, c_in = jump(known, t, s)
    return table(
        "ctm",
        reading if chaining else "single",
        np.stack([told_time(t), told_time(s)], axis=1),
        {
            "c_in": c_in,
            "p_x": of_x,
            "p_m": of_m,
            "clip": NO_CLIP if clamp is None else clamp,
            "k_denoised": 1.0,
            "k_noise": np.append(t[1:], 0.0),
        },
    )
