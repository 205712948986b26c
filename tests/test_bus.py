"""The servo bus lives with every fault of a real bus, and never mistakes a wrong value for a right one."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firmware_bridge import packets, registers
from firmware_bridge.bus import BusLost, PortUnavailable, ServoBus
from firmware_bridge.servo_model import ServoBank
from firmware_bridge.virtual_servos import VirtualServos
from virtual_bus import SO101_IDS, virtual_bus

PATIENT_S = 2.0  # what arrives at all arrives by then, however busy the machine
ANGLES_RAW = np.array([2048, 1000, 3000, 5, 4090, 2500])


def arm_at(positions: np.ndarray = ANGLES_RAW) -> ServoBank:
    return ServoBank(SO101_IDS, encoder_offset_raw=(positions - 2048).tolist())


@pytest.fixture
def servos() -> Iterator[VirtualServos]:
    with virtual_bus(bank=arm_at()) as running:
        yield running


@pytest.fixture
def bus(servos: VirtualServos) -> Iterator[ServoBus]:
    with ServoBus(servos.path, SO101_IDS, timeout_s=PATIENT_S) as opened:
        yield opened


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- a tick -----------------------------------------------------------------------------------------------


def test_a_read_brings_everything_of_every_servo(bus: ServoBus) -> None:
    before_ns = time.monotonic_ns()
    state = bus.read()
    assert state.valid.all()
    assert state.position_raw.tolist() == ANGLES_RAW.tolist()
    assert state.voltage_raw.tolist() == [74] * 6
    assert state.temperature_raw.tolist() == [25] * 6
    assert not (state.velocity_raw.any() or state.load_raw.any() or state.current_raw.any())
    assert not (state.status.any() or state.moving.any() or state.error.any())
    assert before_ns < state.t_request_ns < state.t_ns < time.monotonic_ns()
    assert bus.counters.reads == 1
    assert bus.counters.timeouts == 0


def test_the_order_is_that_of_the_ids_given(servos: VirtualServos) -> None:
    with ServoBus(servos.path, (6, 2, 4), timeout_s=PATIENT_S) as bus:
        assert bus.read().position_raw.tolist() == [2500, 1000, 5]


def test_a_good_read_is_one_write_and_one_wake_up(monkeypatch: Any) -> None:
    """At 38400 baud, so that a busy machine is not too slow for it."""
    bank = arm_at()
    for servo_id in SO101_IDS:
        bank.write_register(servo_id, "Baud_Rate", registers.BAUDRATES.index(38_400))
    calls: list[str] = []
    with virtual_bus(bank=bank) as servos, ServoBus(servos.path, SO101_IDS, 38_400, timeout_s=PATIENT_S) as bus:
        real_write, poll = os.write, bus._poll

        def write(descriptor: int, data: bytes) -> int:
            if descriptor == bus._descriptor:  # the servos at the other end write, too
                calls.append("write")
            return real_write(descriptor, data)

        class CountedPoll:
            def poll(self, timeout_ms: int) -> Any:
                calls.append("poll")
                return poll.poll(timeout_ms)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(bus, "_poll", CountedPoll())
        assert bus.read().valid.all()
    assert calls == ["write", "poll"]


def test_goals_arrive_and_switch_torque_on(bus: ServoBus, servos: VirtualServos) -> None:
    goals = np.array([2000, 1100, 2900, 0, 4095, 2048], np.int32)
    bus.write_goals(goals)
    wait_until(lambda: (bus.read().position_raw == goals).all())
    assert [servos.bank.read_register(i, "Torque_Enable") for i in SO101_IDS] == [1] * 6
    assert bus.counters.writes == 1


def test_torque_is_switched_for_all_or_for_each(bus: ServoBus, servos: VirtualServos) -> None:
    def torque() -> list[int]:
        return [servos.bank.read_register(i, "Torque_Enable") for i in SO101_IDS]

    bus.write_torque(True)
    wait_until(lambda: torque() == [1] * 6)
    bus.write_torque([False, True, True, False, True, True])
    wait_until(lambda: torque() == [0, 1, 1, 0, 1, 1])
    bus.write_torque(False)
    wait_until(lambda: torque() == [0] * 6)


def test_any_register_of_all_servos_is_read_before_the_loop(bus: ServoBus, servos: VirtualServos) -> None:
    servos.bank.write_register(3, "Homing_Offset", -871)
    assert bus.read_register("Homing_Offset") == {i: -871 if i == 3 else 0 for i in SO101_IDS}
    assert bus.read_register("Operating_Mode") == dict.fromkeys(SO101_IDS, 0)
    servos.add_fault({"kind": "silent", "ids": [2], "for_s": 60.0})
    assert sorted(bus.read_register("Goal_Position")) == [1, 3, 4, 5, 6]
    servos.clear_faults()
    assert bus.read().valid.all()


def test_signs_are_decoded(servos: VirtualServos, bus: ServoBus) -> None:
    plant: Any = servos.bank.plant
    plant.blocked[:] = True
    bus.write_goals(np.array([0, 4095, 0, 4095, 0, 4095]))
    wait_until(lambda: (abs(bus.read().load_raw) > 500).all())
    assert np.sign(bus.state.load_raw).tolist() == [-1, 1, -1, 1, -1, 1]
    assert np.sign(bus.state.current_raw).tolist() == [-1, 1, -1, 1, -1, 1]
    plant.blocked[:] = False
    wait_until(lambda: (np.sign(bus.read().velocity_raw) == [-1, 1, -1, 1, -1, 1]).all())


@pytest.mark.parametrize("goals", [[1, 2], [1.0] * 6, [40_000] * 6, [np.nan] * 6])
def test_goals_that_are_none_are_refused_before_the_wire(bus: ServoBus, goals: list[Any]) -> None:
    with pytest.raises(ValueError, match="Goal_Position"):
        bus.write_goals(goals)
    assert bus.counters.writes == 0


# -- faults of servos ---------------------------------------------------------------------------------------


def test_one_silent_servo_costs_only_its_own_data(servos: VirtualServos, bus: ServoBus) -> None:
    bus.read()
    servos.add_fault({"kind": "silent", "ids": [3]})
    state = bus.read()
    assert state.valid.tolist() == [True, True, False, True, True, True]
    assert state.position_raw.tolist() == ANGLES_RAW.tolist()  # the old value of servo 3
    assert bus.counters.timeouts_by_servo == [0, 0, 1, 0, 0, 0]
    servos.clear_faults()
    assert bus.read().valid.all()


def test_servos_that_wait_for_a_silent_forerunner_cost_only_their_own_data(servos: VirtualServos) -> None:
    servos.bank.silent_ends_sync_read = True
    with ServoBus(servos.path, SO101_IDS, timeout_s=0.3) as bus:
        servos.add_fault({"kind": "silent", "ids": [3]})
        assert bus.read().valid.tolist() == [True, True, False, False, False, False]
        servos.clear_faults()
        assert bus.read().valid.all()


def test_an_arm_without_power_is_all_missing_and_no_error(servos: VirtualServos) -> None:
    with ServoBus(servos.path, SO101_IDS, timeout_s=0.05) as bus:
        servos.add_fault({"kind": "silent"})
        for _ in range(3):
            assert not bus.read().valid.any()
        assert bus.counters.timeouts == 18
        assert bus.counters.timeouts_by_servo == [3] * 6


def test_error_bits_are_kept_and_counted(servos: VirtualServos, bus: ServoBus) -> None:
    servos.add_fault({"kind": "error", "ids": [2], "bits": ["overload"]})
    wait_until(lambda: bus.read().error[1] != 0)
    assert bus.state.valid.all()
    assert bus.state.error.tolist() == [0, registers.ERROR_OVERLOAD, 0, 0, 0, 0]
    assert bus.state.status.tolist() == [0, registers.ERROR_OVERLOAD, 0, 0, 0, 0]
    assert bus.counters.servo_errors == 1


def test_adapters_that_hand_bytes_over_in_bursts_lose_nothing() -> None:
    with virtual_bus(bank=arm_at(), wire_time=True, adapter_period_s=0.004) as servos:
        with ServoBus(servos.path, SO101_IDS, timeout_s=PATIENT_S) as bus:
            for _ in range(20):
                assert bus.read().valid.all()
        assert bus.counters.garbage_bytes == 0


def test_more_servos_than_the_kernel_counts_bytes_for() -> None:
    """Thirty servos answer 630 bytes; VMIN ends at 255."""
    with virtual_bus(range(1, 31)) as servos, ServoBus(servos.path, range(1, 31), timeout_s=PATIENT_S) as bus:
        for _ in range(3):
            assert bus.read().valid.all()


def test_a_storm_of_faults_is_counted_and_passes(servos: VirtualServos) -> None:
    """5 % damaged replies and a servo silent for 200 ms, at 60 Hz, for two seconds."""
    with ServoBus(servos.path, SO101_IDS, timeout_s=0.5) as bus:
        servos.add_fault({"kind": "corrupt", "probability": 0.05})
        servos.add_fault({"kind": "silent", "ids": [3], "at_s": 0.5, "for_s": 0.2})
        missing = np.zeros(6, np.int64)
        for _ in range(120):
            state = bus.read()
            missing += ~state.valid
            assert (state.position_raw == ANGLES_RAW)[state.valid].all()
            time.sleep(1 / 60)
        counters = bus.counters
        struck = servos.faults.struck
        damaged = [struck["corrupt", servo_id] for servo_id in SO101_IDS]
        silent = struck["silent", 3]
        assert silent > 0 and sum(damaged) > 10
        assert missing.tolist() == [n + (silent if i == 2 else 0) for i, n in enumerate(damaged)]
        lost = [a + b for a, b in zip(counters.timeouts_by_servo, counters.checksum_errors_by_servo, strict=True)]
        assert lost == missing.tolist()
        assert counters.timeouts + counters.checksum_errors == missing.sum()
        assert counters.reads == 120
        servos.clear_faults()
        assert bus.read().valid.all()


# -- noise: property tests against a scripted adapter ---------------------------------------------------------


class ScriptedAdapter:
    """The other end of a pty, which answers each sync read with bytes the test has made up."""

    def __init__(self, timeout_s: float) -> None:
        self.master, self.slave = os.openpty()
        self.bus = ServoBus(os.ttyname(self.slave), (1, 2, 3), timeout_s=timeout_s)

    def read_with(self, answer: Any) -> ServoBus:
        """One read of the bus; `answer(size)` makes the bytes for a request of `size` bytes of each servo."""

        def serve() -> None:
            request = os.read(self.master, 100)
            os.write(self.master, answer(request[6], request[5]))

        thread = threading.Thread(target=serve)
        thread.start()
        self.bus.read()
        thread.join()
        return self.bus


@pytest.fixture(scope="module")
def adapter() -> Iterator[ScriptedAdapter]:
    scripted = ScriptedAdapter(timeout_s=0.02)
    yield scripted
    scripted.bus.close()


@pytest.fixture(scope="module")
def patient_adapter() -> Iterator[ScriptedAdapter]:
    scripted = ScriptedAdapter(PATIENT_S)
    yield scripted
    scripted.bus.close()


def reply(servo_id: int, position: int, size: int, address: int) -> bytes:
    block = registers.PRESENT_POSITION.encode(position) + bytes(13)
    return packets.status(servo_id, 0, (bytes(56 - address) + block).ljust(size, b"\0"))


positions = st.lists(st.integers(0, 4095), min_size=3, max_size=3)
quiet = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def harmless(noise: bytes) -> bool:
    """Noise that does not look like the beginning of a reply; with such noise nothing can be promised."""
    return not noise.endswith(b"\xff") and not any(bytes((0xFF, 0xFF, i)) in noise for i in (1, 2, 3))


noises = st.lists(st.binary(max_size=30).filter(harmless), min_size=4, max_size=4)


@quiet
@given(positions, noises)
def test_noise_before_between_and_after_replies_is_skipped_and_counted(
    patient_adapter: ScriptedAdapter, values: list[int], noise: list[bytes]
) -> None:
    def answer(size: int, address: int) -> bytes:
        parts = [noise[i] + reply(i + 1, values[i], size, address) for i in range(3)]
        return b"".join(parts) + noise[3]

    counters = patient_adapter.bus.counters
    expected = counters.garbage_bytes + sum(map(len, noise))
    state = patient_adapter.read_with(answer).state
    assert state.valid.all()
    assert state.position_raw.tolist() == values
    deadline = time.monotonic() + 30
    while counters.garbage_bytes < expected and time.monotonic() < deadline:
        patient_adapter.bus._discard_input()  # what came after the last reply
    assert counters.garbage_bytes == expected


@quiet
@given(positions, st.data())
def test_replies_cut_anywhere_are_good_up_to_the_cut(
    adapter: ScriptedAdapter, values: list[int], data: st.DataObject
) -> None:
    share = data.draw(st.floats(0, 1))

    def answer(size: int, address: int) -> bytes:
        whole = b"".join(reply(i + 1, values[i], size, address) for i in range(3))
        return whole[: round(share * len(whole))] or b"\0"

    state = adapter.read_with(answer).state
    assert (state.position_raw == values)[state.valid].all()
    assert state.valid.sum() <= int(share * 3 + 1e-9) + 1
    assert not (state.valid[1:] & ~state.valid[:-1]).any()  # no servo behind the cut


@quiet
@given(positions, st.data())
def test_one_wrong_byte_in_a_reply_never_gives_a_wrong_value(
    adapter: ScriptedAdapter, values: list[int], data: st.DataObject
) -> None:
    """One byte in each reply: what the checksum can detect. Two that cancel out pass, on any Feetech bus."""
    flips = [(data.draw(st.integers(0, 20)), data.draw(st.integers(0, 255))) for _ in range(3)]

    def answer(size: int, address: int) -> bytes:
        stream = b""
        for i, (at, change) in enumerate(flips):
            damaged = bytearray(reply(i + 1, values[i], size, address))
            damaged[at] ^= change
            stream += damaged
        return stream

    state = adapter.read_with(answer).state
    assert (state.position_raw == values)[state.valid].all()
    assert not any(valid and change for valid, (_, change) in zip(state.valid, flips, strict=True))


def test_a_late_reply_is_never_taken_for_the_next_one(adapter: ScriptedAdapter) -> None:
    """Two ticks in a row the replies come only after the next request; they are told by their length."""
    late = b""

    def answer_the_last(size: int, address: int) -> bytes:
        nonlocal late
        last, late = late, b"".join(reply(i, 1111, size, address) for i in (1, 2, 3))
        return last or b"\0"

    for _ in range(3):
        assert not adapter.read_with(answer_the_last).state.valid.any()

    def answer_both(size: int, address: int) -> bytes:
        return late + b"".join(reply(i, 2222, size, address) for i in (1, 2, 3))

    state = adapter.read_with(answer_both).state
    assert set(state.position_raw[state.valid].tolist()) <= {2222}


@quiet
@given(st.binary(max_size=200).filter(harmless))
def test_nothing_but_noise_is_nothing(adapter: ScriptedAdapter, noise: bytes) -> None:
    state = adapter.read_with(lambda *_: noise or b"\0").state
    assert not state.valid.any()


# -- the port ------------------------------------------------------------------------------------------------


def test_a_missing_port_is_named() -> None:
    with pytest.raises(PortUnavailable, match="/dev/ttyNOWHERE does not exist; "):
        ServoBus("/dev/ttyNOWHERE", SO101_IDS)


def test_something_else_than_a_port_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(PortUnavailable, match="is not a serial port"):
        ServoBus(str(path), SO101_IDS)


def test_a_port_has_one_owner(servos: VirtualServos, bus: ServoBus) -> None:
    with pytest.raises(PortUnavailable, match=f"{servos.path} is in use by another program"):
        ServoBus(servos.path, SO101_IDS)
    bus.close()
    ServoBus(servos.path, SO101_IDS).close()


def test_a_port_that_another_program_has_locked_is_named(servos: VirtualServos) -> None:
    descriptor = os.open(servos.path, os.O_RDWR | os.O_NOCTTY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(PortUnavailable, match="in use"):
        ServoBus(servos.path, SO101_IDS)
    os.close(descriptor)


@pytest.mark.parametrize("ids", [(), (1, 1), (254,), (-1, 2)])
def test_ids_must_make_sense(servos: VirtualServos, ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="servo ids must"):
        ServoBus(servos.path, ids)


def test_a_lost_adapter_is_said_and_comes_back(tmp_path: Path) -> None:
    link = tmp_path / "arm"
    with virtual_bus(bank=arm_at()) as servos:
        servos.link(link)
        bus = ServoBus(str(link), SO101_IDS, timeout_s=PATIENT_S)
        assert bus.read().valid.all()
    with pytest.raises(BusLost, match="the servo adapter is gone"):
        bus.read()
    assert not bus.state.valid.any()
    assert bus.state.position_raw.tolist() == ANGLES_RAW.tolist()
    with pytest.raises(BusLost):
        bus.write_goals(ANGLES_RAW)
    with pytest.raises(PortUnavailable, match="does not exist"):
        bus.reopen()
    with pytest.raises(BusLost):
        bus.read()
    with virtual_bus(bank=arm_at()) as servos:
        servos.link(link)
        bus.reopen()
        assert bus.read().valid.all()
        assert bus.counters.reopens == 1
        bus.close()
    with pytest.raises(BusLost):
        bus.read()
