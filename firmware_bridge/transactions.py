"""What the two transactions of a tick carry: the servos' state in, goals out.

`ServoBus` (bus) moves the bytes; here they become arrays, and arrays become bytes. No I/O and no clock. A block of
replies is decoded at once where it is whole, reply by reply where it is not; a sync write is a template of which
only values and checksum change.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from firmware_bridge import packets, registers

Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


@dataclass
class ServoState:
    """The last known state of each servo, in the order of the ids given to the bus.

    The arrays are allocated once and overwritten in place by every read: copy what must be kept.
    `t_ns` is CLOCK_MONOTONIC when the last byte of the newest read was in this process;
    `t_request_ns` is when its request was handed to the kernel. A servo samples its own values
    between the two, about (index + 1) reply times after the request.
    """

    count: int
    t_ns: int = 0
    t_request_ns: int = 0
    position_raw: Int32Array = field(init=False)  # ticks of 4096 a turn, homing offset subtracted
    velocity_raw: Int32Array = field(init=False)  # ticks a second
    load_raw: Int32Array = field(init=False)  # 0.1 % of full PWM, signed by direction
    current_raw: Int32Array = field(init=False)  # 6.5 mA, signed by direction
    voltage_raw: UInt8Array = field(init=False)  # 0.1 V
    temperature_raw: UInt8Array = field(init=False)  # degrees Celsius
    status: UInt8Array = field(init=False)  # register 65: registers.ERROR_*
    moving: UInt8Array = field(init=False)  # 0 or 1
    error: UInt8Array = field(init=False)  # error byte of the status packet: registers.ERROR_*
    valid: BoolArray = field(init=False)  # a good reply of the newest read, and not an older value

    def __post_init__(self) -> None:
        # Two blocks with the fields as rows, also seen as one row, so that a read stores all in two assignments.
        self.signed_block: Int32Array = np.zeros((4, self.count), np.int32)
        self.byte_block: UInt8Array = np.zeros((5, self.count), np.uint8)
        self.signed_flat = self.signed_block.reshape(-1)
        self.byte_flat = self.byte_block.reshape(-1)
        self.position_raw, self.velocity_raw, self.load_raw, self.current_raw = self.signed_block
        self.voltage_raw, self.temperature_raw, self.status, self.moving, self.error = self.byte_block
        self.valid = np.zeros(self.count, np.bool_)


class FeedbackDecoder:
    """Decodes the replies to one kind of request, all servos at once or one by one.

    With struct and lists, and numpy only to store: after a tick's sleep the caches are cold, and then twenty small
    numpy calls took 60 to 110 us for six servos on a busy machine, and this about half.
    """

    # head, error, position, velocity, load, voltage, temperature, status, moving, current, checksum
    _FIELDS = 11
    _SIGN_BITS = tuple(
        registers.register(f"Present_{name}").sign_bit or 0 for name in ("Position", "Velocity", "Load", "Current")
    )

    def __init__(self, ids: tuple[int, ...], address: int, size: int) -> None:
        self.size = size
        self.packet_size = size + packets.OVERHEAD
        self.total_size = len(ids) * self.packet_size
        self._index = {servo_id: index for index, servo_id in enumerate(ids)}
        self._heads = b"".join(bytes((0xFF, 0xFF, servo_id, size + 2)) for servo_id in ids)
        before = registers.FEEDBACK_ADDRESS - address
        after = size - before - registers.FEEDBACK_SIZE
        reply = f"4sB{before}xHHHBBxBB2xH{after}xB"  # 64 is Reg_Write_Flag, 67 and 68 are unused
        self._unpack_all = struct.Struct("<" + reply * len(ids)).unpack
        self._unpack_one = struct.Struct("<" + reply).unpack

    def decode_whole(self, data: bytes, state: ServoState) -> bool:
        """Store all replies if `data` is exactly the replies of all servos in order, and nothing else."""
        if len(data) != self.total_size:
            return False
        for start in range(0, self.total_size, self.packet_size):
            # From id to checksum a good packet adds up to 255 modulo 256, since the checksum is the complement.
            if sum(data[start + 2 : start + self.packet_size]) & 0xFF != 0xFF:
                return False
        fields = self._unpack_all(data)
        if b"".join(fields[:: self._FIELDS]) != self._heads:
            return False
        _, error, position, velocity, load, voltage, temperature, status, moving, current, _ = self._columns(fields)
        words = zip((position, velocity, load, current), self._SIGN_BITS, strict=True)
        state.signed_flat[:] = [value for column, sign_bit in words for value in _signed(column, sign_bit)]
        state.byte_flat[:] = voltage + temperature + status + moving + error
        state.valid[:] = True
        return True

    def decode_one(self, packet: packets.Packet, state: ServoState) -> None:
        """Store one servo's reply."""
        index = self._index[packet.servo_id]
        fields = self._unpack_one(packets.status(packet.servo_id, packet.code, packet.data))
        _, error, position, velocity, load, voltage, temperature, status, moving, current, _ = self._columns(fields)
        words = zip((position, velocity, load, current), self._SIGN_BITS, strict=True)
        state.signed_block[:, index] = [_signed(column, sign_bit)[0] for column, sign_bit in words]
        state.byte_block[:, index] = voltage + temperature + status + moving + error
        state.valid[index] = True

    def _columns(self, fields: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [fields[at :: self._FIELDS] for at in range(self._FIELDS)]


def _signed(words: Sequence[int], sign_bit: int) -> Sequence[int]:
    """Sign-magnitude register words as numbers."""
    sign = 1 << sign_bit
    if max(words) < sign:
        return words
    magnitude = sign - 1
    return [-(word & magnitude) if word & sign else word & magnitude for word in words]


class SyncWriteTemplate:
    """A sync write to always the same servos and register, of which only values and checksum change."""

    def __init__(self, ids: tuple[int, ...], register: registers.Register) -> None:
        self._register = register
        self._ids = ids
        self._packet = bytearray(packets.sync_write(ids, register.address, [bytes(register.size)] * len(ids)))
        self._pack_into = struct.Struct("<" + ("BB" if register.size == 1 else "BH") * len(ids)).pack_into
        self._sign = 0 if register.sign_bit is None else 1 << register.sign_bit
        self._largest = (self._sign or 1 << 8 * register.size) - 1

    def fill(self, values: npt.ArrayLike) -> bytearray:
        """The packet that writes integer `values` [J]. Valid until the next call."""
        items: list[int] = []
        for servo_id, word in zip(self._ids, self._words(values), strict=True):
            items += (servo_id, word)
        self._pack_into(self._packet, 7, *items)
        self._packet[-1] = ~sum(self._packet[2:-1]) & 0xFF
        return self._packet

    def fill_some(self, values: npt.ArrayLike, to: npt.NDArray[np.bool_]) -> bytearray | bytes:
        """The same for the servos marked in `to`, bool [J]; empty where none is."""
        if to.all():
            return self.fill(values)
        chosen = [(i, word) for i, word, there in zip(self._ids, self._words(values), to, strict=True) if there]
        if not chosen:
            return b""
        size = self._register.size
        data = [word.to_bytes(size, "little") for _, word in chosen]
        return packets.sync_write([servo_id for servo_id, _ in chosen], self._register.address, data)

    def _words(self, values: npt.ArrayLike) -> list[int]:
        """What stands in the register for each value."""
        numbers = np.asarray(values)
        if numbers.dtype.kind not in "iub" or numbers.shape != (len(self._ids),):
            raise ValueError(f"{self._register.name} takes {len(self._ids)} integers, got {values!r}")
        words: list[int] = []
        for value in numbers.tolist():
            if abs(value) > self._largest or (value < 0 and not self._sign):
                raise ValueError(f"{self._register.name} does not take {value}")
            words.append(int(value) if value >= 0 else self._sign - value)
        return words
