"""The emulated firmware behaves as the STS3215's memory table and its owners say."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scservo_sdk
from hypothesis import given
from hypothesis import strategies as st

from firmware_bridge import packets, registers
from firmware_bridge.diagnosis import FoundServo, ServoError, ServoSilentError, ServoTool
from firmware_bridge.serial_port import PortUnavailable, close_port, open_port, set_baudrate
from firmware_bridge.servo_faults import Fault, load_faults
from firmware_bridge.servo_model import BOOT_S, STALL_HEATING_DEG, ServoBank
from firmware_bridge.servo_motion import FreePlant
from firmware_bridge.virtual_servos import VirtualServos
from virtual_bus import virtual_bus

STEP_S = 0.002


def run(bank: ServoBank, seconds: float) -> None:
    for _ in range(round(seconds / STEP_S)):
        bank.step(STEP_S)


def ask(bank: ServoBank, packet: bytes) -> list[bytes]:
    return [reply.packet for reply in bank.handle(packet)]


def plant_of(bank: ServoBank) -> FreePlant:
    assert isinstance(bank.plant, FreePlant)
    return bank.plant


# -- protocol -------------------------------------------------------------------------------------------


def test_ping_is_answered_with_the_error_byte() -> None:
    assert ask(ServoBank([7]), packets.instruction(7, packets.PING)) == [packets.status(7, 0)]


def test_a_broadcast_ping_is_answered_by_all_in_order_of_id() -> None:
    replies = ask(ServoBank([9, 2, 5]), packets.instruction(0xFE, packets.PING))
    assert [reply[2] for reply in replies] == [2, 5, 9]


def test_only_the_servo_asked_answers_and_a_damaged_request_nobody() -> None:
    bank = ServoBank([1, 2])
    request = packets.read(2, 3, 2)
    assert ask(bank, request) == [packets.status(2, 0, b"\x09\x03")]
    assert ask(bank, request[:-1] + b"\x00") == []


def test_a_sync_read_is_answered_in_the_order_asked() -> None:
    replies = ask(ServoBank([1, 2, 3]), packets.sync_read((3, 1), 62, 1))
    assert replies == [packets.status(3, 0, b"\x4a"), packets.status(1, 0, b"\x4a")]


def test_those_after_a_silent_servo_wait_for_its_turn_to_pass() -> None:
    bank = ServoBank([1, 2, 3])
    replies = bank.handle(packets.sync_read((1, 2, 3), 56, 15), deaf={1})
    assert [reply.place for reply in replies] == [0, 2]
    assert replies[1].delay_s == pytest.approx(21 * 10e-6)


def test_firmware_that_waits_for_its_forerunner_goes_silent_behind_a_silent_servo() -> None:
    bank = ServoBank([1, 2, 3])
    bank.silent_ends_sync_read = True
    assert [reply.place for reply in bank.handle(packets.sync_read((1, 2, 3), 56, 15), deaf={1})] == [0]


def test_a_sync_write_reaches_each_servo_and_nobody_answers() -> None:
    bank = ServoBank([1, 2])
    assert ask(bank, packets.sync_write((1, 2), 41, [b"\x05", b"\x06"])) == []
    assert [bank.read_register(i, "Acceleration") for i in (1, 2)] == [5, 6]


def test_a_reg_write_waits_for_action() -> None:
    bank = ServoBank([1, 2])
    for servo_id in (1, 2):
        ask(bank, packets.instruction(servo_id, packets.REG_WRITE, bytes((42, 0xE8, 0x03))))
    assert [bank.read_register(i, "Goal_Position") for i in (1, 2)] == [0, 0]
    assert bank.read_register(1, "Reg_Write_Flag") == 1
    assert ask(bank, packets.instruction(0xFE, packets.ACTION)) == []
    assert [bank.read_register(i, "Goal_Position") for i in (1, 2)] == [1000, 1000]
    assert bank.read_register(1, "Reg_Write_Flag") == 0


def test_status_level_0_leaves_writes_unanswered() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Response_Status_Level", 0)
    assert ask(bank, packets.write(1, 41, b"\x05")) == []
    assert bank.read_register(1, "Acceleration") == 5
    assert len(ask(bank, packets.read(1, 41, 1))) == 1
    assert len(ask(bank, packets.instruction(1, packets.PING))) == 1


def test_return_delay_counts_in_two_microseconds() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Return_Delay_Time", 250)
    assert bank.handle(packets.read(1, 56, 2))[0].delay_s == pytest.approx(500e-6)


def test_the_answer_to_a_change_of_id_still_carries_the_old_one() -> None:
    bank = ServoBank([1])
    assert ask(bank, packets.write(1, 5, b"\x07")) == [packets.status(1, 0)]
    assert bank.ids == [7]
    assert ask(bank, packets.instruction(1, packets.PING)) == []


def test_read_only_registers_stay_as_they_are() -> None:
    bank = ServoBank([1])
    ask(bank, packets.write(1, 54, bytes(20)))
    assert bank.read_register(1, "Present_Voltage") == 74
    with pytest.raises(ValueError, match="read-only"):
        bank.write_register(1, "Present_Load", 1)


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_bytes_can_upset_the_firmware(pieces: list[bytes]) -> None:
    bank = ServoBank([1, 2])
    for piece in pieces:
        bank.handle(piece)
        bank.step(STEP_S)
    assert np.isfinite(bank.plant.position_rad).all()


@given(st.integers(1, 6), st.sampled_from(list(range(90))), st.binary(min_size=1, max_size=20))
def test_no_write_can_upset_the_firmware(servo_id: int, address: int, data: bytes) -> None:
    bank = ServoBank(range(1, 7))
    bank.handle(packets.write(servo_id, address, data))
    run(bank, 0.05)
    assert np.isfinite(bank.plant.position_rad).all()
    bank.handle(packets.sync_read(range(1, 7), 0, 100))


# -- EEPROM -----------------------------------------------------------------------------------------------


def test_an_unlocked_eeprom_write_outlives_a_power_cut() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Homing_Offset", -321)
    bank.reboot(1)
    assert bank.read_register(1, "Homing_Offset") == -321


def test_a_locked_eeprom_write_works_until_the_power_is_cut() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Lock", 1)
    bank.write_register(1, "P_Coefficient", 16)
    assert bank.read_register(1, "P_Coefficient") == 16
    bank.reboot(1)
    assert bank.read_register(1, "P_Coefficient") == 32
    assert bank.read_register(1, "Lock") == 0


def test_a_reboot_clears_ram_and_takes_a_while() -> None:
    bank = ServoBank([1, 2])
    bank.write_register(1, "Max_Torque_Limit", 500)
    bank.write_register(1, "Goal_Position", 3000)
    run(bank, 0.1)
    bank.reboot(1)
    assert bank.read_register(1, "Torque_Enable") == 0
    assert bank.read_register(1, "Torque_Limit") == 500
    ping = packets.instruction(1, packets.PING)
    assert ask(bank, ping) == []
    run(bank, BOOT_S + STEP_S)
    assert ask(bank, ping) == [packets.status(1, 0)]


# -- motion -------------------------------------------------------------------------------------------------


def test_a_new_servo_is_limp_and_reads_its_middle() -> None:
    bank = ServoBank([1], encoder_offset_raw=100)
    run(bank, 0.1)
    assert bank.read_register(1, "Torque_Enable") == 0
    assert bank.read_register(1, "Present_Position") == 2148
    assert bank.read_register(1, "Moving") == 0


def test_the_homing_offset_is_subtracted_and_the_reading_stays_within_one_turn() -> None:
    bank = ServoBank([1])
    for offset in (-2047, -100, 0, 100, 2047):
        bank.write_register(1, "Homing_Offset", offset)
        assert bank.read_register(1, "Present_Position") == (2048 - offset) % 4096


def test_a_goal_switches_torque_on_and_is_reached() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Acceleration", 100)
    bank.write_register(1, "Goal_Position", 2600)
    assert bank.read_register(1, "Torque_Enable") == 1
    run(bank, 0.05)
    assert bank.read_register(1, "Moving") == 1
    run(bank, 2)
    assert bank.read_register(1, "Present_Position") == 2600
    assert bank.read_register(1, "Moving") == 0
    assert plant_of(bank).position_rad[0] == pytest.approx(552 * 2 * np.pi / 4096, abs=1e-3)


def test_switching_torque_on_holds_the_present_position() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Goal_Position", 3000)
    run(bank, 2)
    bank.write_register(1, "Torque_Enable", 0)
    run(bank, 0.1)
    plant_of(bank).position_rad[0] = 0.0  # by hand
    bank.write_register(1, "Torque_Enable", 1)
    run(bank, 1)
    assert bank.read_register(1, "Present_Position") == 2048
    assert bank.read_register(1, "Goal_Position") == 2048


def test_speed_and_acceleration_are_kept() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Goal_Velocity", 500)
    bank.write_register(1, "Acceleration", 10)  # 1000 ticks a second, every second
    bank.write_register(1, "Goal_Position", 3048)
    speeds = []
    for _ in range(2000):
        bank.step(STEP_S)
        speeds.append(bank.read_register(1, "Present_Velocity"))
    assert max(speeds) == pytest.approx(500, abs=5)
    assert speeds[124] == pytest.approx(250, abs=25)  # after a quarter of a second
    assert max(np.abs(np.diff(speeds))) < 20  # no jerk above what the acceleration and the lag make
    assert bank.read_register(1, "Present_Position") == 3048


def test_the_goal_is_limited_to_the_position_limits() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Min_Position_Limit", 1900)
    bank.write_register(1, "Max_Position_Limit", 2200)
    for goal, reached in ((3000, 2200), (100, 1900)):
        bank.write_register(1, "Goal_Position", goal)
        run(bank, 1)
        assert bank.read_register(1, "Present_Position") == reached


def test_a_servo_pushed_over_its_seam_goes_the_long_way_back() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Goal_Position", 4000)
    run(bank, 2)
    bank.write_register(1, "Torque_Enable", 0)
    run(bank, STEP_S)
    plant_of(bank).position_rad[0] += 200 * 2 * np.pi / 4096  # reads 104 now
    assert bank.read_register(1, "Present_Position") == 104
    bank.write_register(1, "Goal_Position", 4000)
    run(bank, 3)
    assert plant_of(bank).position_rad[0] == pytest.approx((1952 + 4096) * 2 * np.pi / 4096, abs=1e-2)


def test_velocity_mode_turns_at_the_goal_velocity() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Operating_Mode", 1)
    bank.write_register(1, "Goal_Velocity", -400)
    run(bank, 1)
    assert bank.read_register(1, "Present_Velocity") == pytest.approx(-400, abs=2)
    bank.write_register(1, "Goal_Velocity", 0)
    run(bank, 0.5)
    assert bank.read_register(1, "Present_Velocity") == 0


def test_torque_enable_128_makes_the_present_position_the_middle() -> None:
    bank = ServoBank([1], encoder_offset_raw=-700)
    bank.write_register(1, "Torque_Enable", 128)
    assert bank.read_register(1, "Present_Position") == 2048
    assert bank.read_register(1, "Homing_Offset") == -700
    assert bank.read_register(1, "Torque_Enable") == 0
    bank.reboot(1)
    assert bank.read_register(1, "Present_Position") == 2048


# -- load, protections, sensors ---------------------------------------------------------------------------


def blocked_servo() -> ServoBank:
    bank = ServoBank([1])
    plant_of(bank).blocked[0] = True
    bank.write_register(1, "Goal_Position", 4095)
    return bank


def test_load_and_current_follow_the_torque_and_its_direction() -> None:
    bank = blocked_servo()
    run(bank, 1)
    assert bank.read_register(1, "Present_Load") == 1000
    assert bank.read_register(1, "Present_Current") == pytest.approx(2.7 / 0.0065, abs=1)
    assert bank.read_register(1, "Present_Voltage") < 74
    bank.write_register(1, "Goal_Position", 0)
    run(bank, 1.5)
    assert bank.read_register(1, "Present_Load") == -1000


def test_torque_limit_limits_the_load() -> None:
    bank = blocked_servo()
    bank.write_register(1, "Torque_Limit", 300)
    run(bank, 1)
    assert bank.read_register(1, "Present_Load") == 300


def test_overload_cuts_the_torque_after_the_protection_time_and_says_so() -> None:
    bank = blocked_servo()
    run(bank, 1.5)
    assert bank.read_register(1, "Status") == 0
    run(bank, 2)
    assert bank.read_register(1, "Status") == registers.ERROR_OVERLOAD
    assert bank.read_register(1, "Present_Load") == 200  # Protective_Torque 20 %
    assert ask(bank, packets.read(1, 56, 2))[0][4] == registers.ERROR_OVERLOAD


@pytest.mark.parametrize(("name", "value"), [("Torque_Enable", 0), ("Goal_Position", 1000)])
def test_overload_ends_with_torque_off_or_a_goal_on_the_other_side(name: str, value: int) -> None:
    bank = blocked_servo()
    run(bank, 4)
    assert bank.read_register(1, "Status") == registers.ERROR_OVERLOAD
    bank.write_register(1, name, value)
    run(bank, 0.1)
    assert bank.read_register(1, "Status") == 0


def test_a_hot_servo_says_so_and_lets_go() -> None:
    bank = ServoBank([1])
    bank.write_register(1, "Goal_Position", 2048)
    bank.temperature_deg[0] = 75
    run(bank, 0.1)
    assert bank.read_register(1, "Present_Temperature") == 75
    assert bank.read_register(1, "Status") == registers.ERROR_TEMPERATURE
    assert bank.read_register(1, "Torque_Enable") == 0


def test_pushing_hard_heats() -> None:
    bank = blocked_servo()
    bank.write_register(1, "Overload_Torque", 101)
    run(bank, 20)
    assert 25 < bank.read_register(1, "Present_Temperature") < 25 + STALL_HEATING_DEG


def test_a_supply_outside_its_limits_is_reported_and_does_not_let_go() -> None:
    bank = ServoBank([1], supply_v=3.7)
    bank.write_register(1, "Torque_Enable", 1)
    run(bank, 0.1)
    assert bank.read_register(1, "Present_Voltage") == 37
    assert bank.read_register(1, "Status") == registers.ERROR_VOLTAGE
    assert bank.read_register(1, "Torque_Enable") == 1  # Unloading_Condition 44 has no voltage bit


# -- behind the pty -----------------------------------------------------------------------------------------


def talk(servos: VirtualServos, port: int, request: bytes, seconds: float = 0.2) -> bytes:
    """Send a request and serve in this thread until `seconds` have passed or a reply is there."""
    os.write(port, request)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        servos.serve_once(0.01)
        if select.select([port], [], [], 0)[0]:
            return os.read(port, 4096)
    return b""


def test_servos_hear_only_their_own_baud_rate() -> None:
    servos = VirtualServos(ServoBank([1]))
    port = open_port(servos.path, 115_200)
    ping = packets.instruction(1, packets.PING)
    assert talk(servos, port, ping) == b""
    set_baudrate(port, 1_000_000)
    assert talk(servos, port, ping, 5) == packets.status(1, 0)
    assert talk(servos, port, packets.write(1, 6, b"\x02"), 5) == packets.status(1, 0)  # answers at the old speed
    assert talk(servos, port, ping) == b""
    set_baudrate(port, 250_000)
    assert talk(servos, port, ping, 5) == packets.status(1, 0)
    close_port(port)
    servos.stop()


def test_the_rest_of_a_torn_request_does_not_swallow_the_next() -> None:
    servos = VirtualServos(ServoBank([1]))
    port = open_port(servos.path, 1_000_000)
    assert talk(servos, port, b"\xff\xff\x01\xf0\x02") == b""
    assert talk(servos, port, packets.instruction(1, packets.PING), 5) == packets.status(1, 0)
    close_port(port)
    servos.stop()


def test_bytes_take_their_time_on_the_wire() -> None:
    servos = VirtualServos(ServoBank([1, 2]))
    port = open_port(servos.path, 1_000_000)
    request = packets.sync_read((1, 2), 56, 15)
    servos._receive(request, 1000.0)  # as if read at that time; a test does not measure
    arrivals = [due_s - 1000.0 for due_s, _ in servos._outgoing]
    assert arrivals == pytest.approx([(len(request) + 21) * 10e-6, (len(request) + 42) * 10e-6])
    close_port(port)
    servos.stop()


def test_the_sdk_of_the_maker_works_on_it() -> None:
    with virtual_bus() as servos:
        port, sdk = scservo_sdk.PortHandler(servos.path), scservo_sdk.PacketHandler(0)
        assert port.openPort()
        assert port.setBaudRate(1_000_000)
        assert sdk.ping(port, 4) == (777, scservo_sdk.COMM_SUCCESS, 0)
        assert sdk.write2ByteTxRx(port, 4, 42, 2100) == (scservo_sdk.COMM_SUCCESS, 0)
        assert sdk.read2ByteTxRx(port, 4, 42) == (2100, scservo_sdk.COMM_SUCCESS, 0)
        reader = scservo_sdk.GroupSyncRead(port, sdk, 56, 2)
        writer = scservo_sdk.GroupSyncWrite(port, sdk, 41, 1)
        for servo_id in servos.bank.ids:
            reader.addParam(servo_id)
            writer.addParam(servo_id, [50 + servo_id])
        assert writer.txPacket() == scservo_sdk.COMM_SUCCESS
        assert reader.txRxPacket() == scservo_sdk.COMM_SUCCESS
        assert reader.getData(1, 56, 2) == 2048
        assert [servos.bank.read_register(i, "Acceleration") for i in servos.bank.ids] == [51, 52, 53, 54, 55, 56]
        port.closePort()


def test_the_tool_finds_reads_and_sets_servos_up() -> None:
    bank = ServoBank([1, 3])
    with virtual_bus(bank=bank) as servos, ServoTool(servos.path) as tool:
        found = list(tool.scan(ids=range(5)))
        assert found == [FoundServo(1, 1_000_000, 777, "3.10", 0), FoundServo(3, 1_000_000, 777, "3.10", 0)]
        tool.write(3, "Homing_Offset", -44)
        assert tool.read(3, "Homing_Offset") == -44
        assert tool.read(3, "Lock") == 1
        tool.set_id(3, 6)
        bank.reboot(6)
        assert bank.ids == [1, 6]
        with pytest.raises(ServoError, match="id 1 is taken"):
            tool.set_id(6, 1)
        with pytest.raises(ServoSilentError, match="servo 9 at 1000000 baud, reading Lock"):
            tool.read(9, "Lock")
        with pytest.raises(ValueError, match="Torque_Limit takes 0 to 65535"):
            tool.write(1, "Torque_Limit", -1)


def test_the_tool_changes_the_baud_rate_and_finds_the_servo_there() -> None:
    with virtual_bus([1]) as servos, ServoTool(servos.path) as tool:
        tool.set_baudrate(1, 500_000)
        assert tool.ping(1) == 777
        found = list(tool.scan(ids=[1], baudrates=(1_000_000, 500_000)))
        assert [(servo.id, servo.baudrate) for servo in found] == [(1, 500_000)]


def test_a_port_in_use_is_not_shared() -> None:
    with virtual_bus() as servos, ServoTool(servos.path), pytest.raises(PortUnavailable, match="in use"):
        ServoTool(servos.path)


# -- faults --------------------------------------------------------------------------------------------------


def test_faults_by_script_strike_whom_and_when_they_say(tmp_path: Path) -> None:
    script = tmp_path / "faults.json"
    script.write_text(json.dumps([{"kind": "error", "ids": [2], "bits": ["overload", "temperature"]}]))
    with virtual_bus() as servos, ServoTool(servos.path) as tool:
        servos.follow_fault_file(script)
        deadline = time.monotonic() + 30
        while tool.read(2, "Status") == 0 and time.monotonic() < deadline:
            pass
        assert registers.error_names(tool.read(2, "Status")) == ["temperature", "overload"]
        assert tool.last_error == registers.ERROR_TEMPERATURE | registers.ERROR_OVERLOAD
        assert tool.read(1, "Status") == 0
        script.write_text("[]")
        while tool.read(2, "Status") != 0 and time.monotonic() < deadline:
            pass
        assert tool.read(2, "Status") == 0


def test_a_rebooting_servo_comes_back_limp() -> None:
    with virtual_bus() as servos, ServoTool(servos.path) as tool:
        tool.write(5, "Torque_Enable", 1)
        servos.add_fault({"kind": "reboot", "ids": [5]})
        deadline = time.monotonic() + 30
        while servos.bank.read_register(5, "Torque_Enable") and time.monotonic() < deadline:
            pass
        while tool.ping(5) is None and time.monotonic() < deadline:
            pass
        assert tool.read(5, "Torque_Enable") == 0


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("{", "not JSON"),
        ('[{"kind": "tired"}]', "fault 0: no fault is called 'tired'"),
        ('[{"kind": "silent", "id": 3}]', "fault 0: expected an object with kind"),
        ('[{"kind": "corrupt", "probability": 5}]', "probability is 0 to 1, not 5"),
        ('[{"kind": "error", "bits": ["sad"]}]', "bits are of voltage"),
        ('[{"kind": "delay", "delay_s": -1}]', "times not negative"),
        ('"silent"', "fault 0: expected an object"),
    ],
)
def test_a_bad_fault_script_is_refused_in_one_sentence(script: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    path.write_text(script)
    with pytest.raises(ValueError, match=r"faults\.json") as caught:
        load_faults(path)
    assert complaint in str(caught.value)


def test_the_same_seed_gives_the_same_faults() -> None:
    def spoiled() -> list[Any]:
        servos = VirtualServos(
            ServoBank([1]), [Fault("corrupt", probability=0.5), Fault("drop", probability=0.3)], seed=4
        )
        servos.stop()
        now_s = time.monotonic() + 1
        return [servos.faults.spoil(1, b"\xff\xff\x01\x04\x00\x18\x05\xdd", now_s) for _ in range(50)]

    assert spoiled() == spoiled()


# -- the command's entry ----------------------------------------------------------------------------------------


def test_serve_prints_the_path_and_stops_on_sigterm(tmp_path: Path) -> None:
    link = tmp_path / "arm"
    program = "import sys; from pathlib import Path; from firmware_bridge.virtual_servos import serve; "
    program += "serve([1, 2], Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", program, str(link)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            path = process.stdout.readline().strip()
            assert str(link.readlink()) == path
            with ServoTool(str(link)) as tool:
                deadline = time.monotonic() + 30
                while tool.ping(2) != 777:  # on a busy machine the SDK may give up before the process is scheduled
                    assert time.monotonic() < deadline
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert not link.is_symlink()
