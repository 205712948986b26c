"""The absolute schedule: on the grid, and a late tick skips what it missed."""

from __future__ import annotations

import subprocess
import sys
import time

from device.realtime import PeriodicClock


def test_ticks_lie_on_one_grid() -> None:
    clock = PeriodicClock(200)
    times = [clock.wait()[0] for _ in range(10)]
    assert all((later - times[0]) % clock.period_ns == 0 for later in times)


def test_missed_periods_are_skipped_and_counted_never_bursted() -> None:
    clock = PeriodicClock(100)
    first, _ = clock.wait()
    time.sleep(0.055)
    second, _ = clock.wait()
    skipped = (second - first) // clock.period_ns - 1
    assert skipped >= 4
    assert clock.missed == skipped
    assert clock.tick == 2 + skipped
    third, _ = clock.wait()
    assert third - second == clock.period_ns * (1 + clock.missed - skipped)


def test_preparing_says_in_sentences_what_the_system_refuses() -> None:
    """In a process of its own: it locks memory and switches the collector off."""
    code = (
        "import gc, os, resource\n"
        "from device.realtime import prepare\n"
        "resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "refused = prepare(50, 4095)\n"
        "assert not gc.isenabled()\n"
        "print('|'.join(refused))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SCHED_FIFO 50 was refused" in result.stdout
    assert "core 4095 was refused" in result.stdout
