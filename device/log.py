"""Logs are events with stable names and fields: `bus.lost port=/dev/ttyACM0 reason="..."`, one per change of state.

The journal is the interface of whoever is on call, so a name is never reworded and a tick never logs. Roles call
`set_up` once and `event` when something changed; `Once` turns a condition that is looked at every tick into the two
events at its edges.
"""

from __future__ import annotations

import json
import logging
import os
import select
from collections.abc import Callable

# Libraries speak up from WARNING on; our own events are the log.
OURS = ("world", "capture", "execute", "predict", "topic")

_STANDARD_ERROR = 2

Field = str | int | float | bool | None


class NonBlockingHandler(logging.Handler):
    """Writes lines to a descriptor and never waits for its reader: what does not fit is dropped and counted.

    A full pipe or a stopped terminal must not stop a control loop.
    """

    _ATOMIC = 4096  # PIPE_BUF: a pipe that is writable takes so much without blocking

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.dropped = 0
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode(errors="replace")[: self._ATOMIC]
        try:
            if any(events & select.POLLOUT for _, events in self._poll.poll(0)):
                os.write(self._descriptor, line)
                return
        except OSError:
            pass
        self.dropped += 1


def set_up(level: int = logging.INFO) -> None:
    """Send events to standard error, where systemd's journal (or a terminal) adds the time itself."""
    handler = NonBlockingHandler(_STANDARD_ERROR)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(name)s: %(message)s", force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: Field) -> None:
    """Log one event; fields in the order given, strings with blanks quoted as JSON."""
    parts = [name, *(f"{key}={_show(value)}" for key, value in fields.items())]
    logger.log(level, " ".join(parts))


def _show(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value and not any(character in value for character in ' "=\n\t'):
        return value
    return json.dumps(value)


class Once:
    """A condition looked at again and again: `begins` is called when it turns true, `ends` when it turns false."""

    def __init__(self, begins: Callable[..., None], ends: Callable[[], None] | None = None) -> None:
        self._begins = begins
        self._ends = ends
        self.active = False

    def update(self, active: bool, *details: Field) -> None:
        if active and not self.active:
            self._begins(*details)
        elif self.active and not active and self._ends is not None:
            self._ends()
        self.active = active
