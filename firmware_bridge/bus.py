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
from firmware_bridge.transactions import FeedbackDecoder, ServoState, SyncWriteTemplate

__all__ = ["BusCounters", "BusLost", "PortUnavailable", "ServoBus", "ServoState"]

# What an adapter may add to the wire time: USB frames of 1 ms, bursts, FTDI's latency timer at 1 ms,
# the servos' return delay, our own scheduling. An estimate; a cell may give its own timeout.
REPLY_MARGIN_S = 0.005
LATE_REPLY_S = 0.02  # after which nobody answers any more

# Replies carry no sequence number, so a reply that comes after its deadline looks like one to the next
# request. After an incomplete transaction the next one therefore asks for another block: the length
# field of its replies tells old from new. Each (address, size) contains the feedback block 56..70.
_BLOCKS = ((56, 15), (55, 16), (55, 17))

_MAX_VMIN = 255
_QUIET_WAITS = 2  # milliseconds without a byte after which a burst of replies is over (USB frames are 1 ms)
_READ_SIZE = 4096


class BusLost(OSError):  # noqa: N818 - a state of the world that the loop lives with, not a mistake
    """The adapter is gone (unplugged, or the other end closed). Hold, then `reopen` until it is back."""


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
        # One wake-up in the good case. Where a byte is missing the kernel does not wake us, so the first wait of a
        # read ends when all should be there by the wire's speed; _read_piecewise has the rest of the time.
        self._first_wait_ms = min(int(self._wire_s * 1e3) + 2, int(self.timeout_s * 1e3) + 1)
        self.state = ServoState(count)
        self.counters = BusCounters(timeouts_by_servo=[0] * count, checksum_errors_by_servo=[0] * count)
        self._decoders = [FeedbackDecoder(self.ids, address, size) for address, size in _BLOCKS]
        self._no_errors = bytes(count)
        self._late_bytes_possible = True
        self._block = 0
        self._goals = SyncWriteTemplate(self.ids, registers.GOAL_POSITION)
        self._torque = SyncWriteTemplate(self.ids, registers.TORQUE_ENABLE)
        self._speed_limits = SyncWriteTemplate(self.ids, registers.register("Goal_Velocity"))
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
        if self._late_bytes_possible:
            self._discard_input()
        state.t_request_ns = time.monotonic_ns()
        self._send(self._requests[self._block])
        deadline_ns = state.t_request_ns + int(self.timeout_s * 1e9)
        self._poll.poll(self._first_wait_ms)
        data = self._read_available(decoder.total_size)
        self.counters.reads += 1
        if not decoder.decode_whole(data, state):
            self._read_piecewise(decoder, data, deadline_ns)
        if state.error.tobytes() != self._no_errors:
            self.counters.servo_errors += int(np.count_nonzero(state.error[state.valid]))
        return state

    def write_goals(self, goal_raw: npt.ArrayLike, to: npt.ArrayLike | None = None) -> None:
        """One sync write of Goal_Position: int [J], ticks as `position_raw`. Switches torque on where it is off.

        `to`, bool [J], names the servos that are written to (all by default). Raises BusLost, and ValueError for a goal
        outside -32767..32767.
        """
        self._write(self._goals, goal_raw, to)

    def write_torque(self, enabled: bool | Sequence[bool], to: npt.ArrayLike | None = None) -> None:
        """One sync write of Torque_Enable: one value for all servos, or one for each. Raises BusLost."""
        self._write(self._torque, np.broadcast_to(np.asarray(enabled, np.int32), (len(self.ids),)), to)

    def write_speed_limits(self, velocity_raw: npt.ArrayLike, to: npt.ArrayLike | None = None) -> None:
        """One sync write of Goal_Velocity, which in position mode caps the speed: int [J], ticks/s. Raises BusLost.

        The register is lost when a servo loses power; 0 means as fast as it can.
        """
        self._write(self._speed_limits, velocity_raw, to)

    def _write(self, template: SyncWriteTemplate, values: npt.ArrayLike, to: npt.ArrayLike | None) -> None:
        packet = template.fill(values) if to is None else template.fill_some(values, np.asarray(to, np.bool_))
        if packet:
            self._send(packet)
            self.counters.writes += 1

    def read_register(self, name: str) -> dict[int, int]:
        """One sync read of any register: its signed value by servo id, of the servos that answered well.

        For before the loop, or while it has no arm: waits for late replies where one is missing, since the next
        request could not tell them from its own. Raises BusLost.
        """
        register = registers.register(name)
        scanner = packets.StatusScanner(self.ids, register.size)
        found: dict[int, int] = {}
        try:
            set_wake_bytes(self._descriptor, 1)
            self._discard_input()
            self._send(packets.sync_read(self.ids, register.address, register.size))
            deadline_ns = time.monotonic_ns() + int((self.timeout_s + LATE_REPLY_S) * 1e9)
            while len(found) < len(self.ids) and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
                self._poll.poll(left_ns / 1e6)
                for packet in scanner.feed(self._read_available(1)):
                    found[packet.servo_id] = register.decode(packet.data)
        except (OSError, termios.error) as error:
            raise self._lost(error) from error
        self._late_bytes_possible = True
        self._expect_block(self._block)
        return found

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
        self._late_bytes_possible = True
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

    def _read_piecewise(self, decoder: FeedbackDecoder, data: bytes, deadline_ns: int) -> None:
        """The slow path: something is missing, damaged or in between. Take what is good."""
        state = self.state
        self._late_bytes_possible = True
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
        """Late bytes of an earlier transaction are not for this one. After a whole transaction there are none; if
        noise comes instead, it is skipped where it is found.
        """
        self._late_bytes_possible = False
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
