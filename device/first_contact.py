"""What the servos say before the control loop begins: do they hold, where to, and is the calibration theirs?

`execute` asks once at start, through the SDK, register by register; the loop's own two transactions come afterwards. A
calibration file that is not the one in the servos' EEPROM would make every position wrong by the difference, so that is
refused here, before any motion.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.config import LoadedCell
from device.errors import ConfigError, DeviceUnavailableError
from device.log import event
from firmware_bridge.calibration import JointCalibration
from firmware_bridge.diagnosis import ServoSilentError, ServoTool
from firmware_bridge.serial_port import PortUnavailable

logger = logging.getLogger("execute")

PATIENCE_S = 2.0


@dataclass(frozen=True)
class Found:
    """Per joint [J]: whether its torque is on, and its goal in ticks."""

    torque_on: NDArray[np.bool_]
    goal_raw: NDArray[Any]


def look_at_servos(cell: LoadedCell, port: str) -> Found:
    """Read torque and goals, and check the calibration against the servos' own.

    Raises DeviceUnavailableError where the port or a servo cannot be had, ConfigError where the calibration is another.
    """
    try:
        with ServoTool(port, cell.cell.arm.baudrate) as tool:
            for name, joint in zip(cell.cell.joint_names, cell.calibration, strict=True):
                _check_calibration(cell, tool, name, joint)
            torque = [_read(tool, servo, "Torque_Enable") for servo in cell.servo_ids]
            goals = [_read(tool, servo, "Goal_Position") for servo in cell.servo_ids]
    except PortUnavailable as error:
        raise DeviceUnavailableError(f"{cell.path}: arm.port: {error}") from error
    except ServoSilentError as error:
        raise DeviceUnavailableError(f"{error}: check power, cables and ids") from error
    return Found(np.array(torque) == 1, np.array(goals, np.int64))


def _check_calibration(cell: LoadedCell, tool: ServoTool, name: str, joint: JointCalibration) -> None:
    offset = _read(tool, joint.id, "Homing_Offset")
    if offset != joint.homing_offset:
        raise ConfigError(
            f"{cell.path}: arm.calibration: {name} (servo {joint.id}) has homing offset {offset} in its memory, the "
            f"file says {joint.homing_offset}: it is another arm's, or an older one; calibrate again"
        )
    limits = _read(tool, joint.id, "Min_Position_Limit"), _read(tool, joint.id, "Max_Position_Limit")
    if limits != (joint.range_min, joint.range_max):
        # The guard keeps the limits of the cell file; the servo's own are a second line that is missing here.
        event(
            logger,
            "servo.limits_differ",
            level=logging.WARNING,
            joint=name,
            servo=f"{limits[0]}..{limits[1]}",
            calibration=f"{joint.range_min}..{joint.range_max}",
        )


def _read(tool: ServoTool, servo: int, register: str) -> int:
    """Patiently: one damaged reply is no silent servo, and servos that were just powered take a while to boot."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return tool.read(servo, register)
        except ServoSilentError:
            if time.monotonic() > deadline:
                raise
