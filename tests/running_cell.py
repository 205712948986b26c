"""A whole virtual cell with its real processes, for tests that kill and starve them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from device.config import VIRTUAL_CELL, LoadedCell, load_cell
from device.request_socket import ask
from device.run import Processes
from device.topic import TopicReader, topic_path

BUNDLE = VIRTUAL_CELL.parent / "bundle"


class RunningCell:
    """The processes of a virtual cell and what they publish."""

    def __init__(self, cell: LoadedCell, runtime: Path) -> None:
        self.cell = cell
        self.runtime = runtime
        self.log = runtime / "roles.log"
        self._log_file = self.log.open("wb")
        self.processes = Processes(cell, runtime, self._log_file)
        self.staleness_ns = round(cell.cell.policy.staleness_s * 1e9)
        self.period_ns = round(1e9 / cell.cell.control.rate_hz)

    def start(self) -> None:
        self.processes.start_all()
        self.until(lambda: self.newest("chunks") is not None and self.newest("goals") is not None, "the first chunk")

    def stop(self) -> None:
        self.processes.stop()
        self._log_file.close()

    def kill(self, name: str) -> None:
        """kill -9 of a role."""
        child = self.processes.children[name]
        child.send_signal(signal.SIGKILL)
        child.wait()

    def newest(self, topic: str) -> Any:
        return TopicReader(topic_path(self.runtime, topic)).latest()

    def history(self, topic: str) -> Any:
        """Every record that the newest writer's ring still holds."""
        return TopicReader(topic_path(self.runtime, topic)).since(0)[0]

    def ask(self, role: str, verb: str, **fields: Any) -> dict[str, Any]:
        return ask(self.runtime, role, verb, timeout_s=10, **fields)

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.02)

    def run_policy_until_it_moves(self) -> None:
        """Policy mode, and a joint that is really moving."""
        self.ask("execute", "mode", mode="policy")
        self.until(self._moves, "motion")

    def _moves(self) -> bool:
        goals = self.history("goals")[-6:]
        return len(goals) > 5 and bool(np.abs(np.diff(goals["goal"][:, :5], axis=0)).max() > 0.2)


@contextmanager
def running_cell(folder: Path) -> Iterator[RunningCell]:
    """Start every role of the shipped virtual cell in `folder`; stops them at the end."""
    runtime = folder / "run"
    runtime.mkdir()
    running = RunningCell(load_cell(VIRTUAL_CELL), runtime)
    try:
        running.start()
        yield running
    finally:
        running.stop()
