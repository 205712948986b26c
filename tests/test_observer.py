"""Figures come from what the roles published, tick by tick."""

from __future__ import annotations

import numpy as np

from device.messages import TICKS, Mode, chunks_dtype, goals_dtype
from device.observer import measure
from firmware_bridge.calibration import Unit

UNITS = [Unit.degrees, Unit.range_0_100]


def test_steps_are_told_apart_at_boundaries_and_elsewhere_and_only_in_degrees() -> None:
    goals = np.zeros(6, goals_dtype(2))
    goals["mode"] = Mode.POLICY
    goals["tick"] = np.arange(6)
    goals["goal"][:, 0] = [0, 1, 3, 4, 4, 4]
    goals["goal"][:, 1] = [0, 50, 0, 50, 0, 50]
    goals["boundary"] = [1, 0, 1, 0, 0, 0]
    figures = measure(np.zeros(0, TICKS), goals, np.zeros(0, chunks_dtype(1, 2)), UNITS)
    assert figures.boundary_step_deg_max == 2.0
    assert figures.inner_step_deg_max == 1.0


def test_what_the_hand_over_asked_for_is_told_apart_from_what_the_guard_made_of_it() -> None:
    goals = np.zeros(3, goals_dtype(2))
    goals["mode"] = Mode.POLICY
    goals["tick"] = np.arange(3)
    goals["goal"][:, 0] = [0, 1, 2]
    goals["requested"][:, 0] = [np.nan, 0, 30]
    goals["boundary"] = [0, 0, 1]
    figures = measure(np.zeros(0, TICKS), goals, np.zeros(0, chunks_dtype(1, 2)), UNITS)
    assert figures.boundary_step_deg_max == 1.0
    assert figures.requested_boundary_step_deg_max == 30.0


def test_what_happens_between_two_episodes_does_not_count() -> None:
    ticks = np.zeros(4, TICKS)
    ticks["mode"] = Mode.POLICY
    ticks["t_ns"] = np.array([0, 1, 600, 601]) * 16_666_667
    ticks["missed"] = [0, 1, 40, 42]
    assert measure(ticks, np.zeros(0, goals_dtype(2)), np.zeros(0, chunks_dtype(1, 2)), UNITS).ticks_missed == 3


def test_a_skipped_tick_is_no_step() -> None:
    goals = np.zeros(2, goals_dtype(2))
    goals["mode"] = Mode.POLICY
    goals["tick"] = [4, 9]
    goals["goal"][:, 0] = [0, 30]
    figures = measure(np.zeros(0, TICKS), goals, np.zeros(0, chunks_dtype(1, 2)), UNITS)
    assert figures.inner_step_deg_max == figures.boundary_step_deg_max == 0.0


def test_counters_are_counted_over_policy_mode_and_over_a_restart() -> None:
    ticks = np.zeros(6, TICKS)
    ticks["mode"] = [Mode.IDLE] + [Mode.POLICY] * 5
    ticks["missed"] = [7, 7, 9, 9, 0, 1]
    ticks["unsent"] = [0, 0, 0, 1, 0, 0]
    ticks["lateness_ns"] = [10**9, 1000, 2000, 3000, 4000, 5000]
    figures = measure(ticks, np.zeros(0, goals_dtype(2)), np.zeros(0, chunks_dtype(1, 2)), UNITS)
    assert figures.ticks == 5
    assert figures.ticks_missed == 4
    assert figures.lateness_us["p50"] == 3.0
    assert figures.lateness_us["max"] == 5.0
