"""What a control process asks of the kernel, and the absolute schedule that it then keeps.

`execute` calls `prepare` once after warm-up and `PeriodicClock.wait` once a tick. What the system refuses (no
CAP_SYS_NICE, no memory lock) is returned as sentences and logged; the loop runs all the same, less evenly. A missed
period is skipped and counted, never bursted, as ros2_control does it: an arm must not replay the past.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import time

_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def prepare(priority: int | None, cpu: int | None) -> list[str]:
    """Lock memory, take SCHED_FIFO and a core, switch the garbage collector off. Returns what was refused, and why.

    The collector is switched off, not only frozen: a generation-2 pass over a large heap costs hundreds of
    milliseconds, and the loop allocates no cycles.
    """
    refused: list[str] = []
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY:
        # Locked under a finite limit, a later mapping (a topic's new file) would fail instead.
        refused.append(f"memory is not locked (the limit is {soft} bytes): set LimitMEMLOCK=infinity")
    elif _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        refused.append(f"memory is not locked ({os.strerror(ctypes.get_errno())}): set LimitMEMLOCK=infinity")
    # Default slack is 50 us for threads that are not real-time; it delays every wake-up.
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    if priority is not None:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        except OSError as error:
            refused.append(f"SCHED_FIFO {priority} was refused ({error.strerror}): raise LimitRTPRIO")
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            refused.append(f"core {cpu} was refused ({error.strerror}): this machine has {os.cpu_count()} cores")
    gc.collect()
    gc.freeze()
    gc.disable()
    return refused


def die_with_parent() -> None:
    """Be sent SIGTERM when the parent process dies, however it dies (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)


def sleep_until(t_ns: int) -> None:
    """Sleep to an absolute CLOCK_MONOTONIC time; returns at once when it has passed."""
    deadline = _Timespec(t_ns // 1_000_000_000, t_ns % 1_000_000_000)
    while _libc.clock_nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(deadline), None) != 0:
        pass  # EINTR: a signal handler ran; sleep on to the same absolute time


class PeriodicClock:
    """An absolute grid of ticks. Attributes: period_ns; tick (index on the grid); missed (periods skipped so far)."""

    def __init__(self, rate_hz: float) -> None:
        self.period_ns = round(1e9 / rate_hz)
        self.tick = 0
        self.missed = 0
        self._next_ns = time.monotonic_ns() + self.period_ns

    def wait(self) -> tuple[int, int]:
        """Sleep to the next tick. Returns (its scheduled time, lateness of the wake-up), both in ns.

        When one or more whole periods have already gone by, they are counted in `missed` and skipped.
        """
        behind = (time.monotonic_ns() - self._next_ns) // self.period_ns
        if behind > 0:
            self.missed += behind
            self.tick += behind
            self._next_ns += behind * self.period_ns
        scheduled = self._next_ns
        sleep_until(scheduled)
        self.tick += 1
        self._next_ns += self.period_ns
        return scheduled, time.monotonic_ns() - scheduled
