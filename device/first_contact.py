"""What the servos say before the control loop begins: do they hold, where to, and is the calibration theirs?

`device/arm.py` asks at start and whenever the bus was away, through the SDK, register by register; the loop's own two
transactions come afterwards. A calibration that is not the one in the servos' EEPROM would make every position wrong by
the difference, and a servo in another mode than position mode would take goals for something else: both are refused
here, before any motion.
"""

from __future__ import annotations

import termios
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.config import LoadedCell
from device.errors import ConfigError, DeviceUnavailableError
from firmware_bridge.calibration import JointCalibration
from firmware_bridge.diagnosis import ServoSilentError, ServoTool
from firmware_bridge.serial_port import PortUnavailable

PATIENCE_S = 2.0
_PHASE_FULL_ANGLE = 0x10  # memory table, register 18: feedback is not reduced to one turn


@dataclass(frozen=True)
class Found:
    """Per joint [J]: whether its torque is on, and its goal in ticks."""

    torque_on: NDArray[np.bool_]
    goal_raw: NDArray[Any]


def look_at_servos(cell: LoadedCell, port: str, patience_s: float = PATIENCE_S) -> Found:
    """Read torque and goals, and check that the servos are those of the cell's calibration, in position mode.

    `patience_s` is how long a silent servo is asked again: servos that were just powered take a while to boot. Raises
    DeviceUnavailableError where the port or a servo cannot be had, ConfigError where the arm is another one.
    """
    try:
        with ServoTool(port, cell.cell.arm.baudrate) as tool:
            for name, joint in zip(cell.cell.joint_names, cell.calibration, strict=True):
                _check(cell, tool, name, joint, patience_s)
            torque = [_read(tool, servo, "Torque_Enable", patience_s) for servo in cell.servo_ids]
            goals = [_read(tool, servo, "Goal_Position", patience_s) for servo in cell.servo_ids]
    except PortUnavailable as error:
        raise DeviceUnavailableError(port_sentence(cell, error)) from error
    except (OSError, termios.error) as error:  # silent, or the adapter went away meanwhile
        raise DeviceUnavailableError(f"{error}: check power, cables and ids") from error
    return Found(np.array(torque) == 1, np.array(goals, np.int64))


def port_sentence(cell: LoadedCell, error: PortUnavailable) -> str:
    """What is wrong with the port, and where it is named."""
    return f"{cell.path}: arm.port: {error.strerror}"


def _check(cell: LoadedCell, tool: ServoTool, name: str, joint: JointCalibration, patience_s: float) -> None:
    def read(register: str) -> int:
        return _read(tool, joint.id, register, patience_s)

    found = read("Homing_Offset"), read("Min_Position_Limit"), read("Max_Position_Limit")
    expected = joint.homing_offset, joint.range_min, joint.range_max
    if found != expected:
        raise ConfigError(
            f"{cell.path}: arm.calibration: {name} (servo {joint.id}) has homing offset and range {found} in its "
            f"memory, the file says {expected}: it is another arm's, or an older one; calibrate again"
        )
    if mode := read("Operating_Mode"):
        raise ConfigError(
            f"{cell.path}: {name} (servo {joint.id}) is in operating mode {mode}, not in position mode (0): "
            "set its Operating_Mode"
        )
    if read("Phase") & _PHASE_FULL_ANGLE:
        raise ConfigError(
            f"{cell.path}: {name} (servo {joint.id}) counts over more than one turn (Phase has bit 0x10 set): clear it"
        )


def _read(tool: ServoTool, servo: int, register: str, patience_s: float) -> int:
    """Patiently: one damaged reply is no silent servo."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return tool.read(servo, register)
        except ServoSilentError:
            if time.monotonic() > deadline:
                raise
