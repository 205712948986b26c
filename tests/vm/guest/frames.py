"""The capture role under test, and its frames topic as another role sees it, with figures about what was seen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.vm.guest.role import Role


@dataclass(frozen=True)
class Seen:
    """One record of the frames topic."""

    t_ns: int
    sequence: int
    jpeg: bytes
    width: int
    height: int
    read_ns: int


class CaptureRole(Role):
    """One `understudy run capture` process and a reader of its topic."""

    def __init__(self, cell: Path, camera: str) -> None:
        super().__init__("capture", cell, "--camera", camera)
        self.reader = self.topic(f"frames/{camera}")

    def changes(self, since: int = 0) -> list[str]:
        """Events but those of damage: on a busy host a driver skips a frame now and then."""
        return [name for name in self.names(since) if name not in ("camera.damaged", "camera.clean")]

    def wait_until_clean(self) -> None:
        """Let damage that a busy host has caused end, so that it is not taken for the check's."""
        names = self.names()
        if "camera.damaged" in names:
            last = len(names) - 1 - names[::-1].index("camera.damaged")
            self.wait_for_event("camera.clean", last)

    def collect(self, seconds: float) -> list[Seen]:
        """What is published from now on for so long."""
        _, cursor, _ = self.reader.since(0)
        seen: list[Seen] = []
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.reader.wait(left, cursor):
                records, cursor, _ = self.reader.since(cursor)
                seen += [_seen(record) for record in records]
        return seen


def steady(role: CaptureRole, seconds: float, good: Callable[[list[Seen]], bool], attempts: int = 4) -> list[Seen]:
    """The first stretch that is good, or the last one tried.

    A busy host stops the whole machine for tenths of a second, and vivid then skips frames of itself; what capture
    itself does wrong is wrong in every stretch.
    """
    for _ in range(attempts):
        seen = role.collect(seconds)
        if good(seen):
            break
    return seen


def _seen(record: np.void) -> Seen:
    size = int(record["size"])
    return Seen(
        int(record["t_ns"]),
        int(record["sequence"]),
        record["data"][:size].tobytes(),
        int(record["width"]),
        int(record["height"]),
        time.monotonic_ns(),
    )


def rate_hz(seen: list[Seen]) -> float:
    """Frames a second by the driver's own times."""
    if len(seen) < 2:
        return 0.0
    return (len(seen) - 1) / ((seen[-1].t_ns - seen[0].t_ns) / 1e9)


def gaps(seen: list[Seen]) -> int:
    """Frames missing by the driver's own counter."""
    return sum(after.sequence - before.sequence - 1 for before, after in itertools.pairwise(seen))


def delays_ms(seen: list[Seen]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """From a frame's capture time to its reader, for each frame."""
    return np.array([(frame.read_ns - frame.t_ns) / 1e6 for frame in seen])
