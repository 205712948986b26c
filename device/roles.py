"""The roles of a cell, as one table: which process does what, what it writes, and what starts it.

`understudy run ROLE`, the foreground runner and the systemd units all follow this table; tests check that they agree.
A role's entry point is imported only when it runs, so that `execute` never pays for what `capture` needs.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device import realtime
from device.config import LoadedCell

# Set by whoever runs roles as children in the foreground: without it nothing would stop them when it is killed.
DIES_WITH_PARENT = "UNDERSTUDY_DIES_WITH_PARENT"


@dataclass(frozen=True)
class Role:
    """A row of the table. `module` has `run(cell, [camera,] runtime, stop, **options)`."""

    name: str
    module: str
    writes: tuple[str, ...]  # names in messages.TOPICS
    per_camera: bool = False
    virtual_only: bool = False


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("world", "device.virtual_cell", ("world",), virtual_only=True),
        Role("capture", "device.capture", ("frames/*",), per_camera=True),
        Role("execute", "device.execute", ("joints", "goals", "ticks")),
        Role("predict", "device.predict", ("chunks",)),
    )
}


def instances(cell: LoadedCell) -> list[tuple[str, str | None]]:
    """Every process of this cell as (role, camera or None), in the order in which they are started."""
    found: list[tuple[str, str | None]] = []
    for role in ROLES.values():
        if role.virtual_only and not cell.cell.is_virtual:
            continue
        if role.name == "predict" and cell.bundle_path is None:
            continue
        if role.per_camera:
            found += [(role.name, camera) for camera in cell.cell.cameras]
        else:
            found.append((role.name, None))
    return found


def run_role(role: Role, cell: LoadedCell, camera: str | None, runtime: Path, **options: Any) -> None:
    """Run one role in this process until SIGINT or SIGTERM."""
    runtime.mkdir(parents=True, exist_ok=True, mode=0o750)
    if os.environ.get(DIES_WITH_PARENT):
        realtime.die_with_parent()
    stop = stop_on_signals()
    entry: Callable[..., None] = importlib.import_module(role.module).run
    logging.getLogger(role.name).debug("starting")
    arguments: tuple[Any, ...] = (cell, camera, runtime, stop) if role.per_camera else (cell, runtime, stop)
    entry(*arguments, **options)


def stop_on_signals() -> Callable[[], bool]:
    """A function that turns true once SIGINT, SIGTERM or SIGHUP (the terminal was closed) has come."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopped.append(number))
    return lambda: bool(stopped)
