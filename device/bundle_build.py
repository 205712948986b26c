"""`understudy bundle build`: a bundle's TensorRT engines, built and proven where they will run.

The bundle is built as it was authored; where that fails, or fails parity on the golden inputs, and it was authored in
half precision, also widened to float32. Every step is a line for a person: what was built, how long it took, where it
lies, how far it is off. Without TensorRT it is one sentence and exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from device.bundle import Bundle
from device.cuda_runtime import NotHereError
from device.engine import EngineError
from device.engine_cache import EngineCache, default_cache
from device.engine_choice import only_our_errors, parity_bound, prove, release
from device.engine_tensorrt import open_tensorrt
from device.tensorrt_build import build_bundle, precisions_of


class ProgressBars:
    """TensorRT's phases as bars on standard error, one for each that is under way."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._bars.stop()

    def begins(self, phase: str, steps: int) -> None:
        self._tasks[phase] = self._bars.add_task(phase, total=steps)

    def completed(self, phase: str, step: int) -> None:
        if (task := self._tasks.get(phase)) is not None:
            self._bars.update(task, completed=step + 1)

    def ends(self, phase: str) -> None:
        if (task := self._tasks.pop(phase, None)) is not None:
            self._bars.remove_task(task)


def run_build(path: Path, cache: Path | None, rebuild: bool, say: Callable[[str], None] = print) -> None:
    """Build and prove. Raises BundleError, EngineError (also where no precision passes parity), EngineCacheError."""
    bundle = Bundle.open(path)
    engines = EngineCache(cache or default_cache())
    bound = parity_bound(bundle)
    for precision in precisions_of(bundle):
        try:
            with only_our_errors(f"tensorrt {precision}"):
                _build(bundle, precision, engines, rebuild, say)
                error = _prove(bundle, precision, engines)
        except NotHereError:
            raise
        except EngineError as reason:
            say(str(reason))
        else:
            say(f"golden inputs: off by {error:.2g} joint units (bound: {bound:g})")
            return
    raise EngineError(f"{path}: no TensorRT engine of it passes parity here; onnxruntime will run it")


def _build(bundle: Bundle, precision: str, engines: EngineCache, rebuild: bool, say: Callable[[str], None]) -> None:
    with ProgressBars() as progress:
        built = build_bundle(bundle, precision, engines, progress, rebuild)
    for one in built:
        how = f"built in {one.seconds:.1f} s" if one.seconds else "was there"
        say(f"{one.graph} {one.precision}: {how}, {one.size_bytes / 1e6:.1f} MB, {one.path}")


def _prove(bundle: Bundle, precision: str, engines: EngineCache) -> float:
    engine = open_tensorrt(bundle, precision, engines)
    try:
        return prove(bundle, engine)
    finally:
        release(engine)
