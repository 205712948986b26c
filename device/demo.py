"""`understudy demo`: the virtual cell under the very roles that run in production, with a verdict and a report.

Starts emulated servos, physics, cameras, `execute` and `predict` as processes of their own, lets the shipped policy
pick cubes up and drop them in the tray, shows a live table, and measures from the topics alone. The demonstrations that
the policy was trained on used seeds from 100000 on; the demo's seeds count from 0, so every cube place is new to it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from device.bundle import Bundle
from device.config import VIRTUAL_CELL, LoadedCell, load_cell
from device.demo_report import Film, write_report
from device.errors import ConfigError, UnderstudyError
from device.messages import TICKS, Mode
from device.observer import Figures, Observer, measure
from device.request_socket import ask
from device.run import Processes
from device.topic import TopicReader, topic_path

_START_TIMEOUT_S = 60.0
_POLL_S = 0.05
_REDRAW_S = 0.4  # the figures are computed anew for it
# Null in lockstep, where time is simulated and there is no bus.
_MEASURED_IN_REAL_TIME = ("ticks_missed", "lateness_us", "inference_ms", "bus_errors", "chunks_refused", "records_lost")
_SETTLE_S = 0.7  # after homing: the arm rests, the cameras have seen the new cube
_LINGER_S = 0.5  # after the task is done: the hand withdraws


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    episodes: int
    seed: int
    handoff: str | None
    advance: int | None  # actions from one chunk to the next
    inference_delay_ms: float
    report: Path
    bundle: Path | None
    time_limit_s: float
    lockstep: bool  # simulated time: no processes, no lateness, the same every time
    quiet: bool  # no live table: standard output belongs to the JSON


@dataclass
class Episode:
    """One cube. `seconds` None: not done within the limit."""

    seed: int
    seconds: float | None
    progress: str


@dataclass
class Result:
    """The verdict, as `--json` prints it."""

    options: Options
    handoff: str
    figures: Figures
    episodes: list[Episode] = field(default_factory=list)

    @property
    def successes(self) -> int:
        return sum(episode.seconds is not None for episode in self.episodes)

    def as_json(self) -> dict[str, Any]:
        return {
            "episodes": len(self.episodes),
            "successes": self.successes,
            "seed": self.options.seed,
            "handoff": self.handoff,
            "inference_delay_ms": self.options.inference_delay_ms,
            "lockstep": self.options.lockstep,
            **self.figures.as_json(),
            **(dict.fromkeys(_MEASURED_IN_REAL_TIME) if self.options.lockstep else {}),
            "seconds": [episode.seconds for episode in self.episodes],
            "progress": [episode.progress for episode in self.episodes],
        }


def run_demo(options: Options) -> Result:
    """Run the demo. Raises UnderstudyError when a role does not start or dies."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the roles are stopped
    # A report that cannot be written should be known before the work, not after it.
    options.report.mkdir(parents=True, exist_ok=True)
    if options.lockstep:
        with _cell_of(options) as (cell, _):
            return _run_lockstep(options, cell)
    with _cell_of(options) as (cell, runtime), (runtime / "roles.log").open("wb") as log:
        processes = Processes(cell, runtime, log)
        try:
            delay = ("--inference-delay-ms", str(options.inference_delay_ms))
            processes.start_all({"predict": delay})
            return _Demo(options, cell, runtime, processes).run()
        finally:
            processes.stop()
            shutil.copy(runtime / "roles.log", options.report / "roles.log")


@contextmanager
def _cell_of(options: Options) -> Iterator[tuple[LoadedCell, Path]]:
    """The virtual cell with the options' overrides, and a runtime directory of its own, on a tmpfs if there is one."""
    shm = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="understudy-demo-", dir=shm if shm.is_dir() else None)
    try:
        bundle = options.bundle or VIRTUAL_CELL.parent / "bundle"
        overrides = {"bundle": bundle.resolve(), "handoff": options.handoff}
        policy = "\n".join(f'{key} = "{value}"' for key, value in overrides.items() if value is not None)
        policy += "" if options.advance is None else f"\nadvance = {options.advance}"
        text = VIRTUAL_CELL.read_text(encoding="utf-8")
        for old, new in (
            ('bundle = "bundle"', policy),
            ('"calibration.json"', f'"{VIRTUAL_CELL.parent / "calibration.json"}"'),
        ):
            if old not in text:
                raise ConfigError(f"{VIRTUAL_CELL}: expected a line with {old}")
            text = text.replace(old, new)
        path = Path(folder) / "cell.toml"
        path.write_text(text, encoding="utf-8")
        yield load_cell(path), Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_lockstep(options: Options, cell: LoadedCell) -> Result:
    """All episodes in simulated time, one after the other."""
    from device.lockstep import NOMINAL_INFERENCE_MS, LockstepPolicy, run_episode

    bundle = _bundle_of(cell)
    inference_ns = round((NOMINAL_INFERENCE_MS + options.inference_delay_ms) * 1e6)
    policy = LockstepPolicy(bundle, inference_ns, threads=os.cpu_count() or 1)
    episodes: list[Episode] = []
    goals, run_holds = [], []
    for number in range(options.episodes):
        run = run_episode(cell, policy, options.seed + number, options.time_limit_s)
        episodes.append(Episode(run.seed, run.seconds, f"fault: {run.fault}" if run.fault else run.progress))
        goals.append(run.goals)
        run_holds.append(run.holds)
        _tell(options.episodes, number, episodes[-1])
    units = [joint.unit for joint in cell.cell.arm.joints.values()]
    nothing = np.empty(0, TICKS)
    figures = measure(nothing, np.concatenate(goals), np.empty(0, [("t_ns", "<i8")]), units)
    figures = replace(figures, ticks=sum(len(part) for part in goals), holds=sum(run_holds))
    result = Result(options, cell.cell.policy.handoff or bundle.manifest.handoff.method, figures, episodes)
    (options.report / "report.json").write_text(json.dumps(result.as_json(), indent=2) + "\n")
    if not options.quiet:
        print(f"{result.successes} of {len(episodes)} done, in simulated time")
    return result


def _tell(count: int, number: int, episode: Episode) -> None:
    outcome = f"done in {episode.seconds:.1f} s" if episode.seconds else f"not done, got as far as {episode.progress}"
    print(f"episode {number + 1} of {count} (seed {episode.seed}): {outcome}", file=sys.stderr, flush=True)


def _bundle_of(cell: LoadedCell) -> Bundle:
    path = cell.bundle_path
    if path is None:
        raise ConfigError(f"{cell.path}: policy.bundle: is missing")
    bundle = Bundle.open(path)
    bundle.check_fits(cell)
    return bundle


class _Demo:
    """The demo in real time, with the cell's processes."""

    def __init__(self, options: Options, cell: LoadedCell, runtime: Path, processes: Processes) -> None:
        self._options = options
        self._cell = cell
        self._runtime = runtime
        self._processes = processes
        self._console = Console(stderr=options.quiet)
        self._world = TopicReader(topic_path(runtime, "world"))
        self._episodes: list[Episode] = []
        self._redraw_at = 0.0
        self._film = Film(runtime, list(cell.cell.cameras))
        self._units = [joint.unit for joint in cell.cell.arm.joints.values()]

    def run(self) -> Result:
        with self._console.status("starting the virtual cell"):
            self._wait_until_ready()
        self._observer = Observer(self._runtime)
        with Live(self._table("starting"), console=self._console, refresh_per_second=8) as live:
            for number in range(self._options.episodes):
                self._live = live
                self._episodes.append(self._episode(number))
        return self._conclude()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        chunks = TopicReader(topic_path(self._runtime, "chunks"))
        while chunks.latest() is None:
            self._check_alive()
            if time.monotonic() > deadline:
                raise UnderstudyError(f"the cell did not start within {_START_TIMEOUT_S:g} s:\n{self._log_tail()}")
            time.sleep(_POLL_S)

    def _check_alive(self) -> None:
        for name, code in self._processes.ended().items():
            raise UnderstudyError(f"{name} ended with exit code {code}:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = (self._runtime / "roles.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-6:])

    def _episode(self, number: int) -> Episode:
        seed = self._options.seed + number
        home = ask(self._runtime, "execute", "home")
        self._watch_for(home["seconds"] + _SETTLE_S, f"episode {number + 1}: homing")
        ask(self._runtime, "world", "episode", seed=seed)
        self._watch_for(_SETTLE_S, f"episode {number + 1}: cube {seed}")
        ask(self._runtime, "execute", "mode", mode="policy")
        began_ns = time.monotonic_ns()
        progress, done_ns = "", 0
        while not done_ns and time.monotonic_ns() - began_ns < self._options.time_limit_s * 1e9:
            self._watch(f"episode {number + 1}: cube {seed}")
            if number == 0:
                self._film.take(time.monotonic_ns() - began_ns)
            record = self._world.latest()
            if record is not None:
                progress, done_ns = str(record["progress"], "ascii"), int(record["t_done_ns"])
        self._watch_for(_LINGER_S, f"episode {number + 1}: {progress}")
        if number == 0:
            self._film.take(time.monotonic_ns() - began_ns, last=True)
        ask(self._runtime, "execute", "mode", mode="idle")
        seconds = round((done_ns - began_ns) / 1e9, 2) if done_ns else None
        episode = Episode(seed, seconds, progress)
        if self._options.quiet:
            _tell(self._options.episodes, number, episode)
        return episode

    def _watch_for(self, seconds: float, doing: str) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._watch(doing)

    def _watch(self, doing: str) -> None:
        time.sleep(_POLL_S)
        self._observer.poll()
        self._check_alive()
        tick = self._observer.latest("ticks")
        if tick is not None and tick["mode"] == Mode.FAULT:
            raise UnderstudyError(f"the arm is in fault: {str(tick['fault'], 'utf-8')}")
        if not self._options.quiet and time.monotonic() > self._redraw_at:
            self._redraw_at = time.monotonic() + _REDRAW_S
            self._live.update(self._table(doing))

    def _conclude(self) -> Result:
        figures = self._observer.figures(self._units)
        goal = self._observer.all("goals")
        handoff = self._cell.cell.policy.handoff or _bundle_of(self._cell).manifest.handoff.method
        result = Result(self._options, handoff, figures, self._episodes)
        with self._console.status("drawing the report"):
            write_report(
                self._options.report,
                result.as_json(),
                list(self._cell.cell.joint_names),
                goals=goal,
                joints=self._observer.all("joints"),
                chunks=self._observer.all("chunks"),
                ticks=self._observer.all("ticks"),
                film=self._film,
            )
        self._print_verdict(result)
        return result

    def _print_verdict(self, result: Result) -> None:
        figures = result.figures
        one = result.episodes[0]
        if len(result.episodes) == 1:
            verdict = f"done in {one.seconds:.1f} s" if one.seconds else f"not done; it got as far as {one.progress!r}"
        else:
            times = [episode.seconds for episode in result.episodes if episode.seconds]
            typical = f", typically in {np.median(times):.1f} s" if times else ""
            verdict = f"{result.successes} of {len(result.episodes)} done{typical}"
        self._console.print(f"\n[bold]Cube into tray:[/bold] {verdict}.")
        late, at, between = figures.lateness_us, figures.boundary_step_deg_max, figures.inner_step_deg_max
        self._console.print(
            f"{figures.ticks} ticks, {figures.ticks_missed} missed; late by {late['p50']:.0f} us (median), "
            f"{late['p999']:.0f} us (p99.9). Largest step of a goal: {at:.2f} deg at chunk boundaries, "
            f"{between:.2f} elsewhere."
        )
        self._console.print(f"Pictures and figures: {self._options.report}/")

    def _table(self, doing: str) -> Table:
        table = Table(title=f"understudy demo - {doing}", show_header=False, min_width=64)
        figures = self._observer.figures(self._units) if hasattr(self, "_observer") else None
        tick = self._observer.latest("ticks") if figures else None
        if figures is None or tick is None:
            return table
        world = self._world.latest()
        recent = self._observer.recent_rates_hz()
        rows = (
            ("rates", "  ".join(f"{name} {rate:.0f} Hz" for name, rate in recent.items())),
            ("mode", Mode(int(tick["mode"])).name.lower()),
            ("deadlines missed", f"{figures.ticks_missed} of {figures.ticks} ticks"),
            ("lateness", f"{figures.lateness_us['p50']:.0f} us median, {figures.lateness_us['p99']:.0f} us p99"),
            ("inference", f"{figures.inference_ms['p50']:.1f} ms median, {figures.inference_ms['p99']:.1f} ms p99"),
            ("chunk age", f"{figures.chunk_age_ms['p50']:.0f} ms median, {figures.chunk_age_ms['p99']:.0f} ms p99"),
            ("bus errors", str(figures.bus_errors)),
            ("task", "" if world is None else str(world["progress"], "ascii")),
            ("episodes done", f"{sum(e.seconds is not None for e in self._episodes)} of {len(self._episodes)}"),
        )
        for row in rows:
            table.add_row(*row)
        return table
