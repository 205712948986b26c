"""What the arm does in each tick, with plain values and injected times: no bus, no clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from device.config import VIRTUAL_CELL, load_cell
from device.controller import Controller
from device.ensemble import ChunkEnsemble
from device.messages import Mode, joints_dtype

PERIOD = round(1e9 / 60)
DT = round(1e9 / 30)
STALENESS = 300_000_000
HOME = np.array([0.0, -35.0, 20.0, 85.0, 0.0, 18.0])


def make(with_policy: bool = True) -> Controller:
    ensemble = ChunkEnsemble(6, 30, staleness_ns=STALENESS) if with_policy else None
    controller = Controller(load_cell(VIRTUAL_CELL), ensemble)
    controller.guard.rest_at(HOME)
    return controller


def reading(position: np.ndarray = HOME, silent: list[int] | None = None) -> Any:
    record = np.zeros((), joints_dtype(6))
    record["position"] = position
    record["voltage_v"] = 7.4
    record["temperature_c"] = 30
    record["valid"] = 1
    record["valid"][silent or []] = 0
    return record


def live(controller: Controller, ticks: range, **what: Any) -> Any:
    """Ticks with the same reading; returns the last decision."""
    for tick in ticks:
        controller.observe(tick * PERIOD, reading(**what))
        decision = controller.step(tick * PERIOD)
    return decision


def feed(controller: Controller, t_ns: int, actions: np.ndarray) -> None:
    assert controller.ensemble is not None
    assert controller.ensemble.add(t_ns, t_ns, DT, actions)


def ask(controller: Controller, verb: str, t_ns: int = 0, **fields: Any) -> dict[str, Any]:
    return controller.request({"verb": verb, **fields}, t_ns)


def ramp(start: np.ndarray, speed: float) -> np.ndarray:
    """A chunk that moves shoulder_pan at `speed` deg/s."""
    actions = np.tile(start, (30, 1))
    actions[:, 0] += speed * np.arange(30) / 30
    return actions


def test_at_start_the_arm_is_idle_and_holds() -> None:
    controller = make()
    for tick in range(10):
        decision = controller.step(tick * PERIOD)
        np.testing.assert_allclose(decision.goal, HOME)
        assert decision.holding


def test_in_policy_mode_it_follows_the_chunks() -> None:
    controller = make()
    assert ask(controller, "mode", mode="policy")["ok"]
    feed(controller, 0, ramp(HOME, 10.0))
    for tick in range(15):
        decision = controller.step(tick * PERIOD)
    assert not decision.holding
    assert decision.goal is not None and decision.goal[0] == pytest.approx(10.0 * 14 / 60, abs=0.02)


def test_when_chunks_stop_it_decelerates_and_holds_within_a_tick_of_the_limit_and_goes_on_when_they_return() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    feed(controller, 0, ramp(HOME, 60.0))
    goals, holding = [], []
    for tick in range(40):
        decision = controller.step(tick * PERIOD)
        assert decision.goal is not None
        goals.append(decision.goal[0])
        holding.append(decision.holding)
    first = holding.index(True)
    assert first * PERIOD - STALENESS <= PERIOD
    assert all(holding[first:])
    steps = np.diff(goals)
    limit = 900 * (1 / 60) ** 2  # deg a tick, a tick: the joint's acceleration
    assert np.abs(np.diff(steps)[first - 2 :]).max() <= limit + 1e-9, "no harder than the joint may brake"
    assert abs(steps[-1]) < 1e-9, "and then it stands"
    assert controller.holds == 1
    feed(controller, 40 * PERIOD, np.tile(np.array(goals[-1:] + list(HOME[1:])), (30, 1)))
    assert not controller.step(40 * PERIOD).holding


def test_leaving_and_entering_policy_mode_forgets_old_chunks() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    feed(controller, 0, ramp(HOME, 10.0))
    ask(controller, "mode", mode="idle")
    ask(controller, "mode", mode="policy")
    assert controller.step(PERIOD).holding


def test_without_a_policy_the_mode_is_refused() -> None:
    answer = ask(make(with_policy=False), "mode", mode="policy")
    assert not answer["ok"] and "no policy" in answer["why"]


def test_home_moves_smoothly_and_ends_there() -> None:
    controller = make()
    controller.guard.rest_at(HOME + 30.0)
    answer = ask(controller, "home")
    ticks = int(answer["seconds"] * 60) + 5
    goals = np.array([controller.step(tick * PERIOD).goal for tick in range(ticks)])
    np.testing.assert_allclose(goals[-1][:5], HOME[:5], atol=1e-6)
    assert np.abs(np.diff(goals[:, :5], axis=0)).max() * 60 < 150


@pytest.mark.parametrize("joints", [{"claw": 1.0}, {"gripper": "open"}, {"gripper": float("nan")}])
def test_a_move_to_nowhere_is_refused(joints: dict[str, Any]) -> None:
    answer = ask(make(), "move", joints=joints)
    assert not answer["ok"] and "is not a joint's position" in answer["why"]


def test_moves_are_refused_while_the_policy_runs() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    assert "need mode idle" in ask(controller, "home")["why"]


def test_an_unknown_request_is_refused() -> None:
    assert "is not a request" in ask(make(), "dance")["why"]


def test_idle_stops_a_move_and_so_does_stop() -> None:
    for words in ({"verb": "mode", "mode": "idle"}, {"verb": "stop"}):
        controller = make()
        ask(controller, "move", joints={"shoulder_pan": 60.0})
        for tick in range(40):
            controller.step(tick * PERIOD)
        assert controller.guard.velocity[0] > 5
        assert controller.request(words, 40 * PERIOD)["ok"]
        for tick in range(40, 80):
            decision = controller.step(tick * PERIOD)
        assert controller.at_rest
        assert decision.goal[0] < 30


def test_stop_ends_the_policy_and_leaves_a_limp_arm_limp() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    assert ask(controller, "stop")["mode"] == "idle"
    ask(controller, "mode", mode="limp")
    assert ask(controller, "stop")["mode"] == "limp"


@pytest.mark.parametrize(
    "joints", [None, [], {}, "gripper", {"gripper": True}, {"gripper": 10**400}, {"gripper": float("inf")}]
)
def test_a_move_that_makes_no_sense_is_refused_and_the_loop_goes_on(joints: Any) -> None:
    controller = make()
    assert not ask(controller, "move", joints=joints)["ok"]
    np.testing.assert_allclose(controller.step(0).goal, HOME)


def test_a_limp_arm_gets_no_goals_and_holds_where_it_was_put() -> None:
    controller = make()
    ask(controller, "mode", mode="limp")
    assert not controller.torque_on
    assert not live(controller, range(5)).to.any()
    elsewhere = HOME + 12.0
    live(controller, range(5, 10), position=elsewhere)
    assert ask(controller, "mode", mode="idle")["ok"]
    decision = controller.step(10 * PERIOD)
    np.testing.assert_allclose(decision.goal, elsewhere)
    assert decision.to.all() and controller.torque_on


def test_a_limp_arm_with_a_silent_servo_stays_limp() -> None:
    controller = make()
    ask(controller, "mode", mode="limp")
    live(controller, range(10), silent=[3])
    assert "does not answer" in ask(controller, "mode", mode="idle")["why"]
    assert not controller.step(10 * PERIOD).to.any()


def test_a_fault_of_a_limp_arm_leaves_it_limp() -> None:
    """Somebody has the arm in hand: a loose cable must not stiffen it."""
    controller = make()
    ask(controller, "mode", mode="limp")
    assert not live(controller, range(60), silent=[2]).to.any()
    assert controller.mode is Mode.FAULT
    assert not controller.torque_on
    elsewhere = HOME + 20.0
    live(controller, range(60, 90), position=elsewhere)
    assert ask(controller, "mode", mode="reset")["ok"]
    decision = live(controller, range(90, 95), position=elsewhere)
    np.testing.assert_allclose(decision.goal, elsewhere)
    assert decision.to.all()


def test_a_person_can_free_an_arm_whose_fault_lasts() -> None:
    controller = make()
    live(controller, range(60), silent=[2])
    assert "still so" in ask(controller, "mode", mode="reset")["why"]
    assert ask(controller, "mode", mode="limp")["ok"]
    assert not live(controller, range(60, 70), silent=[2]).to.any()


def test_a_silent_servo_leads_to_fault_and_only_a_reset_leads_out() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    decision = live(controller, range(40), silent=[2])
    assert controller.mode is Mode.FAULT
    assert controller.fault == "elbow_flex: no answer for 0.5 s: check its cable and power"
    assert decision.holding
    assert decision.to.tolist() == [True, True, False, True, True, True]
    assert "in fault" in ask(controller, "mode", mode="policy")["why"]
    assert "still so" in ask(controller, "mode", mode="reset")["why"]
    live(controller, range(40, 42))
    assert ask(controller, "mode", mode="reset")["ok"]
    assert (controller.mode, controller.fault) == (Mode.IDLE, None)
    assert controller.step(42 * PERIOD).to.all()


def test_power_that_comes_back_stiffens_nothing_before_the_reset_and_then_holds_where_the_arm_is() -> None:
    """An emergency stop that cuts the servos' power while the adapter lives: they come back limp, and moved by hand."""
    controller = make()
    live(controller, range(120), silent=[0, 1, 2, 3, 4, 5])
    assert controller.mode is Mode.FAULT
    assert controller.fault == "no servo answers: check the arm's power and the bus"
    moved = HOME + np.array([80.0, 20.0, -30.0, -60.0, 40.0, 30.0])
    assert not live(controller, range(120, 180), position=moved).to.any()
    assert ask(controller, "mode", mode="reset")["ok"]
    decision = live(controller, range(180, 185), position=moved)
    np.testing.assert_allclose(decision.goal, moved)
    assert decision.to.all()


def test_a_blink_of_the_arms_power_ends_the_policy() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    live(controller, range(10))
    live(controller, range(10, 22), silent=[0, 1, 2, 3, 4, 5])
    live(controller, range(22, 30))
    assert controller.mode is Mode.FAULT


def test_a_limp_arm_in_fault_may_be_put_anywhere_before_the_reset() -> None:
    controller = make()
    live(controller, range(60), silent=[1])
    for tick in range(60, 200):
        moved = HOME + np.array([0.0, min(tick - 60, 60), 0, 0, 0, 0])
        live(controller, range(tick, tick + 1), position=moved)
    assert ask(controller, "mode", mode="reset")["ok"], controller.fault
    np.testing.assert_allclose(controller.step(200 * PERIOD).goal, moved)


def test_in_fault_a_joint_that_gives_up_by_itself_gets_no_more_goals() -> None:
    controller = make()
    live(controller, range(60), silent=[0])
    sagging = HOME + np.array([0.0, 40.0, 0, 0, 0, 0])
    decision = live(controller, range(60, 70), position=sagging, silent=[0])
    assert decision.to.tolist() == [False, False, True, True, True, True]


def test_with_the_shipped_limits_a_joint_that_is_held_fast_is_a_fault_and_lets_go() -> None:
    controller = make()
    ask(controller, "move", joints={"shoulder_pan": 80.0})
    decision = live(controller, range(200))
    assert controller.mode is Mode.FAULT
    assert controller.fault is not None and controller.fault.startswith("shoulder_pan: at 0.0, its goal")
    assert abs(decision.goal[0] - HOME[0]) < 1e-6


def test_a_move_of_one_joint_moves_no_other_not_even_one_outside_its_limits() -> None:
    controller = make()
    outside = HOME.copy()
    outside[1] = -106.0
    controller.guard.rest_at(outside)
    ask(controller, "move", joints={"gripper": 60.0})
    for tick in range(120):
        decision = controller.step(tick * PERIOD)
    assert decision.goal[1] == -106.0
    assert decision.goal[5] == pytest.approx(60.0, abs=1e-6)


def test_a_short_silence_in_mid_motion_pauses_the_arm_and_nothing_snaps() -> None:
    controller = make()
    ask(controller, "move", joints={"shoulder_pan": 80.0})
    live(controller, range(20))
    pan = np.array(HOME)
    pan[0] = controller.guard.goal[0]
    decision = live(controller, range(20, 40), position=pan, silent=[0])
    assert not decision.to[0]
    assert controller.mode is Mode.IDLE
    controller.observe(40 * PERIOD, reading(pan))
    assert abs(controller.step(40 * PERIOD).goal[0] - pan[0]) < 0.5, "goes on from where the joint is"


def test_a_blocked_joint_lets_go_of_its_goal_and_the_others_keep_theirs() -> None:
    controller = make()
    controller.guard.rest_at(HOME + np.array([5.0, 0, 0, 50.0, 0, 50.0]))
    live(controller, range(60))
    assert controller.mode is Mode.FAULT
    expected = HOME + np.array([5.0, 0, 0, 0, 0, 50.0])
    np.testing.assert_allclose(controller.step(61 * PERIOD).goal, expected)


def test_a_lost_bus_is_a_fault_that_persists_until_it_is_back() -> None:
    controller = make()
    live(controller, range(5))
    for tick in range(5, 100):
        controller.bus_is_gone()
        assert not controller.step(tick * PERIOD).to.any()
    assert "still so" in ask(controller, "mode", mode="reset")["why"]
    moved = HOME + 15.0
    assert not live(controller, range(100, 110), position=moved).to.any(), "until it is reset"
    assert ask(controller, "mode", mode="reset")["ok"]
    np.testing.assert_allclose(controller.step(110 * PERIOD).goal, moved)


def test_a_policy_that_has_not_begun_is_not_counted_as_one_that_stopped() -> None:
    controller = make()
    ask(controller, "mode", mode="policy")
    for tick in range(10):
        controller.step(tick * PERIOD)
    assert controller.holds == 0
