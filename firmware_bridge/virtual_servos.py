"""Emulated servo firmware behind a real pty: what any driver takes for an arm on a USB adapter.

`understudy virtual-servos` runs `serve`; the virtual cell puts `VirtualServos` into its own loop with
`fileno`, `due_in_s` and `serve_once`, next to its physics; tests run `serve_forever` in a process of its own.
Bytes take their time on the wire at the servo's baud rate in both directions, a servo hears only a port
that is set to its baud rate, and faults (servo_faults) strike replies by script or by chance. Serving never
blocks longer than asked and never raises because of what a client sends.
"""

import contextlib
import os
import select
import signal
import time
import tty
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from firmware_bridge import packets
from firmware_bridge.serial_port import get_baudrate
from firmware_bridge.servo_faults import Fault, FaultPlan, load_faults, parse_faults
from firmware_bridge.servo_model import ServoBank

PHYSICS_STEP_S = 0.002
# A pause on the wire after which the beginning of a packet is forgotten. Estimate; no packet at 38400 baud
# is interrupted for so long.
PACKET_PAUSE_S = 0.02
_FAULT_FILE_PERIOD_S = 0.1


class VirtualServos:
    """A pty whose other end is a bus of servos. Close it with `stop`."""

    def __init__(
        self,
        bank: ServoBank,
        faults: Iterable[Fault] = (),
        wire_time: bool = True,
        adapter_period_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`wire_time` False answers at once, for tests that want speed. `adapter_period_s` makes the adapter hand
        bytes over in bursts, at multiples of that period (USB frames: 0.001; an FTDI chip as it comes: 0.016).
        """
        self.bank = bank
        self.faults = FaultPlan(seed)
        self.requests = 0
        self._wire_time = wire_time
        self._adapter_period_s = adapter_period_s
        self._master, self._slave = os.openpty()  # the slave stays open: clients may come and go
        tty.setraw(self._slave)
        os.set_blocking(self._master, False)
        self.path = os.ttyname(self._slave)
        self._outgoing: deque[tuple[float, bytes]] = deque()  # due, bytes
        self._wire_free_s = 0.0
        self._last_byte_s = 0.0
        self._links: list[Path] = []
        self._fault_file: Path | None = None
        self._fault_file_seen: tuple[int, int] | None = None
        self._fault_file_due_s = 0.0
        self._errors_forced = False
        self._running = True
        for fault in faults:
            self.add_fault(fault)

    def fileno(self) -> int:
        """For poll loops: readable when a client has sent something."""
        return self._master

    def add_fault(self, fault: Fault | dict[str, Any]) -> None:
        """Put a fault in force; its `at_s` counts from now. Safe from another thread, like `clear_faults`."""
        entry = parse_faults([fault])[0] if isinstance(fault, dict) else fault
        self.faults.add(entry, time.monotonic())

    def clear_faults(self) -> None:
        """End all faults."""
        self.faults.clear()

    def follow_fault_file(self, path: Path) -> None:
        """Take the faults from a script file, again whenever it changes. ValueError if it is wrong now."""
        load_faults(path)
        self._fault_file = path

    def link(self, path: Path) -> None:
        """Make `path` a symbolic link to the pty, in place of an older one; removed by `stop`."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.path)
        temporary.replace(path)
        self._links.append(path)

    def due_in_s(self) -> float | None:
        """Seconds until a reply must be handed over; None when none is on its way."""
        return max(0.0, self._outgoing[0][0] - time.monotonic()) if self._outgoing else None

    def serve_once(self, timeout_s: float = 0.0) -> None:
        """Wait at most `timeout_s` for something to do, and do it: take requests, hand over replies that are due."""
        due_s = self.due_in_s()
        select.select([self._master], [], [], timeout_s if due_s is None else min(timeout_s, due_s))
        now_s = time.monotonic()
        self._follow_faults(now_s)
        with contextlib.suppress(BlockingIOError):
            self._receive(os.read(self._master, 4096), now_s)
        self._hand_over(time.monotonic())

    def serve_forever(self, step_s: float = PHYSICS_STEP_S, until: Callable[[], bool] = lambda: False) -> None:
        """Serve and step the servos in real time, until `stop` is called or `until()` is true."""
        next_step_s = time.monotonic() + step_s
        while self._running and not until():
            self.serve_once(max(0.0, next_step_s - time.monotonic()))
            behind = int((time.monotonic() - next_step_s) / step_s) + 1
            for _ in range(min(behind, 50)):  # after a long pause the servos do not live through all of it
                self.bank.step(step_s)
            next_step_s += max(behind, 0) * step_s

    def stop(self) -> None:
        """Close the pty: clients see their adapter unplugged."""
        self._running = False
        for link in self._links:
            if link.is_symlink() and str(link.readlink()) == self.path:
                link.unlink()
        self._links.clear()
        for descriptor in (self._master, self._slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def interrupt(self) -> None:
        """Let `serve_forever` return; safe in a signal handler."""
        self._running = False

    def _receive(self, data: bytes, now_s: float) -> None:
        if now_s - self._last_byte_s > PACKET_PAUSE_S:
            self.bank.forget_partial_packet()
        self._last_byte_s = now_s
        baudrate = get_baudrate(self._master)
        self._wire_free_s = max(now_s, self._wire_free_s) + self._on_wire_s(len(data), baudrate)
        deaf = {place for place in range(len(self.bank.ids)) if self.bank.baudrate(place) != baudrate}
        if self.faults:
            deaf |= self.faults.deaf(self.bank.ids, now_s)
        ids = self.bank.ids  # before a write of ID changes them
        for reply in self.bank.handle(data, deaf):
            packet, late_s = reply.packet, 0.0
            if self.faults:
                packet, late_s = self.faults.spoil(ids[reply.place], packet, now_s)
            self._wire_free_s += reply.delay_s if self._wire_time else 0.0
            self._wire_free_s += self._on_wire_s(len(reply.packet), baudrate)
            self._send_at(self._wire_free_s + late_s, packet)
        self.requests += 1

    def _on_wire_s(self, count: int, baudrate: int) -> float:
        return packets.wire_time_s(count, baudrate) if self._wire_time else 0.0

    def _send_at(self, due_s: float, packet: bytes) -> None:
        if self._adapter_period_s:
            due_s = (due_s // self._adapter_period_s + 1) * self._adapter_period_s
        if not packet:
            return
        later = len(self._outgoing)
        while later and self._outgoing[later - 1][0] > due_s:
            later -= 1
        self._outgoing.insert(later, (due_s, packet))

    def _hand_over(self, now_s: float) -> None:
        ready = bytearray()
        while self._outgoing and self._outgoing[0][0] <= now_s:
            ready += self._outgoing.popleft()[1]
        if ready:
            with contextlib.suppress(BlockingIOError):  # nobody reads and the pty is full: lost, as on a real bus
                os.write(self._master, ready)

    def _follow_faults(self, now_s: float) -> None:
        if self._fault_file is not None and now_s >= self._fault_file_due_s:
            self._fault_file_due_s = now_s + _FAULT_FILE_PERIOD_S
            self._read_fault_file(self._fault_file, now_s)
        if not self.faults:
            if self._errors_forced:
                self.bank.forced_error[:] = 0
                self._errors_forced = False
            return
        self._errors_forced = True
        ids = self.bank.ids
        for place in self.faults.due_reboots(ids, now_s):
            self.bank.reboot_at(place)
        self.bank.forced_error[:] = [self.faults.error_bits(servo_id, now_s) for servo_id in ids]
        self.faults.expire(now_s)

    def _read_fault_file(self, path: Path, now_s: float) -> None:
        try:
            stat = path.stat()
            if (stat.st_mtime_ns, stat.st_size) == self._fault_file_seen:
                return
            self._fault_file_seen = (stat.st_mtime_ns, stat.st_size)
            faults = load_faults(path)
        except (OSError, ValueError) as error:
            # The servos go on with the faults they have: a half-written script is read again when it is whole.
            print(f"virtual servos: {error}", flush=True)
            return
        self.clear_faults()
        for fault in faults:
            self.faults.add(fault, now_s)


def serve(
    ids: Sequence[int], link: Path | None = None, faults: Path | None = None, until: Callable[[], bool] = lambda: False
) -> None:
    """Emulate servos with these ids until SIGINT or SIGTERM; prints the pty's path on the first line.

    `link` is a symbolic link to make to it, `faults` a fault script that may be changed while this runs.
    """
    servos = VirtualServos(ServoBank(ids))
    try:
        if faults is not None:
            servos.follow_fault_file(faults)
        if link is not None:
            servos.link(link)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: servos.interrupt())
        print(servos.path, flush=True)
        servos.serve_forever(until=until)
    finally:
        servos.stop()
