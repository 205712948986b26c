"""`understudy bundle check` for a person: a table of engines, what is off, and the exit code."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from device.bundle_build import ProgressBars
from device.bundle_check import BundleReport, EngineKind, LargestStep, check_bundle
from device.engine_cache import EngineCache
from device.errors import UnderstudyError

_NUMBERS = ("off by", "median ms", "p99 ms", "MB", "GPU MB", "largest step")


def run_check(path: Path, engine: str, threads: int, runs: int, cache: Path | None, as_json: bool) -> int:
    """Check, print, and give the exit code: 0 where nothing is off. Raises UnderstudyError for an unknown engine."""
    known = (*get_args(EngineKind), "all")
    if engine not in known:
        raise UnderstudyError(f"--engine {engine}: expected one of {', '.join(known)}")
    with ProgressBars() if engine == "tensorrt" else nullcontext() as progress:
        engines = None if cache is None else EngineCache(cache)
        report = check_bundle(path, engine, threads, runs, engines, progress)  # type: ignore[arg-type]  # held to `known`
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        print_report(report, Console())
    return 0 if report.ok else 1


def print_report(report: BundleReport, console: Console) -> None:
    """Table of engines first, what is off last."""
    if report.nodes is not None:
        nodes = ", ".join(f"{graph} {count} nodes" for graph, count in report.nodes.items())
        console.print(_plain(f"{report.path}: all files as exported; {nodes}"), soft_wrap=True)
        console.print(_plain(f"largest step of the golden actions: {_show_step(report.largest_step)}"))
    if any(engine.state != "not here" for engine in report.engines):
        console.print(table(report))
    for engine in report.engines:
        if engine.reason is not None and not any(engine.reason in problem for problem in report.problems):
            console.print(
                _plain(f"{engine.engine} {engine.precision}, {engine.state}: {engine.reason}"), soft_wrap=True
            )
    for problem in report.problems:
        console.print(_plain(f"OFF: {problem}", "bold red"), soft_wrap=True)
    if report.ok:
        console.print(_plain("nothing is off", "bold green"))


def table(report: BundleReport) -> Table:
    """One row an engine that is here."""
    made = Table(box=None, padding=(0, 2, 0, 0), caption_justify="left", header_style="bold")
    for column in ("engine", *_NUMBERS):
        made.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=column != _NUMBERS[-1])
    for engine in report.engines:
        if engine.state == "not here":
            continue
        made.add_row(
            f"{engine.engine} {engine.precision}",
            _show(engine.golden_error, "{:.2g}") or engine.state,
            _show(engine.median_ms, "{:.2f}"),
            _show(engine.p99_ms, "{:.2f}"),
            _show(engine.memory_mb, "{:.0f}"),
            _show(engine.gpu_memory_mb, "{:.0f}"),
            _show_step(engine.largest_step) if engine.state == "passed" else "",
        )
    bound = "" if report.bound is None else f"{report.bound:g}"
    made.caption = f"off by: joint units on the golden inputs, bound {bound}; MB: memory that it added"
    return made


def _plain(text: str, style: str = "") -> Text:
    """Not read as rich's markup, which brackets in a sentence would be."""
    return Text(text, style)


def _show(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _show_step(step: LargestStep | None) -> str:
    return "none" if step is None else f"{step.size:.2f} ({step.joint})"
