"""How evenly `execute` ticks while inference, cameras and other programs take their share of two cores.

`python -m tests.bench.bench_execute [SECONDS]` prints the table; `run()` returns the figures. The whole virtual cell
runs, with its policy, first alone and then with busy programs on every core; beside it, in the same seconds, runs a
loop paced as a plain Python loop is: work, then sleep for what is left of the period, taken anew from each cycle's own
start.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from device.messages import Mode
from device.observer import Observer
from running_cell import RunningCell, running_cell

RATE_HZ = 60
SECONDS = 20.0
WORK_S = 0.003  # of the plain loop: about what a tick of execute takes


def run(seconds: float = SECONDS) -> dict[str, Any]:
    """Lateness, interval deviation and rate, for each load."""
    figures: dict[str, Any] = {"cores": os.cpu_count(), "seconds": seconds}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, running_cell(Path(folder)) as cell:
        cell.ask("execute", "mode", mode="policy")
        figures["fifo"] = "realtime.refused" not in cell.log.read_text()
        for name, hogs in (("the cell alone", 0), ("a busy program on every core", os.cpu_count() or 1)):
            figures[name] = _measure(cell, seconds, hogs)
    return figures


def _measure(cell: RunningCell, seconds: float, hogs: int) -> dict[str, Any]:
    stop = multiprocessing.Event()
    intervals = multiprocessing.Queue()
    others = [multiprocessing.Process(target=_burn, args=(stop,)) for _ in range(hogs)]
    plain = multiprocessing.Process(target=_plain_loop, args=(seconds, intervals))
    for process in (*others, plain):
        process.start()
    observer = Observer(cell.runtime)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.2)
        observer.poll()
    peer_ns = np.array(intervals.get())
    stop.set()
    for process in (*others, plain):
        process.join()
    ticks = observer.all("ticks")
    figures = observer.figures([joint.unit for joint in cell.cell.cell.arm.joints.values()])
    starts = ticks["t_ns"] + ticks["lateness_ns"]
    return {
        "ticks": len(ticks),
        "missed": figures.ticks_missed,
        "policy_ticks": int((ticks["mode"] == Mode.POLICY).sum()),
        "lateness_us": figures.lateness_us,
        "inference_ms": figures.inference_ms,
        "execute": _evenness(np.diff(starts)),
        "plain loop": _evenness(peer_ns),
    }


def _evenness(intervals_ns: np.ndarray) -> dict[str, float]:
    deviation_us = np.abs(intervals_ns - 1e9 / RATE_HZ) / 1e3
    return {
        "rate_hz": float(1e9 / intervals_ns.mean()),
        "p50_us": float(np.percentile(deviation_us, 50)),
        "p999_us": float(np.percentile(deviation_us, 99.9)),
        "max_us": float(deviation_us.max()),
    }


def _plain_loop(seconds: float, intervals: Any) -> None:
    starts = []
    until = time.monotonic() + seconds
    while (began := time.monotonic()) < until:
        starts.append(time.monotonic_ns())
        while time.monotonic() - began < WORK_S:
            pass
        time.sleep(max(0.0, 1 / RATE_HZ - (time.monotonic() - began)))
    intervals.put(np.diff(starts).tolist())


def _burn(stop: Event) -> None:
    while not stop.is_set():
        sum(range(10_000))


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{figures['cores']} cores, 60 Hz, SCHED_FIFO {'granted' if figures['fifo'] else 'refused'}")
    print(f"{'':<32}{'ticks':>7}{'missed':>8}{'late p50':>10}{'p99':>8}{'p99.9':>9}{'max us':>9}{'inference ms':>14}")
    loads = {name: figure for name, figure in figures.items() if isinstance(figure, dict)}
    for name, load in loads.items():
        late, infer = load["lateness_us"], load["inference_ms"]
        print(
            f"{name:<32}{load['ticks']:>7}{load['missed']:>8}{late['p50']:>10.0f}{late['p99']:>8.0f}{late['p999']:>9.0f}"
            f"{late['max']:>9.0f}{infer['p50']:>14.1f}"
        )
    print(f"\n{'interval between ticks':<32}{'':<14}{'Hz':>8}{'p50 off by':>12}{'p99.9':>9}{'max us':>9}")
    for name, load in loads.items():
        for loop in ("execute", "plain loop"):
            even = load[loop]
            print(
                f"{name:<32}{loop:<14}{even['rate_hz']:>8.2f}{even['p50_us']:>12.0f}{even['p999_us']:>9.0f}"
                f"{even['max_us']:>9.0f}"
            )


if __name__ == "__main__":
    show(run(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS))
