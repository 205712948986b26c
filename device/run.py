"""`understudy run` in the foreground: all roles of a cell as children of this terminal, stopped together.

In production systemd starts each role as a unit of its own and restarts it; this is for a bench, the demo and tests.
It supervises nothing: when one role ends, the others are stopped too, and the command says which one it was.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from device.config import LoadedCell
from device.roles import DIES_WITH_PARENT, instances, stop_on_signals


def command(role: str, camera: str | None, cell: LoadedCell, *options: str) -> list[str]:
    """The command line of one role's process."""
    line = [sys.executable, "-m", "device.cli", "run", role, "--cell", str(cell.path), *options]
    return line if camera is None else [*line, "--camera", camera]


class Processes:
    """The children of one cell, by name (`execute`, `capture@front`)."""

    def __init__(self, cell: LoadedCell, runtime: Path, log: IO[bytes] | None = None) -> None:
        self._cell = cell
        self._runtime = runtime
        self._log = log
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, role: str, camera: str | None = None, *options: str) -> None:
        """Start one role. It inherits this environment, with RUNTIME_DIRECTORY set."""
        name = role if camera is None else f"{role}@{camera}"
        self.children[name] = subprocess.Popen(
            command(role, camera, self._cell, *options),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,  # a Ctrl-C reaches this process only, which then stops the children in order
        )

    def start_all(self, options: Mapping[str, tuple[str, ...]] | None = None) -> None:
        for role, camera in instances(self._cell):
            self.start(role, camera, *(options or {}).get(role, ()))

    def ended(self) -> dict[str, int]:
        """Exit codes of the children that have ended."""
        return {name: code for name, child in self.children.items() if (code := child.poll()) is not None}

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ask the children to end, one after the other, the last started first; kill what does not."""
        for child in reversed(self.children.values()):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "RUNTIME_DIRECTORY": str(self._runtime), "PYTHONUNBUFFERED": "1", DIES_WITH_PARENT: "1"}


def run_all(cell: LoadedCell, runtime: Path) -> int:
    """Run every role of the cell until Ctrl-C or until one ends. Returns the exit code."""
    runtime.mkdir(parents=True, exist_ok=True, mode=0o750)
    stop = stop_on_signals()
    processes = Processes(cell, runtime)
    processes.start_all()
    code = 0
    try:
        while not stop():
            if ended := processes.ended():
                name, code = next(iter(ended.items()))
                print(f"{name} ended with exit code {code}; stopping the others", file=sys.stderr)
                break
            time.sleep(0.2)
    finally:
        processes.stop()
    return 0 if stop() else code or 1
