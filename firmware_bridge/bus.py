"""The two bus transactions of a control tick: read all joints, write all goals.

`execute` owns one `ServoBus` and calls `read` and `write_goals` once a tick. Each is one system call
out, and a read then sleeps in poll() until the kernel holds all replies (VMIN), so that a good tick
wakes the process once. It promises that no servo and no noise on the wire ever raises or hangs: what
did not come keeps its last value with `valid` False, and everything is counted. Only a lost adapter
raises (`BusLost`): the caller holds the arm and calls `reopen` until it succeeds.

Writing a goal switches a servo's torque on by itself (STS firmware): do not write goals to a limp arm.
"""

import errno
import os
import select
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from firmware_bridge import packets, registers
from firmware_bridge.serial_port import PortUnavailable, close_port, open_port, set_wake_bytes

__all__ = ["BusCounters", "BusLost", "PortUnavailable", "ServoBus", "ServoState"]

# What an adapter may add to the wire time: USB frames of 1 ms, bursts, FTDI's latency timer at 1 ms,
# the servos' return delay, our own scheduling. Measured adapters stay under 3 ms.
REPLY_MARGIN_S = 0.005

# Replies carry no sequence number, so a reply that comes after its deadline looks like one to the next
# request. After an incomplete transaction the next one therefore asks for another block: the length
# field of its replies tells old from new. Each (address, size) contains the feedback block 56..70.
_BLOCKS = ((56, 15), (55, 16), (55, 17))

_MAX_VMIN = 255
_QUIET_WAITS = 2  # milliseconds without a byte after which a burst of replies is over (USB frames are 1 ms)
_READ_SIZE = 4096

Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


class BusLost(OSError):  # noqa: N818 - a state of the world that the loop lives with, not a mistake
    """The adapter is gone (unplugged, or the other end closed). Hold, then `reopen` until it is back."""


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
        # Two blocks with the fields as rows, so that a read stores all of them in two assignments.
        self.signed_block: Int32Array = np.zeros((4, self.count), np.int32)
        self.byte_block: UInt8Array = np.zeros((5, self.count), np.uint8)
        self.position_raw, self.velocity_raw, self.load_raw, self.current_raw = self.signed_block
        self.voltage_raw, self.temperature_raw, self.status, self.moving, self.error = self.byte_block
        self.valid = np.zeros(self.count, np.bool_)


@dataclass
class BusCounters:
    """What happened on the bus since it was opened first; all only ever grow.

    A reply that came damaged counts under `checksum_errors` (and its bytes under `garbage_bytes`); a
    servo without a good or a damaged reply by the deadline counts under `timeouts`.
    """

    reads: int = 0
    writes: int = 0
    timeouts: int = 0
    checksum_errors: int = 0
    garbage_bytes: int = 0
    servo_errors: int = 0  # replies whose error byte was not 0
    write_errors: int = 0  # packets the adapter did not take whole
    reopens: int = 0
    timeouts_by_servo: list[int] = field(default_factory=list)  # in the order of the ids
    checksum_errors_by_servo: list[int] = field(default_factory=list)


class ServoBus:
    """One serial bus with the servos of one arm."""

    def __init__(
        self, port: str, ids: Sequence[int], baudrate: int = 1_000_000, timeout_s: float | None = None
    ) -> None:
        """`timeout_s` is the time a read waits for its replies: by default their wire time at `baudrate` plus
        5 ms. Raises PortUnavailable (an OSError) with a sentence if the port cannot be had, ValueError for bad ids.
        """
        self.ids = tuple(ids)
        if not self.ids or len(set(self.ids)) != len(self.ids):
            raise ValueError(f"servo ids must be given and differ from each other, got {list(ids)}")
        if not all(0 <= servo_id <= registers.MAX_ID for servo_id in self.ids):
            raise ValueError(f"servo ids must be 0 to {registers.MAX_ID}, got {list(ids)}")
        self.port = port
        self.baudrate = baudrate
        count = len(self.ids)
        self._requests = [packets.sync_read(self.ids, address, size) for address, size in _BLOCKS]
        self._wire_s = packets.wire_time_s(
            len(self._requests[0]) + count * (_BLOCKS[0][1] + packets.OVERHEAD), baudrate
        )
        self.timeout_s = self._wire_s + REPLY_MARGIN_S if timeout_s is None else timeout_s
        self.state = ServoState(count)
        self.counters = BusCounters(timeouts_by_servo=[0] * count, checksum_errors_by_servo=[0] * count)
        self._decoders = [_BlockDecoder(self.ids, address, size) for address, size in _BLOCKS]
        self._block = 0
        self._goals = _SyncWriteTemplate(self.ids, registers.GOAL_POSITION)
        self._torque = _SyncWriteTemplate(self.ids, registers.TORQUE_ENABLE)
        self._descriptor = -1
        self._poll = select.poll()
        self._open()

    def read(self) -> ServoState:
        """One sync read of the feedback block of all servos; returns `state`, updated in place.

        Returns when every servo has answered or has had its turn, at the latest after `timeout_s`. Raises BusLost
        only.
        """
        state = self.state
        decoder = self._decoders[self._block]
        self._discard_input()
        state.t_request_ns = time.monotonic_ns()
        self._send(self._requests[self._block])
        deadline_ns = state.t_request_ns + int(self.timeout_s * 1e9)
        # One wake-up in the good case. Where a byte is missing the kernel does not wake us, so this wait
        # ends when all should be there by the wire's speed; _read_piecewise has the rest of the time.
        self._poll.poll(min(int(self._wire_s * 1e3) + 2, int(self.timeout_s * 1e3) + 1))
        data = self._read_available(decoder.total_size)
        self.counters.reads += 1
        if not decoder.decode_whole(data, state):
            self._read_piecewise(decoder, data, deadline_ns)
        if state.error.any():
            self.counters.servo_errors += int(np.count_nonzero(state.error[state.valid]))
        return state

    def write_goals(self, goal_raw: npt.ArrayLike) -> None:
        """One sync write of Goal_Position: int [J], ticks as `position_raw`. Switches torque on where it is off.

        Raises BusLost, and ValueError for a goal outside -32767..32767.
        """
        self._send(self._goals.fill(goal_raw))
        self.counters.writes += 1

    def write_torque(self, enabled: bool | Sequence[bool]) -> None:
        """One sync write of Torque_Enable: one value for all servos, or one for each. Raises BusLost."""
        self._send(self._torque.fill(np.broadcast_to(np.asarray(enabled, np.int32), (len(self.ids),))))
        self.counters.writes += 1

    def reopen(self) -> None:
        """Close and open the port again, after BusLost. Raises PortUnavailable while it is not back."""
        self.close()
        self._open()
        self.counters.reopens += 1

    def close(self) -> None:
        """Give the port back; the servos keep doing what they were told last."""
        if self._descriptor >= 0:
            close_port(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "ServoBus":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        self.state.valid[:] = False
        self._descriptor = open_port(self.port, self.baudrate)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)
        self._expect_block(0)

    def _expect_block(self, block: int) -> None:
        """Choose what the next read asks for, and when the kernel shall wake us: when all of it is there."""
        self._block = block
        try:
            set_wake_bytes(self._descriptor, min(self._decoders[block].total_size, _MAX_VMIN))
        except (OSError, termios.error) as error:
            raise self._lost(error) from error

    def _read_piecewise(self, decoder: "_BlockDecoder", data: bytes, deadline_ns: int) -> None:
        """The slow path: something is missing, damaged or in between. Take what is good."""
        state = self.state
        state.valid[:] = False
        scanner = packets.StatusScanner(self.ids, decoder.size)
        received, quiet_waits = len(data), 0
        while True:
            for packet in scanner.feed(data):
                decoder.decode_one(packet, state)
            # Where as many bytes have come as were asked for, the missing reply is among them, damaged.
            complete = received >= decoder.total_size and quiet_waits >= _QUIET_WAITS
            if complete or not self._still_awaited() or time.monotonic_ns() >= deadline_ns:
                break
            self._poll.poll(1)
            data = self._read_available(decoder.total_size)
            received += len(data)
            quiet_waits = 0 if data else quiet_waits + 1
        self.counters.garbage_bytes += scanner.garbage_bytes + scanner.pending
        outstanding = self._count_missing({self.ids.index(servo_id) for servo_id in scanner.damaged_ids})
        if outstanding or scanner.pending:
            self._expect_block((self._block + 1) % len(_BLOCKS))

    def _count_missing(self, damaged: set[int]) -> bool:
        """Count the servos without a good reply; returns whether one of theirs may still be on its way."""
        counters = self.counters
        outstanding = False
        for index in np.flatnonzero(~self.state.valid).tolist():
            if index in damaged:
                counters.checksum_errors += 1
                counters.checksum_errors_by_servo[index] += 1
            else:
                counters.timeouts += 1
                counters.timeouts_by_servo[index] += 1
                outstanding = True
        return outstanding

    def _still_awaited(self) -> bool:
        """Whether a reply may still come: servos answer in the order asked, so that all before the last good one
        have had their turn.
        """
        return not self.state.valid[-1]

    def _read_available(self, size: int) -> bytes:
        """What has arrived; `size` is how much may be expected. Empty if nothing has."""
        data = b""
        while len(data) < size:
            try:
                # The kernel hands over at most 64 bytes at a time while fewer than VMIN are asked of it.
                more = os.read(self._descriptor, _READ_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                raise self._lost(error) from error
            if not more:  # end of file: VMIN is at least 1, so this is no empty read
                raise self._lost(OSError(errno.EIO, "end of file"))
            data += more
        if data:
            self.state.t_ns = time.monotonic_ns()
        return data

    def _discard_input(self) -> None:
        """Late bytes of an earlier transaction and noise are not for this one."""
        self.counters.garbage_bytes += len(self._read_available(_READ_SIZE))

    def _send(self, packet: bytes | bytearray) -> None:
        try:
            sent = os.write(self._descriptor, packet)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._lost(error) from error
        if sent != len(packet):
            # The kernel's buffer is full because the adapter takes nothing. Half a packet is noise to the servos.
            self.counters.write_errors += 1

    def _lost(self, error: Exception) -> BusLost:
        self.state.valid[:] = False
        return BusLost(errno.ENODEV, f"{self.port}: the servo adapter is gone ({error}); waiting for its return")


class _BlockDecoder:
    """Decodes the replies to one kind of request, all servos at once or one by one."""

    # Where the fields lie, counted from address 56, in the order of ServoState's two blocks.
    _WORDS = ("Present_Position", "Present_Velocity", "Present_Load", "Present_Current")
    _BYTES = ("Present_Voltage", "Present_Temperature", "Status", "Moving")

    def __init__(self, ids: tuple[int, ...], address: int, size: int) -> None:
        self.size = size
        self.packet_size = size + packets.OVERHEAD
        self.total_size = len(ids) * self.packet_size
        self._index = {servo_id: index for index, servo_id in enumerate(ids)}
        self._shape = (len(ids), self.packet_size)
        self._heads = b"".join(bytes((0xFF, 0xFF, servo_id, size + 2)) for servo_id in ids)
        data_at = 5 - address  # the packet's data begin at byte 5
        words = [registers.register(name) for name in self._WORDS]
        low_bytes = [word.address + data_at for word in words]
        byte_at = [registers.register(name).address + data_at for name in self._BYTES] + [4]  # 4: the error byte
        self._columns = np.array([column for low in low_bytes for column in (low, low + 1)] + byte_at)
        self._sign_bits = np.array([[1 << (word.sign_bit or 0)] for word in words], np.int32)

    def decode_whole(self, data: bytes, state: ServoState) -> bool:
        """Store all replies if `data` is exactly the replies of all servos in order, and nothing else."""
        if len(data) != self.total_size:
            return False
        rows = np.frombuffer(data, np.uint8).reshape(self._shape)
        if rows[:, :4].tobytes() != self._heads:
            return False
        # From id to checksum a good packet adds up to 255 modulo 256, since the checksum is the complement.
        if (np.add.reduce(rows[:, 2:], axis=1, dtype=np.uint8) != 0xFF).any():
            return False
        self._store(rows, slice(None), state)
        return True

    def decode_one(self, packet: packets.Packet, state: ServoState) -> None:
        """Store one servo's reply."""
        row = np.frombuffer(packets.status(packet.servo_id, packet.code, packet.data), np.uint8)
        index = self._index[packet.servo_id]
        self._store(row.reshape(1, self.packet_size), slice(index, index + 1), state)

    def _store(self, rows: UInt8Array, servos: slice, state: ServoState) -> None:
        fields = rows.take(self._columns, axis=1)
        words = fields[:, :8].view("<u2").T.astype(np.int32)
        negative = (words & self._sign_bits) != 0
        words &= self._sign_bits - 1
        np.negative(words, out=words, where=negative)
        state.signed_block[:, servos] = words
        state.byte_block[:, servos] = fields[:, 8:].T
        state.valid[servos] = True


class _SyncWriteTemplate:
    """A sync write to always the same servos and register, of which only values and checksum change."""

    def __init__(self, ids: tuple[int, ...], register: registers.Register) -> None:
        self._register = register
        empty = bytes(register.size)
        self._packet = bytearray(packets.sync_write(ids, register.address, [empty] * len(ids)))
        self._bytes = np.frombuffer(self._packet, np.uint8)
        self._values = self._bytes[7:-1].reshape(len(ids), 1 + register.size)[:, 1:]
        self._limit = (1 << (8 * register.size if register.sign_bit is None else register.sign_bit)) - 1

    def fill(self, values: npt.ArrayLike) -> bytearray:
        """The packet that writes integer `values` [J]. Valid until the next call."""
        numbers = np.asarray(values)
        if numbers.dtype.kind not in "iub" or numbers.shape != (len(self._values),):
            raise ValueError(
                f"{self._register.name} takes {len(self._values)} integers, got {numbers.dtype} {numbers.shape}"
            )
        numbers = numbers.astype(np.int32)
        magnitude = np.abs(numbers)
        if magnitude.max() > self._limit or (self._register.sign_bit is None and numbers.min() < 0):
            raise ValueError(f"{self._register.name} does not take {numbers.tolist()}")
        if self._register.sign_bit is not None:
            magnitude |= (numbers < 0).astype(np.int32) << self._register.sign_bit
        self._values[:] = magnitude.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : self._register.size]
        self._bytes[-1] = ~int(self._bytes[2:-1].sum()) & 0xFF
        return self._packet
