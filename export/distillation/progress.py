"""What a person sees of a distillation while it runs: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from export.distillation.training import Status

LINE_EVERY_S = 30.0
B = TypeVar("B", bound="Bar")


class Bar:
    """One stretch of work, from 0 to 1. On a terminal a bar; otherwise a line every half minute."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        detail = TextColumn("{task.fields[detail]}")
        self._progress = Progress(*columns, detail, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=1.0, detail="")
        self._printed = time.monotonic()

    def __enter__(self: B) -> B:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def at(self, share: float, detail: str) -> None:
        self._progress.update(self._task, completed=share, detail=detail)
        now = time.monotonic()
        if not self._console.is_terminal and (share >= 1 or now - self._printed > LINE_EVERY_S):
            self._console.print(f"{self._what} {share:.1%} {detail}", highlight=False, soft_wrap=True)
            self._printed = now


class TrainingBar(Bar):
    """A training's bar: loss, steps a second of this run."""

    def __init__(self, console: Console, first_step: int, first_s: float) -> None:
        super().__init__(console, "training")
        self._first_step, self._first_s = first_step, first_s

    def report(self, status: Status) -> None:
        took = status.seconds - self._first_s
        speed = (status.step - self._first_step) / took if took else 0.0
        self.at(status.share, f"step {status.step}, loss {status.loss:.4f}, {speed:.1f} steps/s")
