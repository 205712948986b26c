"""A role under test: the real command in a process of its own, on a cell file written for the check, and its events.

`Role` starts `understudy run ROLE` and collects the events of its log with the time of their arrival; what the role
publishes is read from its topics, as any other role would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

from device.topic import TopicReader, topic_path
from tests.vm.guest.checks import wait_for

UNDERSTUDY = (sys.executable, "-c", "from device.cli import main; main()")
# The command needs a second or two to import what it needs, in a machine with one slow processor.
START_S = 30

CELL = """\
schema = 1
name = "test"
[arm]
port = "{port}"
calibration = "calibration.json"
[control]
rate_hz = 30
read_timeout_ms = 25
"""
JOINT = """\
[arm.joints.{name}]
unit = "degrees"
min = -80
max = 80
max_speed = 100
max_acceleration = 1000
"""
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


@dataclass(frozen=True)
class Event:
    """One line of the role's log."""

    name: str
    text: str
    t_s: float  # CLOCK_MONOTONIC, when it was read


def write_cell(folder: Path, cameras: dict[str, dict[str, object]], port: str = "/dev/null") -> Path:
    """A cell file with six joints, calibrated as new servos are, and these cameras, as tables of cell.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    text = CELL.format(port=port) + "".join(JOINT.format(name=name) for name in JOINTS)
    for name, table in cameras.items():
        text += f"[cameras.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    calibration = {
        name: {"id": number, "drive_mode": 0, "homing_offset": 0, "range_min": 0, "range_max": 4095}
        for number, name in enumerate(JOINTS, start=1)
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))
    path = folder / "cell.toml"
    path.write_text(text)
    return path


class Role:
    """One `understudy run` process. A context manager: leaving it stops the role as systemd would."""

    def __init__(self, name: str, cell: Path, *options: str) -> None:
        self.events: list[Event] = []
        self.output: list[str] = []
        self._name = name
        self._runtime = cell.parent / "run"
        self._runtime.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [*UNDERSTUDY, "run", name, "--cell", str(cell), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RUNTIME_DIRECTORY": str(self._runtime)},
        )
        self._log = threading.Thread(target=self._read_log, daemon=True)
        self._log.start()

    def __enter__(self) -> Self:
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

    def wait_for_event(self, name: str, since: int = 0, timeout_s: float = START_S) -> Event:
        """The first event of that name from the `since`-th on."""
        wait_for(lambda: name in self.names(since), timeout_s, f"{name}; there were {self.names(since)}")
        return self.events[since + self.names(since).index(name)]

    def stand_still(self, seconds: float) -> None:
        """Keep the process from running, as a busy machine does."""
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def topic(self, name: str) -> TopicReader:
        """A reader of one of the role's topics."""
        return TopicReader(topic_path(self._runtime, name))

    def _read_log(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line.rstrip())
            logger, _, text = line.strip().partition(": ")
            if logger == self._name:
                self.events.append(Event(text.split()[0], text, time.monotonic()))
