"""How a check in the guest tells its result, and the few waits that every check needs.

Each check program prints one JSON object a line, {"check", "ok", "detail"}, which the host makes a row of its table
(tests/vm/run.py). Figures stand in the detail whether they pass or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator


class CheckFailedError(Exception):
    """A check that has not held; the message is the row's detail."""


class Check:
    """One row in the making: details are collected as they are measured."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def note(self, detail: str) -> None:
        self.details.append(detail)

    def expect(self, held: bool, otherwise: str) -> None:
        if not held:
            raise CheckFailedError(otherwise)


@contextlib.contextmanager
def check(name: str) -> Iterator[Check]:
    """`with check("...") as row:` prints the row at the end; nothing that happens inside stops the next check."""
    row = Check()
    ok = False
    try:
        yield row
        ok = True
    except CheckFailedError as failure:
        row.note(str(failure))
    except Exception:  # noqa: BLE001 - a check that breaks is a failed row, and the table goes on
        row.note(" / ".join(traceback.format_exc().strip().splitlines()[-5:]))
    print(json.dumps({"check": name, "ok": ok, "detail": "; ".join(row.details)}), flush=True)


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds that it took; CheckFailedError if it never came true."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > timeout_s:
            raise CheckFailedError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.005)
    return time.monotonic() - start


def wait_for_path(path: str, present: bool = True, timeout_s: float = 15) -> float:
    """Seconds until a device node is there (or gone)."""
    what = f"{path} to {'appear' if present else 'go'}"
    return wait_for(lambda: os.path.lexists(path) == present, timeout_s, what)
