"""What the servos say before the control loop begins: do they hold, where to, and is the calibration theirs?

`device/arm.py` asks at start and whenever the bus was away; the loop's own two transactions come afterwards. A
calibration that is not the one in the servos' EEPROM would make every position wrong by the difference, and a servo in
another mode than position mode would take goals for something else: both are refused here, before any motion.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.config import LoadedCell
from device.errors import ConfigError, DeviceUnavailableError
from firmware_bridge.bus import ServoBus
from firmware_bridge.calibration import JointCalibration

PATIENCE_S = 2.0
_PHASE_FULL_ANGLE = 0x10  # memory table, register 18: feedback is not reduced to one turn
_REGISTERS = (
    "Homing_Offset",
    "Min_Position_Limit",
    "Max_Position_Limit",
    "Operating_Mode",
    "Phase",
    "Torque_Enable",
    "Goal_Position",
)


@dataclass(frozen=True)
class Found:
    """Per joint [J]: whether its torque is on, and its goal in ticks."""

    torque_on: NDArray[np.bool_]
    goal_raw: NDArray[Any]


def look_at_servos(cell: LoadedCell, bus: ServoBus, patience_s: float = PATIENCE_S) -> Found:
    """Read torque and goals, and check that the servos are those of the cell's calibration, in position mode.

    `patience_s` is how long a silent servo is asked again: servos that were just powered take a while to boot. Raises
    DeviceUnavailableError where a servo does not answer, ConfigError where the arm is another one, BusLost.
    """
    table = {name: _read(cell, bus, name, patience_s) for name in _REGISTERS}
    for name, joint in zip(cell.cell.joint_names, cell.calibration, strict=True):
        _check(cell, name, joint, {register: values[joint.id] for register, values in table.items()})
    torque = [table["Torque_Enable"][servo] == 1 for servo in cell.servo_ids]
    return Found(np.array(torque), np.array([table["Goal_Position"][servo] for servo in cell.servo_ids], np.int64))


def _read(cell: LoadedCell, bus: ServoBus, register: str, patience_s: float) -> dict[int, int]:
    """The register of every servo. Patiently: one damaged reply is no silent servo."""
    deadline = time.monotonic() + patience_s
    values = bus.read_register(register)
    while len(values) < len(cell.servo_ids):
        if time.monotonic() > deadline:
            names = zip(cell.cell.joint_names, cell.servo_ids, strict=True)
            silent = ", ".join(f"{name} (id {servo})" for name, servo in names if servo not in values)
            raise DeviceUnavailableError(f"{bus.port}: no answer from {silent}: check power, cables and ids")
        values |= bus.read_register(register)
    return values


def _check(cell: LoadedCell, name: str, joint: JointCalibration, found: Mapping[str, int]) -> None:
    calibrated = found["Homing_Offset"], found["Min_Position_Limit"], found["Max_Position_Limit"]
    expected = joint.homing_offset, joint.range_min, joint.range_max
    who = f"{name} (servo {joint.id})"
    if calibrated != expected:
        raise ConfigError(
            f"{cell.path}: arm.calibration: {who} has homing offset and range {calibrated} in its memory, the file "
            f"says {expected}: it is another arm's, or an older one; calibrate again"
        )
    if mode := found["Operating_Mode"]:
        raise ConfigError(
            f"{cell.path}: {who} is in operating mode {mode}, not in position mode: set Operating_Mode to 0"
        )
    if found["Phase"] & _PHASE_FULL_ANGLE:
        raise ConfigError(f"{cell.path}: {who} counts over more than one turn (Phase has bit 0x10 set): clear it")
