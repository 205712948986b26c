"""Tables of steps for diffusion policies: DDPM, DDIM and DPM-Solver++ as diffusers runs them.

Export writes the table of the checkpoint's own scheduler, or of the solver that `--solver`, `--steps` and `--spacing`
name. With the same network and the same noise a table's samples are those of diffusers 0.35 within float32 rounding,
quirks included, because a bundle without options must give the numbers that the framework gives. The arithmetic on
coefficients is float32 where diffusers' is: 1 - abar[t]/abar[s] cancels so much at the end of a schedule that a better
answer would be another answer (3e-5 of normalised units over DDPM-100 with linear betas).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from export.diffusion.sampler import NO_CLIP, SamplerTable, table
from export.diffusion.schedule import NoiseSchedule
from export.errors import ExportError

SPACINGS = ("leading", "trailing", "linspace")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
# Below this half log signal-to-noise ratio DPM-Solver++ does not start: the cosine schedule's last step, where the
# prediction of x_0 is the network's error times 2030, would be in the history of the second (diffusers' documentation
# gives -5.1 for squaredcos_cap_v2).
LAMBDA_MIN = -5.1

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[np.float32]
Columns = dict[str, npt.ArrayLike]


def ddpm(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "leading",
    *,
    variance_type: str = "fixed_small",
    steps_offset: int = 0,
) -> SamplerTable:
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), eq. 7, with the step before in the list as t-1.

    Noise is drawn for every step whose timestep is not 0 and whose variance is not nothing.
    Raises ExportError for steps outside 1 .. num_train_timesteps and names that are not supported.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ExportError(
            f"variance_type: {variance_type!r} is not supported; supported are {', '.join(VARIANCE_TYPES)}"
        )
    times = timesteps(schedule, steps, spacing, steps_offset)
    abar = schedule.alphas_cumprod[times]
    abar_next = np.append(abar[1:], np.float32(1))
    alpha = abar / abar_next
    beta, noise_share, next_noise_share = 1 - alpha, 1 - abar, 1 - abar_next
    small = next_noise_share / noise_share * beta
    variance = beta if variance_type == "fixed_large" else small
    return table(
        "ddpm",
        spacing,
        times,
        _denoised(schedule, np.sqrt(abar), np.sqrt(noise_share))
        | {
            "k_denoised": np.sqrt(abar_next) * beta / noise_share,
            "k_x": np.sqrt(alpha) * next_noise_share / noise_share,
            "k_noise": np.where(times > 0, np.sqrt(variance), 0),
        },
    )


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "leading",
    *,
    set_alpha_to_one: bool = True,
    steps_offset: int = 0,
) -> SamplerTable:
    """Deterministic sampling: Song et al. 2021 (arXiv:2010.02502), eq. 12 with sigma 0.

    As in diffusers, the noise that is put back is the one predicted, not the one that a clipped x_0 would imply, and a
    step leads to t - T // steps whatever the next timestep is: where `trailing` or `linspace` puts that further down,
    the network sees samples a timestep or so noisier than it is told. The last step leads to data, or to timestep 0's
    share of it where set_alpha_to_one is false. Raises ExportError as `ddpm` does.
    """
    times = timesteps(schedule, steps, spacing, steps_offset)
    goal = times - schedule.num_train_timesteps // steps
    final = np.float32(1) if set_alpha_to_one else schedule.alphas_cumprod[0]
    abar_goal = np.where(goal >= 0, schedule.alphas_cumprod[np.maximum(goal, 0)], final)
    abar = schedule.alphas_cumprod[times]
    signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
    back = np.sqrt(1 - abar_goal)
    epsilon: dict[str, Columns] = {  # `back` times the predicted noise, in x and m
        "epsilon": {"k_m": back},
        "sample": {"k_x": back / noise, "k_m": -back * signal / noise},
        "v_prediction": {"k_x": back * noise, "k_m": back * signal},
    }
    columns = _denoised(schedule, signal, noise) | epsilon[schedule.prediction_type]
    return table("ddim", spacing, times, columns | {"k_denoised": np.sqrt(abar_goal)})


def dpmpp(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "linspace",
    *,
    lambda_min: float = LAMBDA_MIN,
    steps_offset: int = 0,
) -> SamplerTable:
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), algorithm 2, midpoint, first order at both ends.

    Equal to diffusers' DPMSolverMultistepScheduler where clip_sample is off; where it is on, ours clips the prediction
    of x_0 as DDPM and DDIM do, which diffusers never does and narrow action data needs. Timesteps whose half log
    signal-to-noise ratio is below `lambda_min` are left out. Raises ExportError as `ddpm` does, and for more steps than
    this leaves timesteps.
    """
    _check(schedule, steps, spacing)
    times = _dpmpp_timesteps(schedule, steps, spacing, lambda_min) + (steps_offset if spacing == "leading" else 0)
    if len(times) < steps or (np.diff(times) >= 0).any() or times[-1] < 0 or times[0] >= schedule.num_train_timesteps:
        raise ExportError(
            f"steps: {steps} steps of dpmpp, {spacing}, do not fit the schedule of {schedule.num_train_timesteps}; "
            "choose fewer steps or another spacing"
        )
    abar = schedule.alphas_cumprod[times].astype(np.float64)
    signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
    next_signal, next_noise = np.append(signal[1:], 1.0), np.append(noise[1:], 0.0)
    # exp(-h) of the paper is the ratio of noise-to-signal ratios, which needs no infinite lambda at the last step
    gain = next_signal - signal * next_noise / noise  # alpha_t * (1 - exp(-h))
    slope = np.zeros(steps)  # 1 / (2 r): half of the last step's h over the one's before
    if steps > 2:
        half_log_snr = np.log(signal) - np.log(noise)
        h = np.diff(half_log_snr)
        slope[1:-1] = 0.5 * h[1:] / h[:-1]
    return table(
        "dpmpp",
        spacing,
        times,
        _denoised(schedule, signal, noise)
        | {"k_denoised": gain * (1 + slope), "k_previous": -gain * slope, "k_x": next_noise / noise},
    )


def timesteps(schedule: NoiseSchedule, steps: int, spacing: str, steps_offset: int = 0) -> Ints:
    """The training timesteps that DDPM and DDIM visit, int64 [steps], descending (Lin et al. 2023, arXiv:2305.08891,
    table 2), rounded as diffusers rounds. Where its `trailing` counts one timestep too many, -1, ours leaves that out.

    Raises ExportError for steps outside 1 .. T, an unknown spacing and an offset that leaves the schedule.
    """
    _check(schedule, steps, spacing)
    trained = schedule.num_train_timesteps
    if spacing == "leading":
        times = np.arange(steps)[::-1] * (trained // steps) + steps_offset
    elif spacing == "trailing":
        times = np.arange(trained, 0, -trained / steps)[:steps].round().astype(np.int64) - 1
    else:
        times = np.linspace(0, trained - 1, steps).round()[::-1].astype(np.int64)
    if not 0 <= times[-1] <= times[0] < trained:
        raise ExportError(
            f"steps_offset: {steps_offset} moves timesteps to {times[-1]} .. {times[0]}, outside 0 .. {trained - 1}; "
            "choose fewer steps or no offset"
        )
    return times.astype(np.int64)


def _check(schedule: NoiseSchedule, steps: int, spacing: str) -> None:
    if spacing not in SPACINGS:
        raise ExportError(f"spacing: {spacing!r} is not supported; supported are {', '.join(SPACINGS)}")
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ExportError(
            f"steps: expected 1 to {schedule.num_train_timesteps}, which is how many timesteps the policy was trained "
            f"with, found {steps}"
        )


def _dpmpp_timesteps(schedule: NoiseSchedule, steps: int, spacing: str, lambda_min: float) -> Ints:
    """What DPMSolverMultistepScheduler visits: as `timesteps`, of one more step, whose last is the data."""
    abar = schedule.alphas_cumprod
    trained = len(abar)
    half_log_snr = 0.5 * (np.log(abar, dtype=np.float64) - np.log(1 - abar, dtype=np.float64))
    usable = int((half_log_snr >= lambda_min).sum())
    if spacing == "leading":
        times = np.arange(steps, 0, -1) * (usable // (steps + 1))
    elif spacing == "trailing":
        times = np.arange(usable, 0, -trained / steps)[:steps].round() - 1
    else:
        times = np.linspace(0, usable - 1, steps + 1).round()[:0:-1]
    return times.astype(np.int64)


def _denoised(schedule: NoiseSchedule, signal: npt.ArrayLike, noise: npt.ArrayLike) -> Columns:
    """p_x, p_m and clip: the prediction of x_0 from x = signal * x_0 + noise * epsilon and the network's output."""
    a, s = np.asarray(signal), np.asarray(noise)
    of: dict[str, Columns] = {
        "epsilon": {"p_x": 1 / a.astype(np.float64), "p_m": -s.astype(np.float64) / a},
        "sample": {"p_x": 0.0, "p_m": 1.0},
        "v_prediction": {"p_x": a, "p_m": -s},
    }
    return of[schedule.prediction_type] | {"clip": schedule.clip_sample_range if schedule.clip_sample else NO_CLIP}
