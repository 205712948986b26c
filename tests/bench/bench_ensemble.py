"""What asking the ensemble for one action costs, beside LeRobot's online ensembler written down in numpy.

`python -m tests.bench.bench_ensemble` prints the table; `run()` returns the figures. Both hold the same chunks: ours
answers for any instant, with late and jittery chunks; the peer only works with a fresh chunk at every call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from device.ensemble import ChunkEnsemble

DT = 33_333_333
JOINTS = 6


class OnlineEnsemble:
    """The cumulative form of temporal ensembling (one fresh chunk a call), after ACT's Algorithm 2."""

    def __init__(self, m: float, chunk_size: int) -> None:
        self._weights = np.exp(-m * np.arange(chunk_size))
        self._sums = np.cumsum(self._weights)
        self._mean = np.zeros((0, JOINTS))
        self._count = np.zeros((0, 1), np.int64)

    def update(self, chunk: np.ndarray) -> np.ndarray:
        if not len(self._mean):
            self._mean, self._count = chunk.copy(), np.ones((len(chunk), 1), np.int64)
        else:
            kept = len(self._mean)
            self._mean = (self._mean * self._sums[self._count - 1] + chunk[:kept] * self._weights[self._count]) / (
                self._sums[self._count]
            )
            self._count = np.minimum(self._count + 1, len(self._sums) - 1)
            self._mean = np.concatenate([self._mean, chunk[kept:]])
            self._count = np.concatenate([self._count, np.ones((len(chunk) - kept, 1), np.int64)])
        action, self._mean, self._count = self._mean[0], self._mean[1:], self._count[1:]
        return action


def run() -> dict[str, Any]:
    """Microseconds a call, by chunk size and method: the least of several rounds' means."""
    figures: dict[str, Any] = {}
    for chunk_size in (30, 100):
        for method in ("ensemble", "crossfade", "latest"):
            figures[f"{method}, chunk {chunk_size}"] = _lookup_us(method, chunk_size)
        figures[f"add a chunk of {chunk_size}"] = _add_us(chunk_size)
        figures[f"peer: online ensembling, chunk {chunk_size}"] = _peer_us(chunk_size)
    return figures


def _filled(method: Any, chunk_size: int) -> ChunkEnsemble:
    """As many live chunks as there can be: one for every action."""
    ensemble = ChunkEnsemble(JOINTS, chunk_size, method=method, staleness_ns=10**12)
    rng = np.random.default_rng(0)
    for i in range(chunk_size):
        ensemble.add(i * DT, i * DT, DT, rng.normal(size=(chunk_size, JOINTS)))
        ensemble.at(i * DT)
    return ensemble


def _lookup_us(method: str, chunk_size: int) -> float:
    ensemble = _filled(method, chunk_size)
    t = (chunk_size - 1) * DT + DT // 3
    return _least_us(lambda: ensemble.at(t))


def _add_us(chunk_size: int) -> float:
    ensemble = _filled("ensemble", chunk_size)
    chunk = np.zeros((chunk_size, JOINTS), np.float32)
    clock = [chunk_size * DT]

    def add() -> None:
        clock[0] += DT
        ensemble.add(clock[0], clock[0], DT, chunk)

    return _least_us(add)


def _peer_us(chunk_size: int) -> float:
    peer = OnlineEnsemble(0.01, chunk_size)
    chunk = np.zeros((chunk_size, JOINTS))
    return _least_us(lambda: peer.update(chunk))


def _least_us(call: Callable[[], object], count: int = 500, rounds: int = 9) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - began) / count * 1e6)
    return best


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'one call, 6 joints':<44}{'us':>8}")
    for name, cost_us in figures.items():
        print(f"  {name:<42}{cost_us:>8.1f}")


if __name__ == "__main__":
    show(run())
