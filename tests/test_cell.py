"""The whole virtual cell, with its real processes: what happens when parts of it die, stall or lie.

Nothing here asserts on how fast this machine is: every condition is about what the roles published, in their own time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from device.messages import Mode
from running_cell import BUNDLE, RunningCell, running_cell

pytestmark = pytest.mark.skipif(not BUNDLE.is_dir(), reason="the virtual cell's bundle is not here")

ACCELERATION = 900.0  # deg/s^2, and the speed limit is 150 deg/s, of every arm joint in the virtual cell's file


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[RunningCell]:
    with running_cell(tmp_path) as running:
        yield running


def check_hold(cell: RunningCell) -> None:
    """The arm holds, began to within a tick of the staleness limit, braked within its limits, and stands."""
    cell.until(lambda: bool(cell.history("goals")[-20:]["holding"].all()), "the arm to hold")
    goals = cell.history("goals")
    first = int(np.flatnonzero(goals["holding"] & (goals["mode"] == Mode.POLICY))[-1])
    while goals["holding"][first - 1] and goals["mode"][first - 1] == Mode.POLICY:
        first -= 1
    before, after = goals[first - 1], goals[first]
    assert before["chunk_age_ns"] <= cell.staleness_ns, "not a tick longer"
    t_obs = before["t_ns"] - before["chunk_age_ns"]
    assert after["t_ns"] - t_obs > cell.staleness_ns, "and not a tick earlier"
    whole = goals[first - 2 :]
    consecutive = np.diff(whole["tick"].astype(np.int64)) == 1
    speed = np.diff(whole["goal"][:, :5], axis=0) * (1e9 / cell.period_ns)
    change = np.abs(np.diff(speed, axis=0))[consecutive[1:] & consecutive[:-1]]
    assert change.max() <= ACCELERATION * cell.period_ns / 1e9 * 1.001, "brakes no harder than allowed"
    np.testing.assert_array_equal(whole["goal"][-1], whole["goal"][-5], "and then it stands")


def test_predict_killed_in_mid_motion_the_arm_holds_until_it_is_back(cell: RunningCell) -> None:
    cell.run_policy_until_it_moves()
    cell.kill("predict")
    check_hold(cell)
    held = cell.newest("goals")["goal"]
    cell.processes.start("predict")
    cell.until(lambda: not cell.newest("goals")["holding"], "the policy to go on")
    cell.until(lambda: bool(np.abs(cell.newest("goals")["goal"] - held).max() > 1), "motion again")
    assert cell.newest("ticks")["mode"] == Mode.POLICY


def test_a_camera_killed_in_mid_motion_the_arm_holds_until_it_is_back(cell: RunningCell) -> None:
    cell.run_policy_until_it_moves()
    cell.kill("capture@wrist")
    check_hold(cell)
    cell.processes.start("capture", "wrist")
    cell.until(lambda: not cell.newest("goals")["holding"], "the policy to go on")


def test_execute_killed_the_servos_hold_and_its_successor_moves_nothing(cell: RunningCell) -> None:
    cell.run_policy_until_it_moves()
    cell.kill("execute")
    last_sent = cell.newest("goals")["goal"]
    cell.processes.start("execute")
    cell.until(lambda: len(cell.history("goals")) and cell.newest("goals")["mode"] == Mode.IDLE, "execute to be back")
    cell.until(lambda: cell.newest("ticks")["tick"] > 30, "some ticks")
    goals = cell.history("goals")
    fresh = goals[goals["mode"] == Mode.IDLE][-20:]
    resolution = cell.cell.units.resolution
    assert np.abs(fresh["goal"] - last_sent).max(axis=0) == pytest.approx(
        np.zeros(6), abs=float(resolution.max()) * 1.5
    )


def test_a_fault_storm_on_the_bus_is_counted_and_lived_through(cell: RunningCell) -> None:
    cell.run_policy_until_it_moves()
    before = cell.newest("ticks")
    faults = [
        {"kind": "corrupt", "probability": 0.05, "for_s": 2.0},
        {"kind": "silent", "ids": [3], "at_s": 0.5, "for_s": 0.2},
    ]
    cell.ask("world", "faults", faults=faults)
    cell.until(lambda: cell.newest("ticks")["t_ns"] > before["t_ns"] + 2_500_000_000, "the storm to pass")
    after = cell.newest("ticks")
    assert after["bus_errors"] > before["bus_errors"] + 10
    assert after["mode"] == Mode.POLICY, after["fault"]
    joints = cell.history("joints")
    assert (joints["valid"][:, 2] == 0).sum() >= 5, "the silent servo was noticed"
    calm = joints[joints["t_ns"] > before["t_ns"] + 2_300_000_000]
    assert calm["valid"].any(axis=0).all(), "and everybody is back"


def joint_speeds(cell: RunningCell, since_ns: int) -> np.ndarray:
    """Largest speed of each joint since then, units/s, from its positions over five ticks."""
    joints = cell.history("joints")
    joints = joints[joints["t_ns"] > since_ns]
    seconds = (joints["t_ns"][5:] - joints["t_ns"][:-5])[:, None] / 1e9
    return np.asarray(np.abs((joints["position"][5:] - joints["position"][:-5]) / seconds).max(axis=0))


def test_after_an_emergency_stop_nothing_moves_by_itself_and_after_the_reset_the_arm_holds_where_it_is(
    cell: RunningCell,
) -> None:
    """The servos' power is cut for a second while the adapter lives; the arm drops, and comes back without torque."""
    cell.ask("world", "faults", faults=[{"kind": "silent", "for_s": 1.0}, {"kind": "reboot"}])
    cell.until(lambda: cell.newest("ticks")["mode"] == Mode.FAULT, "the fault")
    cell.until(lambda: bool(cell.newest("joints")["valid"].all()), "the servos to be back")
    cell.until(lambda: bool(np.abs(cell.newest("joints")["velocity"]).max() < 2), "the arm to have dropped")
    back_ns = int(cell.newest("joints")["t_ns"])
    cell.until(lambda: cell.newest("joints")["t_ns"] > back_ns + 1_000_000_000, "a second in fault")
    assert joint_speeds(cell, back_ns).max() < 5
    rest = cell.newest("joints")["position"]
    cell.until(lambda: cell.ask("execute", "mode", mode="reset")["mode"] == "idle", "the reset")
    reset_ns = int(cell.newest("joints")["t_ns"])
    cell.until(lambda: cell.newest("joints")["t_ns"] > reset_ns + 500_000_000, "half a second of holding")
    assert np.abs(cell.newest("joints")["position"] - rest).max() < 5


def test_a_silence_in_mid_motion_never_makes_the_arm_faster_than_its_limit(cell: RunningCell) -> None:
    cell.ask("execute", "move", joints={"shoulder_pan": 70.0, "elbow_flex": -20.0})
    cell.until(lambda: abs(float(cell.newest("joints")["position"][0])) > 5, "motion")
    since_ns = int(cell.newest("joints")["t_ns"])
    cell.ask("world", "faults", faults=[{"kind": "silent", "ids": [1, 3], "for_s": 0.4}])
    cell.until(lambda: cell.newest("joints")["t_ns"] > since_ns + 2_500_000_000, "the move to end")
    assert cell.newest("ticks")["mode"] == Mode.IDLE, cell.newest("ticks")["fault"]
    assert joint_speeds(cell, since_ns)[:5].max() < 150 * 1.25


def test_a_servo_that_stays_silent_is_a_fault_that_a_reset_ends(cell: RunningCell) -> None:
    cell.ask("world", "faults", faults=[{"kind": "silent", "ids": [2], "for_s": 1.5}])
    cell.until(lambda: cell.newest("ticks")["mode"] == Mode.FAULT, "the fault")
    assert b"shoulder_lift: no answer" in cell.newest("ticks")["fault"]
    cell.until(lambda: bool(cell.newest("joints")["valid"].all()), "the servo to be back")
    cell.until(lambda: cell.ask("execute", "mode", mode="reset")["mode"] == "idle", "the reset")


def test_the_demo_prints_one_json_object_with_every_figure(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "device.cli", "demo", "--json", "--seed", "3", "--report", str(tmp_path / "report")]
    result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=240)
    figures = json.loads(result.stdout)
    assert figures["episodes"] == 1
    assert result.returncode == (0 if figures["successes"] else 1)
    for key in ("ticks", "ticks_missed", "boundary_step_deg_max", "inner_step_deg_max", "bus_errors"):
        assert isinstance(figures[key], int | float), key
    assert set(figures["lateness_us"]) == {"p50", "p99", "p999", "max"}
    assert set(figures["inference_ms"]) == set(figures["chunk_age_ms"]) == {"p50", "p99"}
    assert figures["ticks"] > 60
    for picture in ("cameras.png", "joints.png", "chunks.png", "lateness.png", "report.json"):
        assert (tmp_path / "report" / picture).stat().st_size > 1000 or picture == "report.json"
