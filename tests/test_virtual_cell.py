"""World and emulated firmware coupled, in simulated time: deterministic, and able to do the task."""

from __future__ import annotations

import numpy as np

from device.config import VIRTUAL_CELL, load_cell
from device.scripted_expert import ScriptedExpert
from device.virtual_cell import TIMESTEP_S, LockstepCell
from firmware_bridge.guard import Guard, GuardLimits

CELL = load_cell(VIRTUAL_CELL)
STEPS = 8  # physics steps a control tick, about 60 Hz


def demonstrate(seed: int, seconds: float) -> LockstepCell:
    """The scripted expert drives the arm through guard, units and servo registers."""
    lockstep = LockstepCell(CELL, seed)
    expert = ScriptedExpert()
    limits = GuardLimits(*(CELL.joint_array(name) for name in ("min", "max", "max_speed", "max_acceleration")))
    guard = Guard(CELL.cell.joint_names, limits, STEPS * TIMESTEP_S)
    raw = [lockstep.bank.read_register(servo, "Present_Position") for servo in CELL.servo_ids]
    guard.rest_at(CELL.units.from_raw(raw))
    while lockstep.world.time_s < seconds and not lockstep.world.done:
        goal = guard.limit(expert.goal(lockstep.world.time_s, lockstep.world))
        for servo, ticks in zip(CELL.servo_ids, CELL.units.to_raw(goal), strict=True):
            lockstep.bank.write_register(servo, "Goal_Position", int(ticks))
        for _ in range(STEPS):
            lockstep.step()
    return lockstep


def test_the_expert_picks_the_cube_up_through_guard_units_and_servo_firmware() -> None:
    for seed in (1, 2):
        assert demonstrate(seed, 14.0).world.done, f"seed {seed}"


def test_the_same_seed_gives_the_same_states_bit_for_bit() -> None:
    first, second = demonstrate(3, 3.0), demonstrate(3, 3.0)
    np.testing.assert_array_equal(first.world.state(), second.world.state())
    assert not np.array_equal(first.world.cube_position_m, demonstrate(4, 3.0).world.cube_position_m)


def test_servo_positions_are_the_worlds_in_the_cells_units() -> None:
    lockstep = LockstepCell(CELL, 0)
    raw = [lockstep.bank.read_register(servo, "Present_Position") for servo in CELL.servo_ids]
    np.testing.assert_allclose(CELL.units.from_raw(raw), CELL.joint_array("home"), atol=0.15)


def test_a_servo_without_torque_lets_the_arm_drop() -> None:
    lockstep = LockstepCell(CELL, 0)
    before = lockstep.world.position_rad[1]
    lockstep.bank.write_register(2, "Torque_Enable", 0)
    for _ in range(500):
        lockstep.step()
    assert abs(lockstep.world.position_rad[1] - before) > 0.1
