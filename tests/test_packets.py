"""The wire format: what is sent, and what is found again in a stream of anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_bridge import packets, registers
from firmware_bridge.packets import InstructionScanner, Packet, StatusScanner

IDS = (1, 2, 3, 4, 5, 6)
SIZE = 15

payloads = st.binary(min_size=SIZE, max_size=SIZE)
replies = st.builds(Packet, st.sampled_from(IDS), st.integers(0, 255), payloads)


def encoded(reply: Packet) -> bytes:
    return packets.status(*reply)


def forges_a_reply(noise: bytes) -> bool:
    """Whether noise holds what looks like the head of an awaited reply; then nothing can tell it apart."""
    return any(bytes((0xFF, 0xFF, servo_id)) in noise + bytes((servo_id,)) for servo_id in IDS) or noise.endswith(
        b"\xff"
    )


noise = st.binary(max_size=40).filter(lambda data: not forges_a_reply(data))


def test_the_example_of_the_protocol_manual() -> None:
    # "Read the present position of servo 1": FF FF 01 04 02 38 02 BE; reply with position 0x0518.
    assert packets.read(1, 0x38, 2).hex(" ") == "ff ff 01 04 02 38 02 be"
    assert packets.status(1, 0, b"\x18\x05").hex(" ") == "ff ff 01 04 00 18 05 dd"


def test_a_sync_read_names_all_servos_in_one_packet() -> None:
    assert packets.sync_read((1, 2), 0x38, 8).hex(" ") == "ff ff fe 06 82 38 08 01 02 36"


def test_a_sync_write_carries_each_servo_its_own_data() -> None:
    packet = packets.sync_write((1, 2), 42, [b"\x00\x08", b"\x01\x08"])
    assert packet[5:-1] == bytes((42, 2, 1, 0x00, 0x08, 2, 0x01, 0x08))


def test_wire_time_counts_ten_bits_a_byte() -> None:
    assert packets.wire_time_s(100, 1_000_000) == pytest.approx(1e-3)


@given(st.lists(replies, max_size=8))
def test_replies_in_a_row_are_all_found(sent: list[Packet]) -> None:
    scanner = StatusScanner(IDS, SIZE)
    assert list(scanner.feed(b"".join(map(encoded, sent)))) == sent
    assert scanner.garbage_bytes == 0


@given(st.lists(st.tuples(noise, replies), min_size=1, max_size=6), noise, st.data())
def test_any_noise_before_and_between_replies_is_skipped_and_counted(
    parts: list[tuple[bytes, Packet]], tail: bytes, data: st.DataObject
) -> None:
    stream = b"".join(before + encoded(reply) for before, reply in parts) + tail
    cut = data.draw(st.integers(0, len(stream)))
    scanner = StatusScanner(IDS, SIZE)
    found = [*scanner.feed(stream[:cut]), *scanner.feed(stream[cut:])]
    assert found == [reply for _, reply in parts]
    assert scanner.garbage_bytes + scanner.pending == sum(len(before) for before, _ in parts) + len(tail)


@given(st.lists(replies, min_size=1, max_size=6), st.data())
def test_a_stream_cut_anywhere_yields_every_reply_before_the_cut(sent: list[Packet], data: st.DataObject) -> None:
    stream = b"".join(map(encoded, sent))
    cut = data.draw(st.integers(0, len(stream)))
    whole = cut // (SIZE + packets.OVERHEAD)
    assert list(StatusScanner(IDS, SIZE).feed(stream[:cut])) == sent[:whole]


@given(replies, st.data())
def test_one_damaged_byte_never_passes(reply: Packet, data: st.DataObject) -> None:
    """All that the protocol's checksum promises: two damaged bytes that cancel out do pass."""
    damaged = bytearray(encoded(reply))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    assert list(StatusScanner(IDS, SIZE).feed(bytes(damaged))) == []


@given(st.binary(max_size=600))
def test_scanners_take_anything(data: bytes) -> None:
    for reply in StatusScanner(IDS, SIZE).feed(data):
        assert encoded(reply) in data
    for found in InstructionScanner().feed(data):
        assert packets.instruction(*found) in data


def test_a_reply_of_another_size_is_not_taken_for_the_awaited_one() -> None:
    """What tells a late reply of the last request from one to this request."""
    late, new = packets.status(3, 0, bytes(15)), packets.status(3, 0, bytes(16))
    assert [len(reply.data) for reply in StatusScanner(IDS, 16).feed(late + new)] == [16]


@given(st.lists(st.builds(Packet, st.integers(0, 254), st.integers(1, 255), st.binary(max_size=30)), max_size=5))
def test_instructions_are_found_in_any_pieces(sent: list[Packet]) -> None:
    scanner = InstructionScanner()
    stream = b"".join(packets.instruction(*packet) for packet in sent)
    found = [packet for at in range(0, len(stream), 7) for packet in scanner.feed(stream[at : at + 7])]
    assert found == sent


@pytest.mark.parametrize("register", registers.CONTROL_TABLE, ids=lambda register: register.name)
def test_every_register_returns_what_was_put_in(register: registers.Register) -> None:
    largest = (1 << (8 * register.size if register.sign_bit is None else register.sign_bit)) - 1
    smallest = 0 if register.sign_bit is None else -largest
    for value in (smallest, 0, 1, register.default, largest):
        assert register.decode(register.encode(value)) == value
    for value in (smallest - 1, largest + 1):
        with pytest.raises(ValueError, match=register.name):
            register.encode(value)


def test_registers_do_not_overlap() -> None:
    taken = [register.address + k for register in registers.CONTROL_TABLE for k in range(register.size)]
    assert len(taken) == len(set(taken))


def test_error_bits_have_names() -> None:
    assert registers.error_names(registers.ERROR_OVERLOAD | registers.ERROR_VOLTAGE) == ["voltage", "overload"]


def test_an_unknown_register_is_named_with_its_neighbours() -> None:
    with pytest.raises(KeyError, match="Goal_Position"):
        registers.register("Target_Position")
