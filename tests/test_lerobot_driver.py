"""LeRobot's own Feetech driver, unmodified, takes the virtual servos for an SO-101.

Each test runs a program in LeRobot's interpreter against a pty that this process serves. The program prints
what it found as JSON on its last line; where a person would move the arm it says so and waits for Enter.
"""

import contextlib
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firmware_bridge.calibration import load_calibration
from firmware_bridge.servo_model import ServoBank
from firmware_bridge.virtual_servos import VirtualServos
from real_lerobot import lerobot_python
from virtual_bus import virtual_bus

PRELUDE = """
import json, sys
from lerobot.motors.feetech import FeetechMotorsBus, OperatingMode
from lerobot.motors.motors_bus import Motor, MotorCalibration, MotorNormMode
NAMES = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
def make_bus(port, calibration=None):
    body, grip = MotorNormMode.DEGREES, MotorNormMode.RANGE_0_100
    motors = {name: Motor(i + 1, "sts3215", grip if name == "gripper" else body) for i, name in enumerate(NAMES)}
    return FeetechMotorsBus(port, motors, calibration)
def full_range():
    return {name: MotorCalibration(i + 1, 0, 0, 0, 4095) for i, name in enumerate(NAMES)}
"""


def run_lerobot(servos: VirtualServos, program: str, *arguments: str, at_prompt: Callable[[str], None] = print) -> Any:
    """Run a program in LeRobot's interpreter; a line of its output that starts with "PERSON:" calls `at_prompt`."""
    process = subprocess.Popen(
        [lerobot_python(), "-c", PRELUDE + program, servos.path, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    last = ""
    for line in process.stdout:
        if "PERSON:" in line:
            at_prompt(line.split("PERSON:")[1].strip())
            process.stdin.write("\n")
            process.stdin.flush()
        last = line
    errors = process.stderr.read()
    if process.wait() != 0 and "There is no status packet" in errors:
        raise Stalled(errors)
    assert process.returncode == 0, errors
    return json.loads(last)


class Stalled(Exception):  # noqa: N818 - see below
    """LeRobot gave up on a reply after its 50 ms, which it does not try again."""


def again_if_the_machine_stalls(test: Callable[..., None]) -> Callable[..., None]:
    """On a machine that is busy with other things the servos here may be late; three times in a row they are not."""

    @functools.wraps(test)
    def patient(**fixtures: Any) -> None:
        for _ in range(2):
            with contextlib.suppress(Stalled):
                return test(**fixtures)
        return test(**fixtures)

    return patient


@again_if_the_machine_stalls
def test_it_connects_configures_reads_and_writes() -> None:
    program = """
bus = make_bus(sys.argv[1], full_range())
bus.connect()                                   # handshake: every motor's model and firmware
calibrated = bus.is_calibrated
with bus.torque_disabled():
    bus.configure_motors()
    for name in NAMES:
        bus.write("Operating_Mode", name, OperatingMode.POSITION.value)
        bus.write("P_Coefficient", name, 16)
before = bus.sync_read("Present_Position")
bus.sync_write("Goal_Position", {name: 20.0 for name in NAMES})
import time
deadline = time.monotonic() + 20
while time.monotonic() < deadline and any(abs(v - 20) > 0.1 for v in bus.sync_read("Present_Position").values()):
    pass
after = bus.sync_read("Present_Position")
single = bus.read("Present_Position", "gripper", normalize=False)
voltage = bus.read("Present_Voltage", "gripper")
found = bus.broadcast_ping()
bus.disconnect()
print(json.dumps([calibrated, before, after, single, voltage, found]))
"""
    with virtual_bus() as servos:
        calibrated, before, after, single, voltage, found = run_lerobot(servos, program)
        assert calibrated
        assert before["elbow_flex"] == pytest.approx(0, abs=0.1)
        assert [after[name] for name in after if name != "gripper"] == pytest.approx([20.0] * 5, abs=0.2)
        assert after["gripper"] == pytest.approx(20, abs=0.1)
        assert single == pytest.approx(servos.bank.read_register(6, "Present_Position"), abs=10)  # still settling
        assert voltage == 74
        assert found == {str(servo_id): 777 for servo_id in range(1, 7)}
        assert [servos.bank.read_register(i, "Torque_Enable") for i in servos.bank.ids] == [0] * 6
        assert servos.bank.read_register(3, "P_Coefficient") == 16
        assert servos.bank.read_register(3, "Maximum_Acceleration") == 254


@again_if_the_machine_stalls
def test_it_calibrates_an_arm_whose_horns_sit_anywhere(tmp_path: Path) -> None:
    """The whole of `SOFollower.calibrate`: homing in the middle, ranges recorded by hand, written and kept."""
    program = """
from lerobot.robots.so_follower import SO101FollowerConfig, SO101Follower
import builtins
def ask(prompt=""):
    print("PERSON: middle", flush=True)
    return sys.stdin.readline()
builtins.input = ask
original = FeetechMotorsBus.record_ranges_of_motion
def record(self, motors=None, display_values=True):   # LeRobot's own, told by Enter when to stop
    print("PERSON: ranges", flush=True)
    return original(self, motors, display_values=False)
FeetechMotorsBus.record_ranges_of_motion = record
from pathlib import Path
arm = SO101Follower(SO101FollowerConfig(port=sys.argv[1], id="cell", calibration_dir=Path(sys.argv[2])))
arm.connect()
calibrated = arm.is_calibrated
observation = arm.get_observation()
sent = arm.send_action({f"{name}.pos": 15.0 for name in NAMES})
arm.disconnect()
again = SO101Follower(SO101FollowerConfig(port=sys.argv[1], id="cell", calibration_dir=Path(sys.argv[2])))
again.connect()                                        # asks nothing: file and EEPROM agree
print(json.dumps([calibrated, observation, sent, again.is_calibrated]))
again.disconnect()
"""
    bank = ServoBank(range(1, 7), encoder_offset_raw=[900, -1700, 0, 2000, -300, 1234])

    def person(what: str) -> None:
        plant: Any = bank.plant
        if what == "middle":
            plant.position_rad[:] = 0.2
            return
        for target in (-1.0, 1.3, 0.2):  # back and forth, slower than LeRobot reads
            for position in np.linspace(plant.position_rad[0], target, 25):
                plant.position_rad[:] = position
                time.sleep(0.01)
            time.sleep(0.3)

    with virtual_bus(bank=bank) as servos:
        folder = tempfile.mkdtemp(dir=tmp_path)
        calibrated, observation, sent, again = run_lerobot(servos, program, folder, at_prompt=person)
        assert calibrated and again
        files = list(Path(folder).rglob("cell.json"))
        assert len(files) == 1
        joints = load_calibration(files[0])
        for name, joint in joints.items():
            assert bank.read_register(joint.id, "Homing_Offset") == joint.homing_offset
            assert bank.read_register(joint.id, "Min_Position_Limit") == joint.range_min
            low, high = (0, 4095) if name == "wrist_roll" else (2047 - 782, 2047 + 717)
            assert joint.range_min == pytest.approx(low, abs=3)
            assert joint.range_max == pytest.approx(high, abs=3)
        assert observation["wrist_roll.pos"] == pytest.approx(0, abs=0.2)
        assert sent["elbow_flex.pos"] == 15.0
        for joint in joints.values():  # and the calibration outlives a power cut
            bank.reboot(joint.id)
            assert bank.read_register(joint.id, "Homing_Offset") == joint.homing_offset


@again_if_the_machine_stalls
def test_it_sets_up_a_new_servo() -> None:
    """`setup_motor` finds a servo by scanning the baud rates, and gives it its id and 1 Mbaud."""
    program = """
bus = make_bus(sys.argv[1])
bus.setup_motor("wrist_flex")
print(json.dumps(bus.ping(4)))
bus.port_handler.closePort()
"""
    bank = ServoBank([1])
    bank.write_register(1, "Baud_Rate", 4)
    with virtual_bus(bank=bank) as servos:
        assert run_lerobot(servos, program) == 777
        assert bank.ids == [4]
        assert bank.baudrate(0) == 1_000_000


@again_if_the_machine_stalls
def test_a_silent_servo_is_an_error_there_and_a_missing_value_here() -> None:
    """What our own bus is for: the same fault, seen through LeRobot."""
    program = """
bus = make_bus(sys.argv[1], full_range())
bus.connect()
print("PERSON: unplug", flush=True)
sys.stdin.readline()
try:
    bus.sync_read("Present_Position")
except ConnectionError as error:
    print(json.dumps(str(error)))
"""
    with virtual_bus() as servos:
        unplug = {"kind": "silent", "ids": [3]}
        answer = run_lerobot(servos, program, at_prompt=lambda _: servos.add_fault(unplug))
        assert "Failed to sync read" in answer
