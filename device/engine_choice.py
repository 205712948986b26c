"""Which engine runs a bundle on this machine: the fastest one that answers its golden inputs as it should.

`predict` asks `open_best_engine`; `understudy bundle check` looks at every candidate. In order: TensorRT as the bundle
was authored, TensorRT with half precision widened to float32, onnxruntime on CUDA, onnxruntime on the CPU. A candidate
that cannot be had or fails parity is one event with the reason, and the next one is tried. What is handed out was
proven on this machine in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from device.bundle import GOLDEN, POLICY, Bundle
from device.cuda_runtime import NotHereError
from device.engine import Engine, EngineError, infer_observation
from device.engine_cache import EngineCache, EngineCacheError, default_cache
from device.errors import BundleError, UnderstudyError
from device.log import event
from device.observation_file import check_observation
from device.sampling import needed_noise
from device.tensorrt_build import BuildProgress, build_bundle, precisions_of

if TYPE_CHECKING:
    from device.engine_onnx import Provider

# An engine's answer to the golden inputs against the reference's, largest difference of any joint, in joint units
# (degrees, or hundredths of a range), by the precision that the bundle was authored in.
# fp32: sums in another order (1e-4 seen between processors); a wrong engine is off by degrees.
# fp16: five steps of an STS3215 (0.088 degrees each), less than its gears' play.
# int8: what export accepts; saturating and exact dot products differ between processors without and with VNNI.
PARITY_BOUND = {"fp32": 0.05, "fp16": 0.5, "int8": 3.0}

logger = logging.getLogger("engine")


class ParityError(EngineError):
    """An engine that computes something else than the policy."""


@dataclass(frozen=True)
class Candidate:
    """kind: what --engine calls it. open: raises NotHereError, NotBuiltError, EngineError; every call opens another."""

    kind: str
    precision: str
    open: Callable[[], Engine]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.precision}"


@dataclass(frozen=True)
class OpenedEngine:
    """name: as in the events. golden_error: in joint units."""

    engine: Engine
    name: str
    golden_error: float


def candidates(
    bundle: Bundle,
    cache: EngineCache,
    threads: int = 1,
    seed: int | None = None,
    build: bool = False,
    progress: BuildProgress | None = None,
) -> list[Candidate]:
    """Every way to run the bundle, the fastest first. `build`: TensorRT's engines are built where they are missing."""
    authored = bundle.manifest.fidelity.precision

    def tensorrt(precision: str) -> Engine:
        from device.engine_tensorrt import open_tensorrt  # not paid for where TensorRT is not asked for

        if build:
            build_bundle(bundle, precision, cache, progress)
        return open_tensorrt(bundle, precision, cache, seed)

    def onnx(on_cuda: bool) -> Engine:
        from device.engine_onnx import ON_CPU, ON_CUDA  # not paid for where TensorRT runs the policy

        return open_onnxruntime(bundle, ON_CUDA if on_cuda else ON_CPU, threads, seed)

    return [
        *(Candidate("tensorrt", precision, partial(tensorrt, precision)) for precision in precisions_of(bundle)),
        Candidate("onnxruntime-cuda", authored, partial(onnx, True)),
        Candidate("onnxruntime", authored, partial(onnx, False)),
    ]


def open_best_engine(
    bundle: Bundle, cache: EngineCache | None = None, threads: int = 1, seed: int | None = None, build: bool = False
) -> OpenedEngine:
    """The first candidate that opens and passes parity. Raises EngineError where none does, BundleError for golden
    values that prove nothing. Whoever is done with the engine gives it to `release`."""
    problem = "none is installed"
    for candidate in candidates(bundle, cache or EngineCache(default_cache()), threads, seed, build):
        try:
            opened = open_proven(bundle, candidate)
        except (EngineError, EngineCacheError) as error:
            absent = isinstance(error, NotHereError)
            problem = problem if absent else str(error)
            level = logging.INFO if absent else logging.WARNING
            event(logger, "engine.passed_over", level=level, engine=candidate.name, reason=str(error))
            continue
        event(logger, "engine.opened", engine=opened.name, golden_error=opened.golden_error)
        bound, usual = parity_bound(bundle), PARITY_BOUND[bundle.manifest.fidelity.precision]
        if bound > usual:
            event(logger, "engine.bound_raised", level=logging.WARNING, bound=bound, usual=usual)
        return opened
    raise EngineError(
        f"{bundle.path}: no engine of this machine runs it: {problem}; export it again, or update the device"
    )


def open_proven(bundle: Bundle, candidate: Candidate) -> OpenedEngine:
    """Open a candidate and prove it; given back where it fails. Raises what Candidate.open and prove raise."""
    with only_our_errors(candidate.name):
        engine = candidate.open()
        try:
            return OpenedEngine(engine, candidate.name, prove(bundle, engine))
        except BaseException:
            release(engine)
            raise


@contextmanager
def only_our_errors(name: str) -> Iterator[None]:
    """What a runtime or its bindings raise becomes an EngineError, so that an engine that breaks in a way that nobody
    foresaw is passed over like any other and does not keep the next one from running."""
    try:
        yield
    except UnderstudyError:
        raise
    except Exception as error:  # bindings share no base but Exception
        reason = " ".join(str(error).split())
        raise EngineError(f"{name} broke: {type(error).__name__}: {reason}") from error


def prove(bundle: Bundle, engine: Engine) -> float:
    """Run the golden inputs; the largest difference to the reference, in joint units.

    Raises ParityError beyond `parity_bound`, EngineError where the answer is not finite, BundleError for golden values
    that prove nothing.
    """
    inputs, expected = bundle.golden()
    check_observation(bundle.manifest, inputs, str(bundle.path / GOLDEN))
    for name in needed_noise(bundle.manifest):
        if name not in inputs:
            raise BundleError(
                f"{bundle.path / GOLDEN}: {name} is missing, without which a policy that samples never answers the "
                "same; export the policy again"
            )
    error = float(np.abs(infer_observation(engine, bundle.manifest, inputs) - expected).max())
    bound = parity_bound(bundle)
    if not error <= bound:
        raise ParityError(
            f"{bundle.path}: this engine differs from the reference by {error:.3g} joint units (bound: {bound:g}) on "
            "the golden inputs"
        )
    return error


def parity_bound(bundle: Bundle) -> float:
    """PARITY_BOUND of the bundle's precision, or twice what export measured and somebody accepted with --force."""
    fidelity = bundle.manifest.fidelity
    return max(PARITY_BOUND[fidelity.precision], 2 * max(fidelity.max_error, *fidelity.joint_errors, 0.0))


def open_onnxruntime(bundle: Bundle, providers: Sequence[Provider], threads: int, seed: int | None) -> Engine:
    """The bundle in onnxruntime. Raises NotHereError where onnxruntime lacks the first of `providers`, EngineError."""
    import onnxruntime

    from device.engine_onnx import OnnxEngine

    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if first not in onnxruntime.get_available_providers():
        raise NotHereError(f"this onnxruntime has no {first}; onnxruntime-gpu has")
    if bundle.manifest.sampler is None:
        return OnnxEngine(bundle.path / POLICY, bundle.manifest, threads, providers)
    from device.engine_sampling import SamplingEngine

    return SamplingEngine(bundle, threads, seed, providers)


def release(engine: Engine) -> None:
    """Give an engine's memory back. onnxruntime's goes with the last reference; TensorRT's must be told.

    A GPU that has failed refuses that too; the process's end gives it back then, and why it failed was said before.
    """
    close = getattr(engine, "close", None)
    if close is None:
        return
    try:
        close()
    except EngineError as error:
        event(logger, "engine.not_given_back", level=logging.WARNING, reason=str(error))
