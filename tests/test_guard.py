"""The guard: whatever comes in, what goes out is finite, inside the limits, and never faster than allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from firmware_bridge.guard import Guard, GuardLimits, Intervention

DT = 1 / 60
SPEED, ACCELERATION = 120.0, 600.0
LIMITS = GuardLimits(
    position_min=np.array([-100.0, 0.0]),
    position_max=np.array([100.0, 100.0]),
    max_speed=np.array([SPEED, 200.0]),
    max_acceleration=np.array([ACCELERATION, 1000.0]),
)


def guard_at(*position: float) -> Guard:
    guard = Guard(("pan", "gripper"), LIMITS, DT)
    guard.rest_at(np.array(position))
    return guard


def test_a_request_within_the_limits_passes_unchanged() -> None:
    guard = guard_at(0.0, 50.0)
    for tick in range(1, 200):
        t = tick * DT
        request = np.array([20 * (1 - np.cos(1.5 * t)), 50 + 10 * (1 - np.cos(2 * t))])
        assert_allclose(guard.limit(request), request, atol=1e-9)
        assert guard.interventions is Intervention.NONE


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-150, 150)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.tuples(numbers, numbers), min_size=1, max_size=80))
def test_whatever_is_asked_for_the_goal_keeps_every_limit(requests: list[tuple[float, float] | None]) -> None:
    guard = guard_at(95.0, 3.0)
    goal, velocity = guard.goal, guard.velocity
    for request in requests:
        after = guard.limit(None if request is None else np.array(request))
        assert np.isfinite(after).all()
        assert (after >= LIMITS.position_min - 1e-9).all() and (after <= LIMITS.position_max + 1e-9).all()
        now = (after - goal) / DT
        assert (np.abs(now) <= LIMITS.max_speed * (1 + 1e-9) + 1e-9).all()
        assert (np.abs(now - velocity) <= LIMITS.max_acceleration * DT * (1 + 1e-6) + 1e-6).all()
        goal, velocity = after, now


def test_a_distant_request_is_reached_without_overshoot_and_then_passes() -> None:
    guard = guard_at(0.0, 0.0)
    goals = np.array([guard.limit(np.array([80.0, 90.0])) for _ in range(120)])
    assert (np.diff(goals, axis=0) >= -1e-9).all(), "no overshoot"
    assert_allclose(goals[-1], [80.0, 90.0], atol=1e-6)
    assert guard.interventions is Intervention.NONE


def test_without_a_request_it_decelerates_at_the_limit_and_holds() -> None:
    guard = guard_at(0.0, 50.0)
    for tick in range(1, 40):
        guard.limit(np.array([100.0 * tick * DT, 50.0]))
    moving = guard.velocity[0]
    assert moving > 90
    goals = [guard.limit(None)[0] for _ in range(30)]
    assert guard.interventions is Intervention.STALE
    steps_to_stop = int(np.ceil(moving / (ACCELERATION * DT)))
    assert np.ptp(goals[steps_to_stop:]) == pytest.approx(0.0, abs=1e-9)


def test_a_request_that_is_not_finite_is_no_request() -> None:
    guard = guard_at(10.0, 50.0)
    assert_allclose(guard.limit(np.array([np.nan, 60.0])), [10.0, 50.0])
    assert Intervention.NOT_FINITE in guard.interventions


def test_a_request_outside_the_position_limits_stops_at_them() -> None:
    guard = guard_at(90.0, 50.0)
    for _ in range(100):
        goal = guard.limit(np.array([300.0, 50.0]))
    assert goal[0] == pytest.approx(100.0)
    assert Intervention.POSITION in guard.interventions


def test_an_arm_outside_its_limits_may_only_move_inwards() -> None:
    guard = guard_at(120.0, 50.0)
    goals = [guard.limit(np.array([130.0, 50.0]))[0] for _ in range(5)]
    assert max(goals) <= 120.0
    for _ in range(200):
        goal = guard.limit(np.array([50.0, 50.0]))
    assert goal[0] == pytest.approx(50.0)


def healthy() -> dict[str, np.ndarray]:
    return {
        "position": np.array([0.0, 50.0]),
        "load": np.zeros(2),
        "temperature_c": np.full(2, 30.0),
        "voltage_v": np.full(2, 7.4),
        "error": np.zeros(2, np.uint8),
        "valid": np.ones(2, bool),
    }


def first_fault(guard: Guard, readings: Callable[[int], dict[str, np.ndarray]], seconds: float) -> tuple[float, str]:
    """When a fault comes, in s from the first reading, and its sentence."""
    for tick in range(round(seconds / DT)):
        reason = guard.check(round(tick * DT * 1e9), **readings(tick))
        if reason is not None:
            return tick * DT, reason
    return float("inf"), ""


CONDITIONS = [
    ("valid", False, LIMITS.silent_s, "no answer"),
    ("error", 32, LIMITS.error_s, "overload"),
    ("temperature_c", 80.0, LIMITS.error_s, "80 C"),
    ("voltage_v", 3.0, LIMITS.error_s, "3.0 V"),
    ("load", -0.97, LIMITS.load_s, "load 97%"),
    ("position", 95.0, LIMITS.follow_s, "its goal 50.0"),
]


@pytest.mark.parametrize(("field", "value", "lasting_s", "says"), CONDITIONS)
def test_a_condition_that_lasts_is_a_fault_and_a_short_one_is_not(
    field: str, value: float, lasting_s: float, says: str
) -> None:
    def bad(tick: int) -> dict[str, np.ndarray]:
        reading = healthy()
        reading[field][1] = value
        return reading

    after, reason = first_fault(guard_at(0.0, 50.0), bad, 3.0)
    assert lasting_s - 1e-6 <= after <= lasting_s + 2 * DT
    assert reason.startswith("gripper: ") and says in reason
    short = round(0.8 * lasting_s / DT)
    after, _ = first_fault(
        guard_at(0.0, 50.0), lambda tick: healthy() if tick % (5 * short) > short else bad(tick), 3.0
    )
    assert after == float("inf")


@pytest.mark.parametrize(("field", "value", "lasting_s", "says"), CONDITIONS[1:])
def test_lost_replies_hide_no_fault(field: str, value: float, lasting_s: float, says: str) -> None:
    rng = np.random.default_rng(0)

    def bad(tick: int) -> dict[str, np.ndarray]:
        reading = healthy()
        if rng.random() < 0.1:
            reading["valid"][1] = False
        else:
            reading[field][1] = value
        return reading

    after, reason = first_fault(guard_at(0.0, 50.0), bad, 5.0)
    assert after <= lasting_s + 10 * DT
    assert says in reason


def test_a_servo_that_loses_too_many_replies_is_a_fault_and_one_that_loses_a_few_is_not() -> None:
    def losing(part: float) -> Callable[[int], dict[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        return lambda _: healthy() | {"valid": np.array([True, rng.random() >= part])}

    assert first_fault(guard_at(0.0, 50.0), losing(0.05), 60.0)[0] == float("inf")
    after, reason = first_fault(guard_at(0.0, 50.0), losing(0.5), 60.0)
    assert after < 10
    assert "gripper: " in reason and "cable" in reason


def test_a_joint_that_grips_may_push_and_need_not_reach_its_goal() -> None:
    limits = replace(LIMITS, grips=np.array([False, True]))

    def gripping() -> Guard:
        guard = Guard(("pan", "gripper"), limits, DT)
        guard.rest_at(np.array([0.0, 5.0]))
        return guard

    squeezing = healthy() | {
        "position": np.array([0.0, 60.0]),
        "load": np.array([0.0, 1.0]),
        "error": np.array([0, 32], np.uint8),
    }
    assert first_fault(gripping(), lambda _: squeezing, 5.0)[0] == float("inf")
    hot = squeezing | {"temperature_c": np.array([30.0, 80.0])}
    assert "80 C" in first_fault(gripping(), lambda _: hot, 5.0)[1]


def test_a_limp_arm_need_not_follow_its_goal() -> None:
    guard = guard_at(0.0, 50.0)
    reading = healthy()
    reading["position"][0] = 90.0
    assert all(guard.check(t * 10**9, **reading, torque_on=False) is None for t in range(5))


def test_while_a_servo_does_not_answer_the_arm_holds_and_the_servo_gets_no_goals() -> None:
    guard = guard_at(0.0, 50.0)
    silent = healthy() | {"valid": np.array([False, True])}
    answering = []
    for tick in range(30):
        guard.check(round(tick * DT * 1e9), **(silent if tick >= 10 else healthy()))
        guard.limit(np.array([tick * DT * 30.0, 50.0]))
        answering.append(bool(guard.answering[0]))
    assert answering.index(False) - 10 <= LIMITS.trust_s / DT + 1
    assert Intervention.SILENT in guard.interventions
    assert not guard.velocity.any()


def test_a_servo_that_answers_again_starts_from_where_it_is() -> None:
    """Power cut and moved by hand meanwhile: no goal may drag it back."""
    guard = guard_at(0.0, 50.0)
    for tick in range(20):
        guard.check(round(tick * DT * 1e9), **(healthy() if tick == 0 else healthy() | {"valid": np.zeros(2, bool)}))
        guard.limit(np.array([0.0, 50.0]))
    moved = healthy() | {"position": np.array([80.0, 20.0])}
    guard.check(round(20 * DT * 1e9), **moved)
    assert guard.returned.all()
    assert_allclose(guard.goal, [80.0, 20.0])
    guard.check(round(21 * DT * 1e9), **moved)
    assert not guard.returned.any()


def test_a_goal_does_not_run_away_from_a_joint_that_is_held_fast() -> None:
    guard = guard_at(0.0, 50.0)
    for tick in range(60):
        guard.check(round(tick * DT * 1e9), **healthy())
        goal = guard.limit(np.array([90.0, 50.0]))
    assert goal[0] == pytest.approx(1.2 * LIMITS.follow_error)
    assert Intervention.LEASH in guard.interventions
