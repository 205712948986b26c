"""Calibration files load as LeRobot wrote them, and joints get LeRobot's numbers."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_bridge.calibration import (
    CalibrationError,
    JointCalibration,
    Unit,
    UnitMap,
    load_calibration,
    save_calibration,
)
from real_lerobot import ask_lerobot

LEROBOT_FILE = """{
    "shoulder_pan": {"id": 1, "drive_mode": 0, "homing_offset": -12, "range_min": 741, "range_max": 3380},
    "gripper": {"id": 6, "drive_mode": 0, "homing_offset": 1403, "range_min": 2029, "range_max": 3498}
}"""

# Recorded from LeRobot 0.4.4: [tick, FeetechMotorsBus._normalize] and [value, FeetechMotorsBus._unnormalize].
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "lerobot_units.json").read_text())


def unit_map(unit: str, drive_mode: int, low: int, high: int) -> UnitMap:
    return UnitMap([JointCalibration(1, drive_mode, 0, low, high)], [Unit(unit)])


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['unit']}-{case['drive_mode']}-{case['range_min']}")
def test_numbers_are_those_recorded_from_lerobot(case: dict[str, Any]) -> None:
    joint = unit_map(case["unit"], case["drive_mode"], case["range_min"], case["range_max"])
    assert [joint.from_raw([tick])[0] for tick, _ in case["normalize"]] == [value for _, value in case["normalize"]]
    assert [joint.to_raw([value])[0] for value, _ in case["unnormalize"]] == [tick for _, tick in case["unnormalize"]]


ASK_LEROBOT = """
import json, sys
from lerobot.motors.feetech import FeetechMotorsBus
from lerobot.motors.motors_bus import Motor, MotorCalibration, MotorNormMode
answers = []
for unit, drive_mode, low, high, ticks, values in json.load(sys.stdin):
    motors = {"joint": Motor(1, "sts3215", MotorNormMode(unit))}
    bus = FeetechMotorsBus("/dev/null", motors, {"joint": MotorCalibration(1, drive_mode, 0, low, high)})
    answers.append([[bus._normalize({1: t})[1] for t in ticks], [bus._unnormalize({1: v})[1] for v in values]])
print(json.dumps(answers))
"""


def test_numbers_are_those_of_lerobot_itself() -> None:
    dice = random.Random(20)
    questions: list[list[Any]] = []
    for unit in Unit:
        for drive_mode in (0, 1):
            for _ in range(20):
                low, high = sorted(dice.sample(range(4096), 2))
                ticks = [dice.randrange(4096) for _ in range(20)]
                questions.append(
                    [unit.value, drive_mode, low, high, ticks, [dice.uniform(-190, 190) for _ in range(20)]]
                )
    for question, (values, goals) in zip(questions, ask_lerobot(ASK_LEROBOT, questions), strict=True):
        joint = unit_map(*question[:4])
        assert [joint.from_raw([tick])[0] for tick in question[4]] == values
        assert [joint.to_raw([value])[0] for value in question[5]] == goals


def test_joints_of_different_units_convert_side_by_side() -> None:
    arm = [
        JointCalibration(1, 0, 0, 1000, 3000),
        JointCalibration(2, 1, 0, 0, 4095),
        JointCalibration(6, 0, 0, 2000, 3000),
    ]
    units = UnitMap(arm, [Unit.degrees, Unit.range_m100_100, Unit.range_0_100])
    assert units.from_raw([2000, 4095, 2500]).tolist() == [0.0, -100.0, 50.0]
    assert units.to_raw([0.0, -100.0, 50.0]).tolist() == [2000, 4095, 2500]
    assert units.to_raw([0.0, -100.0, 50.0]).dtype == np.int32


@given(st.sampled_from(list(Unit)), st.integers(0, 1), st.integers(0, 4094), st.data())
def test_there_and_back_loses_at_most_one_tick(unit: Unit, drive_mode: int, low: int, data: st.DataObject) -> None:
    high = data.draw(st.integers(low + 1, 4095))
    tick = data.draw(st.integers(low, high))
    joint = UnitMap([JointCalibration(1, drive_mode, 0, low, high)], [unit])
    assert abs(int(joint.to_raw(joint.from_raw([tick]))[0]) - tick) <= 1


@given(st.sampled_from(list(Unit)), st.integers(0, 1), st.integers(0, 4094), st.data())
def test_limits_and_resolution_describe_the_calibrated_range(
    unit: Unit, drive_mode: int, low: int, data: st.DataObject
) -> None:
    high = data.draw(st.integers(low + 1, 4095))
    joint = UnitMap([JointCalibration(1, drive_mode, 0, low, high)], [unit])
    lowest, highest = joint.limits()
    assert lowest[0] < highest[0]
    assert highest[0] - lowest[0] == pytest.approx(joint.resolution[0] * (high - low))


def test_degrees_are_not_limited_to_the_calibrated_range() -> None:
    """As in LeRobot; the guard and the servo's own limits stand behind it."""
    assert unit_map("degrees", 0, 1000, 3000).to_raw([150.0])[0] == 3706


def test_as_many_units_as_joints() -> None:
    with pytest.raises(ValueError, match="1 calibrations do not fit 2 units"):
        UnitMap([JointCalibration(1, 0, 0, 0, 4095)], [Unit.degrees, Unit.degrees])


def test_a_file_of_lerobot_loads_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "so101.json"
    path.write_text(LEROBOT_FILE)
    assert load_calibration(path) == {
        "shoulder_pan": JointCalibration(1, 0, -12, 741, 3380),
        "gripper": JointCalibration(6, 0, 1403, 2029, 3498),
    }


def test_what_is_saved_is_what_lerobot_writes(tmp_path: Path) -> None:
    path = tmp_path / "arm" / "so101.json"
    calibration = {"gripper": JointCalibration(6, 1, -5, 10, 20)}
    save_calibration(path, calibration)
    assert load_calibration(path) == calibration
    assert json.loads(path.read_text())["gripper"] == {
        "id": 6, "drive_mode": 1, "homing_offset": -5, "range_min": 10, "range_max": 20
    }  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == ["so101.json"]


JOINT = {"id": 1, "drive_mode": 0, "homing_offset": 0, "range_min": 0, "range_max": 4095}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not a calibration file"),
        ("[]", "one entry per joint"),
        ("{}", "one entry per joint"),
        ('{"a": 3}', "a: expected an object with id, drive_mode"),
        (json.dumps({"a": {**JOINT, "range_min": 5000}}), "a: range_min must be 0 to 4095, got 5000"),
        (json.dumps({"a": {**JOINT, "range_min": 4095}}), "a: range_min 4095 must be below range_max 4095"),
        (json.dumps({"a": {**JOINT, "homing_offset": 2048}}), "a: homing_offset must be -2047 to 2047, got 2048"),
        (json.dumps({"a": {**JOINT, "homing_offset": 1.5}}), "a: homing_offset must be a whole number, got 1.5"),
        (json.dumps({"a": {**JOINT, "drive_mode": True}}), "a: drive_mode must be a whole number, got True"),
        (json.dumps({"a": {**JOINT, "range": 3}}), "a: unknown range"),
        (json.dumps({"a": {"id": 1}}), "a: missing drive_mode, homing_offset, range_min, range_max"),
        (json.dumps({"a": JOINT, "b": JOINT}), "a and b both have id 1"),
        (f'{{"a": {json.dumps(JOINT)}, "a": {json.dumps(JOINT)}}}', "named twice: a"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(CalibrationError) as caught:
        load_calibration(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
