"""The noise schedule that a diffusion policy was trained with: how much of the data is left at each timestep.

The importers build one from a checkpoint's config; `solvers` and `consistency` turn it into tables of steps, and
distillation noises its batches with it. The numbers are those of diffusers to the last bit (sigmoid: to the last but
one), because a policy is trained on float32 products and a schedule of better precision would be another schedule.
At timestep t of 0 .. T-1, x_t = sqrt(abar[t]) * x_0 + sqrt(1 - abar[t]) * noise (Ho et al. 2020, arXiv:2006.11239,
eq. 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from export.errors import ExportError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
MAX_COSINE_BETA = 0.999  # diffusers' cap, which is what makes the last step of squaredcos_cap_v2 finite

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A schedule under diffusers' names, as a config gives it: nothing has a default, since defaults have moved.

    Raises ExportError for a number or a name that diffusers would not take or that makes no noise.
    """

    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    prediction_type: str
    clip_sample: bool
    clip_sample_range: float

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2:
            raise ExportError(
                f"num_train_timesteps: expected at least 2, found {self.num_train_timesteps}; correct the config"
            )
        if self.beta_schedule not in BETAS:
            raise ExportError(
                f"beta_schedule: {self.beta_schedule!r} is not supported; supported are {', '.join(BETAS)}"
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise ExportError(
                f"prediction_type: {self.prediction_type!r} is not supported; "
                f"supported are {', '.join(PREDICTION_TYPES)}"
            )
        if self.beta_schedule != "squaredcos_cap_v2" and not 0 < self.beta_start <= self.beta_end < 1:
            raise ExportError(
                "beta_start and beta_end: expected 0 < beta_start <= beta_end < 1, found "
                f"{self.beta_start} and {self.beta_end}; correct the config"
            )
        if self.clip_sample and not 0 < self.clip_sample_range < math.inf:
            raise ExportError(
                f"clip_sample_range: expected a positive number, found {self.clip_sample_range}; "
                "correct the config or set clip_sample to false"
            )

    @cached_property
    def alphas_cumprod(self) -> Float32:
        """abar, float32 [T], read-only: the share of variance that is data, product of 1 - beta.

        Products are accumulated in float64 and rounded one by one, as torch does on a CPU.
        """
        alphas = np.float32(1) - BETAS[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)
        cumulative: Float32 = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        cumulative.setflags(write=False)
        return cumulative


def _line(first: float, last: float, count: int) -> Float32:
    """`count` float32 numbers from `first` to `last`, rounded as torch.linspace rounds them: each half is counted from
    its own end with a float32 step, in one fused multiply-add (which float64 reproduces)."""
    start, end = np.float32(first), np.float32(last)
    step = np.float64(np.float32((end - start) / np.float32(count - 1)))
    index = np.arange(count)
    from_start, from_end = np.float64(start) + step * index, np.float64(end) - step * (count - 1 - index)
    line: Float32 = np.where(index < count // 2, from_start, from_end).astype(np.float32)
    return line


def _scaled_linear(beta_start: float, beta_end: float, count: int) -> Float32:
    """Linear in the square root, as latent diffusion has it."""
    roots = _line(beta_start**0.5, beta_end**0.5, count)
    return roots * roots


def _cosine(_beta_start: float, _beta_end: float, count: int) -> Float32:
    """Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 17; beta_start and beta_end have no say."""

    def left(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - left((i + 1) / count) / left(i / count), MAX_COSINE_BETA) for i in range(count)]
    return np.array(betas, np.float32)


def _sigmoid(beta_start: float, beta_end: float, count: int) -> Float32:
    """A logistic curve over -6 .. 6 between the two betas (GeoDiff)."""
    rising: Float32 = (1 / (1 + np.exp(-_line(-6, 6, count).astype(np.float64)))).astype(np.float32)
    betas: Float32 = rising * np.float32(beta_end - beta_start) + np.float32(beta_start)
    return betas


BETAS: dict[str, Callable[[float, float, int], Float32]] = {
    "linear": _line,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
}
