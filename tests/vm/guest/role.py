"""The capture role under test: the real command in a process of its own, its events, and what it publishes.

`CaptureRole` starts `understudy run capture` on a cell file written for the check, collects the events of its log with
the time of their arrival, and reads its topic as any other role would.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.topic import TopicReader, topic_path
from tests.vm.guest.checks import wait_for

# The command needs a second or two to import what it needs, in a machine with one slow processor.
START_S = 30

CELL = """\
schema = 1
name = "test"

[arm]
port = "/dev/null"
calibration = "calibration.json"
[arm.joints.pan]
unit = "degrees"
min = -10
max = 10
max_speed = 100
max_acceleration = 1000
"""
CALIBRATION = {"pan": {"id": 1, "drive_mode": 0, "homing_offset": 0, "range_min": 1000, "range_max": 3000}}


@dataclass(frozen=True)
class Event:
    """One line of the role's log."""

    name: str
    text: str
    t_s: float  # CLOCK_MONOTONIC, when it was read


@dataclass(frozen=True)
class Seen:
    """One record of the frames topic."""

    t_ns: int
    sequence: int
    jpeg: bytes
    width: int
    height: int
    read_ns: int


def write_cell(folder: Path, cameras: dict[str, dict[str, object]]) -> Path:
    """A cell file with these cameras, as tables of cell.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    text = CELL
    for name, table in cameras.items():
        text += f"[cameras.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    path = folder / "cell.toml"
    path.write_text(text)
    return path


class CaptureRole:
    """One `understudy run capture` process. A context manager: leaving it stops the role as systemd would."""

    def __init__(self, cell: Path, camera: str) -> None:
        self.events: list[Event] = []
        self.output: list[str] = []
        self._runtime = cell.parent / "run"
        self._runtime.mkdir(exist_ok=True)
        command = [sys.executable, "-c", "from device.cli import main; main()", "run", "capture"]
        self._process = subprocess.Popen(
            [*command, "--cell", str(cell), "--camera", camera],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RUNTIME_DIRECTORY": str(self._runtime)},
        )
        self._log = threading.Thread(target=self._read_log, daemon=True)
        self._log.start()
        self.reader = TopicReader(topic_path(self._runtime, f"frames/{camera}"))

    def __enter__(self) -> CaptureRole:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the role; its exit code."""
        self._process.send_signal(number)
        return self.wait()

    def wait(self, timeout_s: float = START_S) -> int:
        code = self._process.wait(timeout_s)
        self._log.join(5)
        return code

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def names(self, since: int = 0) -> list[str]:
        """Names of the events so far, from the `since`-th on."""
        return [event.name for event in self.events[since:]]

    def changes(self, since: int = 0) -> list[str]:
        """Events but those of damage: on a busy host a driver skips a frame now and then."""
        return [name for name in self.names(since) if name not in ("camera.damaged", "camera.clean")]

    def wait_for_event(self, name: str, since: int = 0, timeout_s: float = START_S) -> Event:
        """The first event of that name from the `since`-th on."""
        wait_for(lambda: name in self.names(since), timeout_s, f"{name}; there were {self.names(since)}")
        return self.events[since + self.names(since).index(name)]

    def wait_until_clean(self) -> None:
        """Let damage that a busy host has caused end, so that it is not taken for the check's."""
        names = self.names()
        if "camera.damaged" in names:
            last = len(names) - 1 - names[::-1].index("camera.damaged")
            self.wait_for_event("camera.clean", last)

    def stand_still(self, seconds: float) -> None:
        """Keep the process from running, as a busy machine does."""
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

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

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line.rstrip())
            logger, _, text = line.strip().partition(": ")
            if logger == "capture":
                self.events.append(Event(text.split()[0], text, time.monotonic()))


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
