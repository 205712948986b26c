"""A virtual servo bus that runs beside a test, in a thread of its own."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from firmware_bridge.servo_model import ServoBank
from firmware_bridge.virtual_servos import VirtualServos

SO101_IDS = (1, 2, 3, 4, 5, 6)


@contextmanager
def virtual_bus(
    ids: Sequence[int] = SO101_IDS, *, bank: ServoBank | None = None, **options: Any
) -> Iterator[VirtualServos]:
    """Servos on a pty, served until the block ends. Without wire time unless asked: tests do not measure."""
    servos = VirtualServos(bank or ServoBank(ids), **{"wire_time": False, **options})
    thread = threading.Thread(target=_serve, args=(servos,), daemon=True)
    thread.start()
    try:
        yield servos
    finally:
        servos.interrupt()
        thread.join()
        servos.stop()


def _serve(servos: VirtualServos) -> None:
    # Servos answer at once however busy the machine is; drivers under test give them 50 ms and no second try.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    servos.serve_forever()
