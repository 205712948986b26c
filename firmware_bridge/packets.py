"""The wire format of Feetech's serial servos: packets to bytes and bytes to packets.

A packet is `FF FF id length body... checksum`, where length counts the body and the checksum, and
the checksum is the complement of the low byte of the sum of everything between header and checksum.
In an instruction the body is an instruction code and its parameters, in a reply (status packet) an
error byte and the data. The bus uses the builders and `StatusScanner`, the emulated firmware uses
`InstructionScanner`. Both scanners find the next packet after any garbage and never raise.
Source: Feetech "Communication protocol manual, SCS series"; instruction codes as in FTServo `INST.h`.

The checksum has 8 bits and no burst detection: it catches every single wrong byte, but about one in
256 of packets with several wrong bytes still passes. Nothing above this layer can tell.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

HEADER = b"\xff\xff"
OVERHEAD = 6  # header 2, id, length, instruction or error, checksum

PING = 0x01
READ = 0x02
WRITE = 0x03
REG_WRITE = 0x04
ACTION = 0x05
REBOOT = 0x08
SYNC_READ = 0x82
SYNC_WRITE = 0x83

BITS_PER_BYTE = 10  # 8N1: start bit, eight data bits, stop bit


def checksum(body: Iterable[int]) -> int:
    """The checksum of a packet; `body` is everything between the header and the checksum."""
    return ~sum(body) & 0xFF


def instruction(servo_id: int, code: int, parameters: bytes = b"") -> bytes:
    """An instruction packet."""
    body = bytes((servo_id, len(parameters) + 2, code)) + parameters
    return HEADER + body + bytes((checksum(body),))


def status(servo_id: int, error: int, data: bytes = b"") -> bytes:
    """A servo's reply. It has the layout of an instruction, with the error byte in the code's place."""
    return instruction(servo_id, error, data)


def read(servo_id: int, address: int, size: int) -> bytes:
    return instruction(servo_id, READ, bytes((address, size)))


def write(servo_id: int, address: int, data: bytes) -> bytes:
    return instruction(servo_id, WRITE, bytes((address,)) + data)


def sync_read(ids: Sequence[int], address: int, size: int) -> bytes:
    """One request that every servo in `ids` answers, in that order."""
    return instruction(0xFE, SYNC_READ, bytes((address, size, *ids)))


def sync_write(ids: Sequence[int], address: int, data: Sequence[bytes]) -> bytes:
    """One instruction that writes `data[i]`, all of one length, into servo `ids[i]`. Nobody answers."""
    size = len(data[0])
    parameters = b"".join(bytes((servo_id,)) + item for servo_id, item in zip(ids, data, strict=True))
    return instruction(0xFE, SYNC_WRITE, bytes((address, size)) + parameters)


def wire_time_s(byte_count: int, baudrate: int) -> float:
    """How long that many bytes take on the wire."""
    return byte_count * BITS_PER_BYTE / baudrate


class Packet(NamedTuple):
    """An instruction (`code` is the instruction) or a reply (`code` is the error byte)."""

    servo_id: int
    code: int
    data: bytes


class StatusScanner:
    """Finds the replies of one transaction in a stream of bytes that may hold anything.

    It knows whose replies of which size are awaited, and so rejects a damaged length at once instead
    of waiting for bytes that never come. Counts what it had to skip.
    """

    def __init__(self, awaited_ids: Iterable[int], data_size: int) -> None:
        self._awaited = frozenset(awaited_ids)
        self._length = data_size + 2
        self._buffer = bytearray()
        self.garbage_bytes = 0
        self.damaged_ids: list[int] = []  # replies in full length whose checksum failed

    @property
    def pending(self) -> int:
        """Bytes kept back because they may be the start of a reply."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Yield the replies that `data` completes, in the order of the wire."""
        buffer = self._buffer
        buffer += data
        packet_size = self._length + 4
        at = 0
        while at < len(buffer):
            if not self._may_start_at(at):
                at += 1
                self.garbage_bytes += 1
                continue
            if len(buffer) - at < packet_size:
                break
            body = buffer[at + 2 : at + packet_size - 1]
            if checksum(body) == buffer[at + packet_size - 1]:
                yield Packet(body[0], body[2], bytes(body[3:]))
                at += packet_size
            else:
                self.damaged_ids.append(body[0])
                at += 1
                self.garbage_bytes += 1
        del buffer[:at]

    def _may_start_at(self, at: int) -> bool:
        head = self._buffer[at : at + 4]
        return (
            head[:2] == HEADER[: len(head)]
            and (len(head) < 3 or head[2] in self._awaited)
            and (len(head) < 4 or head[3] == self._length)
        )


class InstructionScanner:
    """Finds instruction packets in a stream of bytes, as a servo's receiver does."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def clear(self) -> None:
        self._buffer.clear()

    def feed(self, data: bytes) -> list[Packet]:
        """The instructions that `data` completes; damaged ones are skipped, as the servo skips them."""
        buffer = self._buffer
        buffer += data
        found: list[Packet] = []
        while True:
            start = buffer.find(HEADER)
            if start < 0:
                del buffer[: max(0, len(buffer) - 1)]  # the last byte may be half a header
                return found
            del buffer[:start]
            while buffer[2:3] == b"\xff":  # FF FF FF id: the header is the last two of them
                del buffer[0]
            if len(buffer) < 4:
                return found
            length = buffer[3]
            if length < 2:
                del buffer[0]
                continue
            if len(buffer) < length + 4:
                return found
            body = bytes(buffer[2 : length + 3])
            if checksum(body) == buffer[length + 3]:
                found.append(Packet(body[0], body[2], body[3:]))
                del buffer[: length + 4]
            else:
                del buffer[0]
