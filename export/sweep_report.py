"""How a sweep is shown: a table for the terminal, a picture, JSON for machines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from export.checkpoint import Told
from export.command import choice
from export.errors import ExportError
from export.sampling import Solver
from export.sweep import STEPS, SweepReport, Way, sweep
from export.units import TrainedIn

PICTURE, FIGURES = "sweep.png", "sweep.json"


def run_sweep(
    checkpoint: Path,
    episodes: Path,
    *,
    steps: str | None,
    dpmpp: bool,
    observations: int,
    threads: int,
    report: Path,
    as_json: bool,
    joints: str | None = None,
    units: str | None = None,
    rate_hz: float | None = None,
    allow_unnormalized: Iterable[str] = (),
) -> None:
    """What the command line calls: progress on standard error, the table on standard output, a picture in `report`."""
    solvers: tuple[Solver, ...] = ("ddim", "dpmpp") if dpmpp else ("ddim",)
    console = Console(stderr=True)
    _check_report(report)
    with console.status("starting") as status:
        found = sweep(
            checkpoint,
            episodes,
            steps=STEPS if steps is None else _counts(steps),
            solvers=solvers,
            observations=observations,
            threads=threads,
            told=Told(frozenset(allow_unnormalized), rate_hz=rate_hz),
            joints=None if joints is None else joints.split(","),
            units=TrainedIn.degrees if units is None else choice("--units", units, TrainedIn),
            progress=status.update,
        )
        (report / FIGURES).write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
        draw(found, report / PICTURE)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    Console().print(table(found))
    for line in objections(found):
        print(line)
    print(recommendation(found))
    print(f"picture: {report / PICTURE}")


def table(found: SweepReport) -> Table:
    """All ways of sampling, the recommended one marked."""
    title = f"{found.observations} observations of {found.episodes.name}, {found.threads} thread(s); joint units"
    caption = "error: from the full schedule's chunk, median and 95 %; distance: from what was demonstrated"
    columns = Table("", Column("sampling", no_wrap=True), title=title, caption=caption, box=SIMPLE_HEAD)
    for heading in ("error", "95 %", "distance", "jerk", "ms"):
        columns.add_column(heading, justify="right", no_wrap=True)
    for index, way in enumerate(found.ways):
        mark = "->" if index == found.recommended else ""
        figures = (f"{value:.3f}" for value in (way.error, way.error_p95, way.distance, way.jerk))
        columns.add_row(mark, way.name, *figures, f"{way.milliseconds:.1f}")
    columns.add_row("", "demonstrations", "", "", "", f"{found.demonstrated_jerk:.3f}", "", style="dim")
    return columns


def objections(found: SweepReport) -> list[str]:
    """What speaks against which ways of sampling, a line a reason."""
    against: dict[str, list[str]] = {}
    for way in found.ways:
        if way.objection is not None:
            against.setdefault(way.objection, []).append(way.name)
    return [f"not recommended: {', '.join(names)}: {reason}" for reason, names in against.items()]


def recommendation(found: SweepReport) -> str:
    """One sentence with the options to export with."""
    own, best = found.ways[0], found.ways[found.recommended]
    if found.recommended == 0:
        return "recommended: the checkpoint's own sampling; nothing faster stays close enough to the full schedule"
    options = f"--solver {best.solver} --steps {best.steps} --spacing {best.spacing}"
    times = own.milliseconds / best.milliseconds
    return f"recommended: {options} ({times:.1f} times faster than the checkpoint's own {own.solver}-{own.steps})"


def _check_report(folder: Path) -> None:
    """Before minutes of measuring: is there something to draw with, and a place to put it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ExportError("the picture needs matplotlib: pip install 'understudy[export]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FIGURES).touch()
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error}") from error


def draw(found: SweepReport, path: Path) -> None:
    """Error, distance, jerk and time over steps, one line a solver and spacing, the full schedule dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("error", "distance from the full schedule (joint units)"),
        ("distance", "distance from demonstrations (joint units)"),
        ("jerk", "jerk (joint units / period³)"),
        ("milliseconds", "time a chunk (ms)"),
    )
    lines: dict[str, list[Way]] = {}
    for way in found.ways[2:]:
        lines.setdefault(f"{way.solver} {way.spacing}", []).append(way)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained")
    for axis, (what, label) in zip(axes, panels, strict=True):
        for name, ways in lines.items():
            axis.plot([way.steps for way in ways], [getattr(way, what) for way in ways], marker="o", label=name)
        full = found.ways[1]
        axis.axhline(getattr(full, what), linestyle="--", color="0.5", label=f"{full.solver}-{full.steps}")
        best = found.ways[found.recommended]
        axis.plot([best.steps], [getattr(best, what)], "o", markersize=12, fillstyle="none", color="k")
        axis.set_xlabel("denoising steps")
        axis.set_title(label, fontsize=10)
        axis.set_ylim(bottom=0)
        if what == "milliseconds":
            axis.set_xlim(right=1.15 * max((way.steps for way in found.ways[2:]), default=1))
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ExportError(f"--steps {text!r}: expected numbers of steps such as 4,5,8,10")
    return counts
