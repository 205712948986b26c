"""Calibration files and the units that people and policies use for joint positions.

Calibrations are LeRobot's JSON files, as they are: one object per joint with id, drive_mode,
homing_offset, range_min and range_max, in ticks. `UnitMap` turns ticks of the servo bus into a joint's
unit and back with the numbers of LeRobot 0.4.4 (`SerialMotorsBus._normalize`, `_unnormalize`), including
what looks like an oversight there: goals are cut and not rounded, degrees are not limited to the
calibrated range and ignore drive_mode. A policy was trained on those numbers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from firmware_bridge.registers import MAX_ID, TICKS_PER_TURN

FloatArray = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]

LAST_TICK_RAW = TICKS_PER_TURN - 1
LARGEST_OFFSET_RAW = 2047  # Homing_Offset has 11 bits and a sign
# LeRobot converts degrees with 360 / 4095, though a turn has 4096 ticks.
DEG_PER_TICK = 360 / LAST_TICK_RAW


class CalibrationError(ValueError):
    """A calibration that cannot be used; the message names file, joint and field."""


class Unit(str, Enum):
    """What a joint position is counted in; LeRobot's names of its normalisation modes."""

    degrees = "degrees"  # 0 in the middle of the calibrated range
    range_m100_100 = "range_m100_100"  # percent of the calibrated range, -100 at its low end
    range_0_100 = "range_0_100"  # percent of the calibrated range, 0 at its low end: grippers


@dataclass(frozen=True)
class JointCalibration:
    """How one servo sits in its joint, all in ticks.

    `homing_offset` is subtracted by the servo itself from its encoder; the range is in what remains.
    `drive_mode` 1 turns the two percent units around.
    """

    id: int
    drive_mode: int
    homing_offset: int
    range_min: int
    range_max: int

    def __post_init__(self) -> None:
        limits = {
            "id": (0, MAX_ID),
            "drive_mode": (0, 1),
            "homing_offset": (-LARGEST_OFFSET_RAW, LARGEST_OFFSET_RAW),
            "range_min": (0, LAST_TICK_RAW),
            "range_max": (0, LAST_TICK_RAW),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise CalibrationError(f"{name} must be a whole number, got {value!r}")
            if not low <= value <= high:
                raise CalibrationError(f"{name} must be {low} to {high}, got {value}")
        if self.range_min >= self.range_max:
            raise CalibrationError(
                f"range_min {self.range_min} must be below range_max {self.range_max}: was the joint moved through "
                "its range when it was calibrated?"
            )


def load_calibration(path: str | os.PathLike[str]) -> dict[str, JointCalibration]:
    """The joints of a LeRobot calibration file by name, in the file's order.

    Raises CalibrationError with a sentence for anything wrong in it, OSError if it cannot be read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, CalibrationError) as error:
        raise CalibrationError(f"{path}: not a calibration file: {error}") from error
    if not isinstance(content, dict) or not content:
        raise CalibrationError(f"{path}: expected an object with one entry per joint")
    joints: dict[str, JointCalibration] = {}
    for name, entry in content.items():
        try:
            joints[name] = _parse_joint(entry)
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {name}: {error}") from error
    _refuse_shared_ids(path, joints)
    return joints


def save_calibration(path: str | os.PathLike[str], calibration: Mapping[str, JointCalibration]) -> None:
    """Write a file that LeRobot reads too; durable once this returns, and never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: asdict(joint) for name, joint in calibration.items()}, indent=4) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class UnitMap:
    """Ticks of J servos to the joints' units, and back."""

    def __init__(self, calibrations: Sequence[JointCalibration], units: Sequence[Unit]) -> None:
        """One calibration and one unit per joint, in the order of the arrays. ValueError if they differ in number."""
        if len(calibrations) != len(units) or not calibrations:
            raise ValueError(f"{len(calibrations)} calibrations do not fit {len(units)} units")
        self.units = tuple(Unit(unit) for unit in units)
        self._low = np.array([joint.range_min for joint in calibrations], np.float64)
        self._high = np.array([joint.range_max for joint in calibrations], np.float64)
        self._span = self._high - self._low
        self._middle = (self._low + self._high) / 2
        degrees = np.array([unit is Unit.degrees for unit in self.units])
        signed = np.array([unit is Unit.range_m100_100 for unit in self.units])
        turned = np.array([bool(joint.drive_mode) for joint in calibrations])
        self._degrees = degrees
        self._percent = ~degrees
        # Of the percent units: their width, their value at range_min, and whether drive_mode turns them around.
        self._width = np.where(signed, 200.0, 100.0)
        self._offset = np.where(signed, 100.0, 0.0)
        self._turned = turned & ~degrees
        self._turn_sum = np.where(signed, 0.0, 100.0)  # value + turned value
        self.resolution: FloatArray = np.where(degrees, DEG_PER_TICK, self._width / self._span)

    def from_raw(self, raw: npt.ArrayLike) -> FloatArray:
        """Positions in the joints' units, float64 [J], of ticks int [J]. Percent is limited to the range."""
        ticks = np.asarray(raw, np.float64)
        values: FloatArray = (ticks - self._middle) * 360 / LAST_TICK_RAW
        if self._percent.any():
            bounded = np.minimum(self._high, np.maximum(self._low, ticks))
            percent = (bounded - self._low) / self._span * self._width - self._offset
            percent = np.where(self._turned, self._turn_sum - percent, percent)
            values = np.where(self._percent, percent, values)
        return values

    def to_raw(self, values: npt.ArrayLike) -> Int32Array:
        """Ticks int32 [J] of positions float64 [J] in the joints' units, cut towards zero as LeRobot cuts them.

        Values must be finite; the guard has seen to that.
        """
        wanted = np.asarray(values, np.float64)
        ticks = wanted * LAST_TICK_RAW / 360 + self._middle
        if self._percent.any():
            percent = np.where(self._turned, self._turn_sum - wanted, wanted)
            bounded = np.minimum(100.0, np.maximum(-self._offset, percent))
            ticks = np.where(self._percent, (bounded + self._offset) / self._width * self._span + self._low, ticks)
        return np.trunc(ticks).astype(np.int32)

    def limits(self) -> tuple[FloatArray, FloatArray]:
        """The calibrated range in the joints' units: lowest and highest value, each float64 [J]."""
        ends = self.from_raw(self._low), self.from_raw(self._high)
        return np.minimum(*ends), np.maximum(*ends)


def _parse_joint(entry: Any) -> JointCalibration:
    names = [field.name for field in fields(JointCalibration)]
    if not isinstance(entry, dict):
        raise CalibrationError(f"expected an object with {', '.join(names)}, got {entry!r}")
    missing = [name for name in names if name not in entry]
    unknown = [name for name in entry if name not in names]
    if missing or unknown:
        parts = [f"{word} {', '.join(found)}" for word, found in (("missing", missing), ("unknown", unknown)) if found]
        raise CalibrationError(f"{'; '.join(parts)} (a joint has {', '.join(names)})")
    return JointCalibration(**entry)


def _refuse_shared_ids(path: Path, joints: Mapping[str, JointCalibration]) -> None:
    owners: dict[int, str] = {}
    for name, joint in joints.items():
        if joint.id in owners:
            raise CalibrationError(f"{path}: {owners[joint.id]} and {name} both have id {joint.id}")
        owners[joint.id] = name


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise CalibrationError(f"named twice: {', '.join(sorted({name for name in names if names.count(name) > 1}))}")
    return content
