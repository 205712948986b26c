"""Tables of steps sample what the frameworks sample: diffusers as recorded, the two consistency models as published."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.diffusion import solvers
from export.diffusion.consistency import consistency, consistency_function
from export.diffusion.ctm import CtmSchedule, ctm, jump, told_time
from export.diffusion.sampler import COLUMNS, SamplerTable, run, table
from export.diffusion.schedule import BETAS, PREDICTION_TYPES, NoiseSchedule
from export.diffusion.solvers import SPACINGS, VARIANCE_TYPES, ddim, ddpm, dpmpp, timesteps
from export.errors import ExportError
from fixtures.record_samplers import CASES, SCHEDULES, SHAPE, Array, drawn, kept, network, start

RECORDED = np.load(Path(__file__).parent / "fixtures" / "samplers_diffusers_0_35_2.npz")
COSINE = NoiseSchedule(
    num_train_timesteps=100,
    beta_schedule="squaredcos_cap_v2",
    beta_start=1e-4,
    beta_end=0.02,
    prediction_type="epsilon",
    clip_sample=True,
    clip_sample_range=1.0,
)
TOLD_AS = {"timestep_spacing": "spacing", "lambda_min_clipped": "lambda_min"}  # diffusers' name: ours


def of_case(entry: dict[str, Any]) -> SamplerTable:
    """Our table for a recorded case."""
    options = {TOLD_AS.get(name, name): value for name, value in entry["options"].items()}
    solver = getattr(solvers, entry["solver"])
    made: SamplerTable = solver(replace(COSINE, **entry["schedule"]), entry["steps"], **options)
    return made


def sampled(sampler: SamplerTable, x: Array | None = None) -> Array:
    """x after every step with the stand-in network and the recorder's noise."""
    first = start() if x is None else x
    return run(sampler, lambda seen, time: network(seen, float(np.sum(time))), first, drawn(sampler.steps))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_the_bits_of_diffusers(name: str) -> None:
    ours = replace(COSINE, **SCHEDULES[name]).alphas_cumprod
    if name == "sigmoid":  # whose exponential torch rounds in its own way
        np.testing.assert_array_max_ulp(ours, RECORDED[f"{name}/alphas_cumprod"], 2)
    else:
        np.testing.assert_array_equal(ours, RECORDED[f"{name}/alphas_cumprod"])


@pytest.mark.parametrize("name", CASES)
def test_every_step_gives_the_sample_that_diffusers_gives(name: str) -> None:
    xs = sampled(of_case(CASES[name]))
    theirs = RECORDED[name]
    scale = max(1.0, float(np.abs(theirs).max()))  # unclipped, a network that is no predictor leads far out
    np.testing.assert_allclose(xs[kept(len(xs))], theirs, rtol=0, atol=3e-6 * scale)


def test_the_recorded_cases_tell_the_solvers_options_apart() -> None:
    ends = {name: RECORDED[name][-1] for name in CASES}
    same = {("ddpm_100", "ddpm_100_small_log"), ("ddpm_100_sample", "ddpm_100_unclipped")}  # the network stays within 1
    same |= {("ddim_10_sample", "ddim_10_unclipped")}
    names = list(CASES)
    alike = {(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if np.abs(ends[a] - ends[b]).max() < 1e-5}
    assert alike <= same


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize(("solver", "steps", "bound"), [("ddpm", 100, 1e-6), ("ddim", 10, 1e-5), ("ddim", 2, 1e-4)])
def test_rows_in_float32_are_as_good_as_the_formulas(
    solver: str, steps: int, bound: float, beta_schedule: str, clip_sample: bool
) -> None:
    """p_x is 2030 at timestep 99, where x - s*m cancels: what the row form adds to float32's own error stays small,
    with a network that predicts the data to 5 %."""
    schedule = replace(COSINE, beta_schedule=beta_schedule, clip_sample=clip_sample)
    made = ddpm(schedule, steps) if solver == "ddpm" else ddim(schedule, steps, "trailing")
    random = np.random.RandomState(0)
    data = random.uniform(-1, 1, (16, 7))
    signal, noise = np.sqrt(schedule.alphas_cumprod, dtype=np.float64), np.sqrt(1.0 - schedule.alphas_cumprod)

    def predict(x: Any, time: Any) -> Any:
        t = int(time)
        found = data + 0.05 * np.tanh(3 * x.astype(np.float64) + 0.01 * t)
        return ((x - signal[t] * found) / noise[t]).astype(x.dtype)

    x = random.standard_normal((16, 7)).astype(np.float32)
    step_noise = random.standard_normal((steps, 16, 7)).astype(np.float32)
    ours = run(made, predict, x, step_noise)[-1]
    exact = x.astype(np.float64)
    for i, t in enumerate(made.times.astype(int)):
        m = predict(exact, t)
        denoised = (exact - noise[t] * m) / signal[t]
        denoised = np.clip(denoised, -1, 1) if clip_sample else denoised
        row = dict(zip(COLUMNS, made.coefficients[i].astype(np.float64), strict=True))
        exact = row["k_denoised"] * denoised + row["k_x"] * exact + row["k_m"] * m + row["k_noise"] * step_noise[i]
    assert np.abs(ours - exact).max() < bound


def test_ddpm_draws_noise_at_every_step_but_the_last() -> None:
    drawn_at = ddpm(COSINE, 100).column("k_noise") > 0
    assert drawn_at[:-1].all()
    assert not drawn_at[-1]
    assert not ddim(COSINE, 10).draws_noise


def test_a_network_that_knows_the_data_is_led_to_it_by_every_solver() -> None:
    data = np.array([[0.3, -0.9], [0.0, 1.0], [-0.5, 0.2]], np.float32)
    abar = COSINE.alphas_cumprod.astype(np.float64)

    def knows(x: Array, time: Any) -> Array:
        t = int(time)
        return ((x - np.sqrt(abar[t]) * data) / np.sqrt(1 - abar[t])).astype(np.float32)

    for made in (ddpm(COSINE, 100), ddim(COSINE, 10), ddim(COSINE, 4, "trailing"), dpmpp(COSINE, 5)):
        np.testing.assert_allclose(run(made, knows, start(), drawn(made.steps))[-1], data, atol=1e-4)


def test_dpmpp_clips_its_predictions_where_the_schedule_clips() -> None:
    far = sampled(dpmpp(replace(COSINE, clip_sample=False), 10))[-1]
    near = sampled(dpmpp(COSINE, 10))[-1]
    assert np.abs(far).max() > 10
    assert np.abs(near).max() <= 1


@pytest.mark.parametrize(("trained", "steps"), [(100, 29), (100, 31), (1000, 49)])
def test_trailing_never_visits_a_timestep_before_the_first(trained: int, steps: int) -> None:
    """diffusers' arange gives steps + 1 timesteps here, the last -1."""
    times = timesteps(replace(COSINE, num_train_timesteps=trained), steps, "trailing")
    assert len(times) == steps
    assert times[0] == trained - 1
    assert times[-1] >= 0


@given(
    solver=st.sampled_from(["ddpm", "ddim", "dpmpp"]),
    steps=st.integers(1, 130),
    trained=st.integers(2, 130),
    spacing=st.sampled_from(SPACINGS),
    beta_schedule=st.sampled_from(sorted(BETAS)),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    offset=st.integers(0, 2),
)
def test_a_table_is_finite_and_descends_or_is_refused(
    solver: str, steps: int, trained: int, spacing: str, beta_schedule: str, prediction_type: str, offset: int
) -> None:
    schedule = replace(
        COSINE, num_train_timesteps=trained, beta_schedule=beta_schedule, prediction_type=prediction_type
    )
    try:
        made = getattr(solvers, solver)(schedule, steps, spacing, steps_offset=offset)
    except ExportError:
        assert steps > trained or offset or solver == "dpmpp"
        return
    assert made.steps == steps
    assert np.isfinite(made.coefficients).all()
    assert (np.diff(made.times) < 0).all()
    assert 0 <= made.times[-1] <= made.times[0] < trained
    assert np.isfinite(sampled(made)).all()


# --- consistency models of a diffusion teacher (Song et al. 2023) -----------------------------------------------------


def published_f(x: Any, eps: Any, n: int) -> Any:
    """f as the source has it, for n in 1 .. 100, from the schedule alone."""
    abar = float(COSINE.alphas_cumprod[n - 1])
    alpha, sigma = max(math.sqrt(abar), 1 / 80), math.sqrt(1 - abar)
    c_skip = 1 / ((n / 0.1) ** 2 + 1)
    c_out = (n / 0.1) / math.sqrt((n / 0.1) ** 2 + 1)
    return c_skip * x + c_out * (x - sigma * eps) / alpha


@pytest.mark.parametrize("chosen", [(99,), (99, 50), (99, 60, 30, 5), (98, 0)])
def test_consistency_sampling_is_the_published_algorithm(chosen: tuple[int, ...]) -> None:
    x, noise, expected = start().astype(np.float64), drawn(len(chosen)), []
    for i, t in enumerate(chosen):
        x = np.clip(published_f(x, network(x.astype(np.float32), t), t + 1), -1, 1)
        if i + 1 < len(chosen):
            abar = float(COSINE.alphas_cumprod[chosen[i + 1]])
            x = math.sqrt(abar) * x + math.sqrt(1 - abar) * noise[i]
        expected.append(x)
    made = consistency(COSINE, chosen)
    np.testing.assert_allclose(sampled(made), expected, atol=2e-5)
    assert made.draws_noise == (len(chosen) > 1)
    assert made.column("k_noise")[-1] == 0


def test_what_is_trained_is_what_is_sampled() -> None:
    f = consistency_function(COSINE)
    x, m = start().astype(np.float64), network(start(), 50.0).astype(np.float64)
    row = dict(zip(COLUMNS, consistency(COSINE, (50,)).coefficients[0], strict=True))
    np.testing.assert_allclose(row["p_x"] * x + row["p_m"] * m, f(x, m, 51), atol=1e-6)
    np.testing.assert_allclose(f(x, m, 51), published_f(x, m, 51), atol=1e-6)
    np.testing.assert_allclose(f.c_skip[51] * x + f.c_out[51] * f.x0hat(x, m, 51), f(x, m, 51), atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_f_at_level_0_is_its_argument(prediction_type: str) -> None:
    f = consistency_function(replace(COSINE, prediction_type=prediction_type))
    np.testing.assert_array_equal(f(start(), np.full(SHAPE, 7.0), 0), start())
    assert (f.signal[0], f.noise[0]) == (1, 0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_f_of_a_perfect_prediction_is_the_data_but_for_c_skip(prediction_type: str) -> None:
    f = consistency_function(replace(COSINE, prediction_type=prediction_type))
    data, eps = np.array(0.4), np.array(-1.3)
    for level in (1, 50, 99):
        a, s = f.signal[level], f.noise[level]
        m = {"epsilon": eps, "sample": data, "v_prediction": a * eps - s * data}[prediction_type]
        np.testing.assert_allclose(f.x0hat(a * data + s * eps, m, level), data, atol=1e-9)
        assert abs(f(a * data + s * eps, m, level) - data) < 1.1 * f.c_skip[level] + (1 - f.c_out[level])


def test_the_clamp_of_the_signal_touches_the_noisiest_level_only() -> None:
    f = consistency_function(COSINE)
    assert f.x0_x[100] == 80
    assert math.isclose(f.x0_x[99], 1 / math.sqrt(COSINE.alphas_cumprod[98]))


# --- Consistency Policy's trajectory model ----------------------------------------------------------------------------


def published_g(x: Any, t: float, s: float, m_of: Any) -> Any:
    """CTM with the published constants: x, t, s and the network's output as a function of (c_in * x, t, s)."""
    c_skip = 0.25 / ((t - 0.02) ** 2 + 0.25)
    c_out = (t - 0.02) * 0.5 / math.sqrt(t**2 + 0.25)
    g = c_out * m_of(x / math.sqrt(t**2 + 0.25), 250 * math.log(t), 250 * math.log(s)) + c_skip * x
    return np.clip(s / t * x + (1 - s / t) * g, -1, 1)


@pytest.mark.parametrize(
    ("chaining", "reading", "levels"),
    [((), "sigma", []), ((27, 54), "sigma", [27, 54]), ((27, 54), "bins", [12.0148, 0.88502])],
)
def test_ctm_is_the_published_student(chaining: tuple[float, ...], reading: str, levels: list[float]) -> None:
    def m_of(seen: Any, t: Any, s: Any) -> Any:
        return np.tanh(0.7 * seen * 20 + 0.001 * t + 0.0005 * s)

    made = ctm(chaining, reading=reading)
    ours = run(made, lambda seen, time: m_of(seen, *time).astype(np.float32), start(), drawn(made.steps))
    x, expected = start().astype(np.float64), []
    ts = [80.0, *levels]
    for i, t in enumerate(ts):
        x = published_g(x, t, 0.02, m_of)
        if i + 1 < len(ts):
            x = x + ts[i + 1] * drawn(len(ts))[i]
        expected.append(x)
    np.testing.assert_allclose(ours[-1], expected[-1], atol=2e-5)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)
    assert made.times.shape == (len(ts), 2)
    assert made.initial_scale == 1


def test_ctm_has_the_published_numbers() -> None:
    row = dict(zip(COLUMNS, ctm().coefficients[0], strict=True))
    assert row["c_in"] == pytest.approx(0.0125, rel=1e-3)
    assert row["clip"] == 1
    c_skip, c_out, _ = CtmSchedule().scalings(80.0)
    assert (float(c_skip), float(c_out)) == pytest.approx((3.9e-5, 0.49987), rel=3e-3)
    np.testing.assert_allclose(ctm().times, [[1095.51, -978.01]], atol=0.005)
    np.testing.assert_allclose(CtmSchedule().sigma([0, 27, 54, 79]), [80, 12.015, 0.885, 0.02], atol=5e-4)


@given(t=st.floats(0.02, 80), s=st.floats(0.02, 80))
def test_a_jump_to_where_one_is_changes_nothing(t: float, s: float) -> None:
    schedule = CtmSchedule()
    of_x, of_m, _ = jump(schedule, t, t)
    assert (float(of_x), float(of_m)) == pytest.approx((1, 0))
    of_x, of_m, _ = jump(schedule, 0.02, s)  # c_skip 1, c_out 0: nothing is denoised below time_min
    assert (float(of_x), float(of_m)) == pytest.approx((1, 0))


def test_without_the_boundary_scaling_is_that_of_the_teacher() -> None:
    c_skip, c_out, c_in = CtmSchedule(scaling="no_boundary").scalings(0.02)
    assert float(c_skip) == pytest.approx(0.25 / 0.2504)
    assert float(c_out) == pytest.approx(0.01 / math.sqrt(0.2504))
    assert float(c_in) == pytest.approx(1 / math.sqrt(0.2504))


def test_told_times_are_float32_numbers() -> None:
    times = told_time([80.0, 12.015, 0.02])
    np.testing.assert_array_equal(times, times.astype(np.float32))
    np.testing.assert_allclose(times, 250 * np.log([80.0, 12.015, 0.02]), rtol=2e-7)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [ddpm, ddim, dpmpp])
@pytest.mark.parametrize("steps", [-1, 0, 101])
def test_more_steps_than_were_trained_and_none_are_refused(solver: Any, steps: int) -> None:
    with pytest.raises(ExportError, match=f"expected 1 to 100, .* found {steps}"):
        solver(COSINE, steps)


@pytest.mark.parametrize("solver", [ddpm, ddim, dpmpp])
def test_an_unknown_spacing_is_refused(solver: Any) -> None:
    with pytest.raises(ExportError, match="'karras' is not supported; supported are leading, trailing, linspace"):
        solver(COSINE, 10, "karras")


@pytest.mark.parametrize("variance_type", ["learned", "fixed_large_log"])
def test_an_unknown_variance_is_refused(variance_type: str) -> None:
    with pytest.raises(ExportError, match=f"'{variance_type}' is not supported; supported are {VARIANCE_TYPES[0]}"):
        ddpm(COSINE, 10, variance_type=variance_type)


def test_an_offset_out_of_the_schedule_is_refused() -> None:
    with pytest.raises(ExportError, match=r"steps_offset: 1 moves timesteps to 1 \.\. 100, outside 0 \.\. 99"):
        ddim(COSINE, 100, steps_offset=1)


@pytest.mark.parametrize(("steps", "spacing"), [(100, "linspace"), (99, "leading"), (100, "trailing")])
def test_more_steps_than_dpmpp_has_timesteps_are_refused(steps: int, spacing: str) -> None:
    with pytest.raises(ExportError, match=f"{steps} steps of dpmpp, {spacing}, do not fit"):
        dpmpp(COSINE, steps, spacing)


@pytest.mark.parametrize("chosen", [(), (100,), (50, 99), (50, 50), (99, -1)])
def test_timesteps_of_a_student_must_descend_within_the_schedule(chosen: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match="expected numbers from 99 to 0, each below the one before"):
        consistency(COSINE, chosen)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps: expected at least 2, found 0"),
        ({"beta_schedule": "exp"}, "'exp' is not supported; supported are linear"),
        ({"prediction_type": "flow"}, "'flow' is not supported; supported are epsilon"),
        (
            {"beta_schedule": "linear", "beta_end": 1.5},
            r"expected 0 < beta_start <= beta_end < 1, found 0.0001 and 1.5",
        ),
        ({"clip_sample_range": float("nan")}, "clip_sample_range: expected a positive number, found nan"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        replace(COSINE, **change)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"reading": "steps"}, "'steps' is not supported; supported are sigma, bins"),
        ({"chaining": [27, 80], "reading": "bins"}, r"expected bins from 0 to 79, found \[80\]"),
        ({"chaining": [0.0]}, r"expected sigma from 0.02 to 80.0, found \[0.0\]"),
    ],
)
def test_chaining_times_outside_the_schedule_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        ctm(**arguments)


def test_a_table_with_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ExportError, match="sampler ddim: row 1 holds a number that is not finite"):
        table("ddim", "leading", [9, 0], {"k_x": [1.0, math.nan]})


def test_a_sampler_that_draws_noise_asks_for_it() -> None:
    with pytest.raises(ExportError, match=r"sampler ddpm draws noise in between: give step_noise"):
        run(ddpm(COSINE, 2), lambda x, _: x, start())
