"""Watches a running cell from its topics, and turns what it saw into figures; read-only, costs the roles nothing.

The demo polls an `Observer` while an episode runs and asks for its `Figures` afterwards. Everything is measured from
what the roles themselves published: nothing is timed from outside.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.messages import Mode
from device.topic import TopicReader, topic_path
from firmware_bridge.calibration import Unit

Records = NDArray[Any]
_SAME_RUN_NS = 1_000_000_000  # ticks further apart than this belong to different runs
_WATCHED = ("joints", "goals", "ticks", "chunks")


@dataclass(frozen=True)
class Figures:
    """What a run was like; the keys of `understudy demo --json`. Times as named, steps in degrees."""

    ticks: int
    ticks_missed: int  # periods skipped, and ticks whose goals did not reach the bus
    lateness_us: dict[str, float]
    inference_ms: dict[str, float]
    chunk_age_ms: dict[str, float]
    boundary_step_deg_max: float  # largest step between consecutive goals where the set of live chunks changed
    inner_step_deg_max: float  # ... and where it did not
    requested_boundary_step_deg_max: float  # the same before the guard: what the hand-over itself asked for
    requested_inner_step_deg_max: float
    holds: int  # times that all chunks had gone stale
    bus_errors: int
    chunks_refused: int
    records_lost: int  # records that were overwritten before they were looked at: the figures lack them

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Observer:
    """Collects every record of the control topics from the moment of its making."""

    def __init__(self, runtime: Path) -> None:
        self._readers = {name: TopicReader(topic_path(runtime, name)) for name in _WATCHED}
        self._cursors = dict.fromkeys(_WATCHED, 0)
        self._records: dict[str, list[Records]] = {name: [] for name in _WATCHED}
        self.lost = 0
        self.poll()
        self.forget()

    def poll(self) -> None:
        """Take what has been published since the last call (at least once a second: the rings are finite)."""
        for name, reader in self._readers.items():
            while True:
                records, cursor, lost = reader.since(self._cursors[name])
                self.lost += lost
                self._cursors[name] = cursor
                if not len(records):
                    break
                self._records[name].append(records)

    def forget(self) -> None:
        """Begin anew."""
        for records in self._records.values():
            records.clear()
        self.lost = 0

    def latest(self, name: str) -> Any | None:
        """The newest record of a topic seen so far."""
        return self._records[name][-1][-1] if self._records[name] else None

    def all(self, name: str) -> Records:
        """Every record of a topic seen, in order; empty where there was none."""
        parts = [part for part in self._records[name] if part.dtype == self._records[name][-1].dtype]
        return np.concatenate(parts) if parts else np.empty(0, [("t_ns", "<i8")])

    def recent_rates_hz(self) -> dict[str, float]:
        """Records a second over the last second and a half, by what they are."""
        rates = {}
        for name, label in (("ticks", "control"), ("chunks", "inference")):
            newest = np.concatenate([part["t_ns"] for part in self._records[name][-40:]] or [np.zeros(0, np.int64)])
            window_ns = 1_500_000_000
            rates[label] = float(np.count_nonzero(newest > time.monotonic_ns() - window_ns)) * 1e9 / window_ns
        return rates

    def figures(self, units: Sequence[Unit]) -> Figures:
        """Figures over the ticks in policy mode. `units` of the joints: only degrees count as steps."""
        return measure(self.all("ticks"), self.all("goals"), self.all("chunks"), units, self.lost)


def measure(ticks: Records, goals: Records, chunks: Records, units: Sequence[Unit], lost: int = 0) -> Figures:
    """Figures of a run from its `ticks`, `goals` and `chunks` records, of which `lost` were missed."""
    running = ticks[ticks["mode"] == Mode.POLICY] if len(ticks) else ticks
    moving = goals[goals["mode"] == Mode.POLICY] if len(goals) else goals
    degrees = [i for i, unit in enumerate(units) if unit is Unit.degrees]
    boundary, inner = _largest_steps(moving, "goal", degrees)
    asked_boundary, asked_inner = _largest_steps(moving, "requested", degrees)
    return Figures(
        ticks=len(running),
        ticks_missed=_growth(running, "missed") + _growth(running, "unsent"),
        lateness_us=_percentiles(_field(running, "lateness_ns") / 1e3, p50=50, p99=99, p999=99.9, max=100),
        inference_ms=_percentiles(_field(chunks, "inference_ns") / 1e6, p50=50, p99=99),
        chunk_age_ms=_percentiles(_live_age_ns(moving) / 1e6, p50=50, p99=99),
        boundary_step_deg_max=boundary,
        inner_step_deg_max=inner,
        requested_boundary_step_deg_max=asked_boundary,
        requested_inner_step_deg_max=asked_inner,
        holds=_growth(running, "holds"),
        bus_errors=_growth(running, "bus_errors"),
        chunks_refused=_growth(running, "chunks_refused"),
        records_lost=lost,
    )


def _largest_steps(goals: Records, field: str, joints: list[int]) -> tuple[float, float]:
    """Largest step between consecutive ticks, at chunk boundaries and elsewhere; none where nothing was asked for."""
    if len(goals) < 2 or not joints:
        return 0.0, 0.0
    steps = np.nan_to_num(np.abs(np.diff(goals[field][:, joints], axis=0)).max(axis=1))
    consecutive = np.diff(goals["tick"].astype(np.int64)) == 1
    boundary = goals["boundary"][1:] == 1
    at, elsewhere = steps[consecutive & boundary], steps[consecutive & ~boundary]
    return round(float(at.max(initial=0.0)), 4), round(float(elsewhere.max(initial=0.0)), 4)


def _field(records: Records, name: str) -> NDArray[np.float64]:
    return records[name].astype(np.float64) if len(records) else np.zeros(0)


def _live_age_ns(goals: Records) -> NDArray[np.float64]:
    ages = _field(goals, "chunk_age_ns")
    return ages[ages >= 0]


def _growth(records: Records, name: str) -> int:
    """How much a counter that only grows has grown within runs of consecutive ticks in policy mode.

    What happened between two such runs (while homing, say) does not count; a restarted writer begins at 0 again.
    """
    if len(records) < 2:
        return 0
    steps = np.diff(records[name].astype(np.int64))
    gaps = np.diff(records["t_ns"]) > _SAME_RUN_NS
    return int(steps[(steps > 0) & ~gaps].sum())


def _percentiles(values: NDArray[np.float64], **at: float) -> dict[str, float]:
    return {name: round(float(np.percentile(values, q)), 3) if len(values) else 0.0 for name, q in at.items()}
