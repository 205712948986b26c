"""`understudy bundle check`: is this bundle whole, and does every engine of this machine run it as it should?

The update flow calls `check_bundle` before it activates a bundle, the command prints its result. Hashes first; then
each engine is opened, proven on the golden inputs and timed as `predict` would use it: one new observation step an
inference, fresh noise where the policy samples. An engine that this machine has not got is a line with the reason, and
no problem unless it was asked for. Half precision that fails on TensorRT is no problem either where the same policy in
float32 passes there, since that is what will run. Whatever is off is one sentence in `problems`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from device.arrays import Array
from device.bundle import Bundle
from device.cuda_runtime import NotHereError, gpu_free_bytes
from device.engine import Engine, EngineError
from device.engine_cache import EngineCache, EngineCacheError, default_cache
from device.engine_choice import Candidate, candidates, only_our_errors, parity_bound, prove, release
from device.errors import BundleError
from device.onnx_wire import summarize
from device.tensorrt_build import BuildProgress, graphs_of
from device.tensorrt_network import NotBuiltError

EngineKind = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt"]
State = Literal["passed", "failed", "not here"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): forgets the peak of resident memory so far


@dataclass(frozen=True)
class LargestStep:
    """The largest change from one action of a chunk to the next, of any joint, in that joint's unit."""

    joint: str
    size: float


@dataclass(frozen=True)
class EngineReport:
    """What one engine did. Figures are None where it did not come to that, or the machine does not tell."""

    engine: str
    precision: str
    state: State
    reason: str | None = None  # one sentence, unless it passed
    golden_error: float | None = None  # joint units
    median_ms: float | None = None
    p99_ms: float | None = None
    memory_mb: float | None = None  # growth of the process's peak resident memory
    gpu_memory_mb: float | None = None  # on a Jetson, GPU and process share the machine's
    largest_step: LargestStep | None = None


@dataclass(frozen=True)
class BundleReport:
    """All of it. `bound`: of the golden error, joint units. `nodes`: graph file -> number of nodes."""

    path: str
    digest: str | None = None
    nodes: dict[str, int] | None = None
    bound: float | None = None
    largest_step: LargestStep | None = None  # of the reference's golden actions
    engines: tuple[EngineReport, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def check_bundle(
    path: Path,
    engine: EngineKind | Literal["all"] = "all",
    threads: int = 1,
    runs: int = 50,
    cache: EngineCache | None = None,
    progress: BuildProgress | None = None,
) -> BundleReport:
    """Look at everything; raises nothing about the bundle. `engine`: all that are here, or this one, which then must be
    here; TensorRT's engines are built if they are missing where TensorRT was asked for, and only then."""
    try:
        bundle = Bundle.open(path)
        _, expected = bundle.golden()
        nodes = {graph: summarize((bundle.path / graph).read_bytes()).nodes for graph in graphs_of(bundle)}
    except (BundleError, EngineError, OSError) as error:
        return BundleReport(str(path), problems=(str(error),))
    build = engine == "tensorrt"
    kinds = get_args(EngineKind) if engine == "all" else (engine,)
    wanted = candidates(
        bundle, cache or EngineCache(default_cache()), threads, seed=None, build=build, progress=progress
    )
    engines: list[EngineReport] = []
    for candidate in wanted:
        spared = any(done.engine == candidate.kind and done.state == "passed" for done in engines)
        if candidate.kind in kinds and not spared:
            engines.append(check_engine(bundle, candidate, runs))
    return BundleReport(
        str(path),
        bundle.digest,
        nodes,
        parity_bound(bundle),
        largest_step(bundle, expected),
        tuple(engines),
        tuple(_problems(engines, required=engine != "all")),
    )


def check_engine(bundle: Bundle, candidate: Candidate, runs: int) -> EngineReport:
    """Open, prove and time one engine; it is given back whatever happens."""
    kind, precision = candidate.kind, candidate.precision
    memory, gpu_free = _Memory(), None if kind == "onnxruntime" else gpu_free_bytes()
    engine: Engine | None = None
    try:
        with only_our_errors(candidate.name):
            engine = candidate.open()
            error = prove(bundle, engine)
            durations_ms, step = _time(bundle, engine, runs)
        gpu_used = None if gpu_free is None else (gpu_free - (gpu_free_bytes() or 0)) / 1e6
        return EngineReport(
            kind,
            precision,
            "passed",
            golden_error=error,
            median_ms=float(np.median(durations_ms)),
            p99_ms=float(np.percentile(durations_ms, 99)),
            memory_mb=memory.growth_mb(),
            gpu_memory_mb=gpu_used,
            largest_step=step,
        )
    except (NotHereError, NotBuiltError) as reason:
        return EngineReport(kind, precision, "not here", str(reason))
    except (EngineError, EngineCacheError, BundleError) as reason:
        return EngineReport(kind, precision, "failed", str(reason))
    finally:
        if engine is not None:
            release(engine)


def largest_step(bundle: Bundle, actions: Array) -> LargestStep | None:
    """Of float32 [K, A]; None for a chunk of one action."""
    if len(actions) < 2:
        return None
    steps = np.abs(np.diff(actions, axis=0)).max(axis=0)
    joint = int(steps.argmax())
    return LargestStep(bundle.manifest.joint_names[joint], float(steps[joint]))


def _problems(engines: list[EngineReport], required: bool) -> Iterator[str]:
    passed = {report.engine for report in engines if report.state == "passed"}
    if all(report.state == "not here" for report in engines) and not required:
        yield "no engine of this machine can run it; install onnxruntime"
    for report in engines:
        if report.engine in passed:
            continue
        if report.state == "failed":
            yield f"{report.engine} {report.precision}: {report.reason}"
        elif required:
            yield f"{report.engine} was asked for and is not here: {report.reason}"


def _time(bundle: Bundle, engine: Engine, runs: int) -> tuple[list[float], LargestStep | None]:
    """Milliseconds of each inference with one new observation step, and the largest step in any of their chunks."""
    inputs, _ = bundle.golden()
    count = bundle.manifest.observation_steps
    keys: deque[tuple[str, int]] = deque(maxlen=count)
    durations_ms: list[float] = []
    steps: list[LargestStep | None] = []
    for run in range(count - 1 + runs):
        began = time.perf_counter()
        for name, target in engine.inputs.items():
            target[...] = inputs[name] if count == 1 else inputs[name][min(run, count - 1)]
        keys.append(("check", run))
        engine.observe(keys[-1])
        if len(keys) == count:
            actions = engine.infer(tuple(keys))
            durations_ms.append((time.perf_counter() - began) * 1e3)
            steps.append(largest_step(bundle, actions))
    return durations_ms, max(filter(None, steps), key=lambda step: step.size, default=None)


class _Memory:
    """Growth of the peak of this process's resident memory since it was made; None where Linux does not tell."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(AttributeError):  # not in every C library
            ctypes.CDLL(None).malloc_trim(0)  # what the engine before gave back would hide what this one takes
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before: int | None = _status_kb("VmRSS")
        except OSError:
            self._before = None

    def growth_mb(self) -> float | None:
        peak = _status_kb("VmHWM")
        return None if self._before is None or peak is None else max(0, peak - self._before) * 1024 / 1e6


def _status_kb(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return None
