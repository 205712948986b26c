"""A consistency model distilled from a diffusion policy: what it computes, and the table that samples from it.

Consistency models are Song et al. 2023 (arXiv:2303.01469); the form for a discrete variance-preserving schedule, its
preconditioning and its clamp are those of alexander-soare/consistency_policy (MIT), whose two-step students come close
to their hundred-step teachers. Distillation trains `ConsistencyFunction` and export samples it, from the same arrays.
Levels count noise: level 0 is data, level n is the schedule's timestep n - 1, which is what the network is told.

Clipping: f itself is never clipped, so that training has a gradient everywhere; sampling (and a training target, which
has no gradient) clips f's result to the range that normalised actions have. Inside that range the two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from export.diffusion.sampler import NO_CLIP, SamplerTable, table
from export.diffusion.schedule import NoiseSchedule
from export.errors import ExportError

MIN_SIGNAL = 1 / 80  # bounds the gain of the network's error at the noisiest level, 2030 in a cosine schedule of 100
TIME_SCALE = 0.1  # levels that c_skip fades over (LCM's timestep scaling, arXiv:2310.04378)
DEFAULT_TIMESTEPS = (99, 50)

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ConsistencyFunction:
    """f(x, n) = c_skip[n] * x + c_out[n] * x0hat(x, n), as float64 arrays [T + 1] over levels; f(x, 0) = x.

    In x and the network's output m, f is `f_x[n] * x + f_m[n] * m` and x0hat is `x0_x[n] * x + x0_m[n] * m`; noising is
    `signal[n] * x_0 + noise[n] * epsilon`. Index them with one level or, as tensors, with a batch of levels.
    """

    signal: Float64
    noise: Float64
    c_skip: Float64
    c_out: Float64
    x0_x: Float64
    x0_m: Float64
    clip: float

    @property
    def f_x(self) -> Float64:
        """What f takes of x, [T + 1]."""
        return self.c_skip + self.c_out * self.x0_x

    @property
    def f_m(self) -> Float64:
        """What f takes of the network's output, [T + 1]."""
        return self.c_out * self.x0_m

    def x0hat(self, x: Float64, m: Float64, level: int) -> Float64:
        """The data that the network's output m at x_level implies, not clipped; shapes as x."""
        return np.asarray(self.x0_x[level] * x + self.x0_m[level] * m)

    def __call__(self, x: Float64, m: Float64, level: int) -> Float64:
        """f(x, level), not clipped; shapes as x."""
        return np.asarray(self.f_x[level] * x + self.f_m[level] * m)


def consistency_function(
    schedule: NoiseSchedule, *, sigma_data: float = 1.0, min_signal: float = MIN_SIGNAL
) -> ConsistencyFunction:
    """The function that a student of this schedule stands for.

    c_skip and c_out are those of the sources with `sigma_data` the deviation of normalised data; `signal` is clamped at
    `min_signal`, which for a cosine schedule of 100 touches level 100 only.
    """
    if not sigma_data > 0:
        raise ExportError(f"sigma_data: expected a positive number, found {sigma_data}; 1 is the published choice")
    abar = np.concatenate([[1.0], schedule.alphas_cumprod])
    signal, noise = np.maximum(np.sqrt(abar), min_signal), np.sqrt(1 - abar)
    scaled = np.arange(len(abar)) / TIME_SCALE
    norm = scaled**2 + sigma_data**2
    gains = {  # of x and of m, in the network's prediction of x_0
        "epsilon": (1 / signal, -noise / signal),
        "sample": (np.zeros_like(signal), np.ones_like(signal)),
        "v_prediction": (signal, -noise),
    }
    x0_x, x0_m = gains[schedule.prediction_type]
    clip = schedule.clip_sample_range if schedule.clip_sample else NO_CLIP
    return ConsistencyFunction(signal, noise, sigma_data**2 / norm, scaled / np.sqrt(norm), x0_x, x0_m, clip)


def consistency(
    schedule: NoiseSchedule,
    timesteps: Sequence[int] = DEFAULT_TIMESTEPS,
    *,
    sigma_data: float = 1.0,
    min_signal: float = MIN_SIGNAL,
) -> SamplerTable:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): at each of the network's `timesteps`, descending,
    x_0 = f(x), then x = signal * x_0 + noise * (fresh noise) for the next.

    Raises ExportError for timesteps that do not descend within the schedule.
    """
    times = [int(t) for t in timesteps]
    last = schedule.num_train_timesteps - 1
    descending = all(a > b for a, b in pairwise(times))
    if not times or not descending or not 0 <= times[-1] <= times[0] <= last:
        raise ExportError(
            f"timesteps: expected numbers from {last} to 0, each below the one before, found {times}; "
            f"({last}, {last // 2 + 1}) is the usual choice"
        )
    f = consistency_function(schedule, sigma_data=sigma_data, min_signal=min_signal)
    level = np.array(times) + 1
    following = np.append(level[1:], 0)  # the last step leads to data
    return table(
        "consistency",
        "chosen",
        times,
        {
            "p_x": f.f_x[level],
            "p_m": f.f_m[level],
            "clip": f.clip,
            "k_denoised": f.signal[following],
            "k_noise": f.noise[following],
        },
    )
