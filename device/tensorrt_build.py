"""Builds TensorRT engines from a bundle's graphs, on the machine that will run them.

`understudy bundle build` and the update flow call `build_bundle` when a policy is installed, never in a control path:
a build takes minutes. Networks are strongly typed (what a graph computes in half precision is written in the graph,
which TensorRT 10 and 11 both honour), shapes are static, auxiliary streams are off, so that an engine can be captured
in a CUDA graph, and TF32 is off, so that float32 means float32. The device's timing cache is read before a build, and
kept with what the build added to it. A graph that TensorRT cannot take is an EngineError that names the node.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from device.bundle import DENOISE, ENCODER, POLICY, Bundle
from device.cuda_runtime import Cuda
from device.engine import EngineError
from device.engine_cache import Description, EngineCache, Machine, engine_key
from device.onnx_wire import summarize, widened, with_signed_zeros
from device.tensorrt_library import keep_messages, load_tensorrt, this_machine

WORKSPACE_BYTES = 1 << 30  # scratch memory that kernels may ask for; less where less is free


class BuildProgress(Protocol):
    """Told how far a build is; phases nest, and calls can come from threads of TensorRT's."""

    def begins(self, phase: str, steps: int) -> None: ...
    def completed(self, phase: str, step: int) -> None: ...
    def ends(self, phase: str) -> None: ...


@dataclass(frozen=True)
class BuiltEngine:
    """One graph's engine. seconds: what the build took, 0 where the engine was there already."""

    graph: str
    precision: str
    path: Path
    size_bytes: int
    seconds: float


def graphs_of(bundle: Bundle) -> tuple[str, ...]:
    """File names of the bundle's graphs, in the order they run."""
    return (POLICY,) if bundle.manifest.sampler is None else (ENCODER, DENOISE)


def precisions_of(bundle: Bundle) -> tuple[str, ...]:
    """What TensorRT can make of a bundle, the fastest first: as it was authored, then a half-precision graph widened to
    float32. int8 has no second: its scales are in the graph, and without them it is another policy."""
    authored: str = bundle.manifest.fidelity.precision
    return ("fp16", "fp32") if authored == "fp16" else (authored,)


def key_of(bundle: Bundle, graph: str, precision: str, machine: Machine) -> str:
    """Under which an engine is kept."""
    return engine_key(machine, precision, bundle.manifest.files[graph])


def build_bundle(
    bundle: Bundle, precision: str, cache: EngineCache, progress: BuildProgress | None = None, rebuild: bool = False
) -> list[BuiltEngine]:
    """An engine for each of the bundle's graphs, built where it is not there yet (or with `rebuild`).

    `precision`: one of precisions_of(bundle). Raises EngineError, EngineCacheError.
    """
    trt = load_tensorrt()
    cuda = Cuda.open()
    try:
        machine = this_machine(trt, cuda.gpu())
        workspace = min(WORKSPACE_BYTES, cuda.free_bytes() // 2)
        with cache.exclusively():
            return [
                _build_graph(trt, bundle, graph, precision, machine, cache, workspace, progress, rebuild)
                for graph in graphs_of(bundle)
            ]
    finally:
        cuda.close()


def _build_graph(
    trt: Any,
    bundle: Bundle,
    graph: str,
    precision: str,
    machine: Machine,
    cache: EngineCache,
    workspace: int,
    progress: BuildProgress | None,
    rebuild: bool,
) -> BuiltEngine:
    key = key_of(bundle, graph, precision, machine)
    present = None if rebuild else cache.load(key)
    if present is not None:
        return BuiltEngine(graph, precision, cache.plan_path(key), len(present), 0.0)
    began = time.monotonic()
    model = graph_in(bundle, graph, precision)
    plan, timing = build_plan(trt, model, str(bundle.path / graph), cache.timing(machine), workspace, progress)
    seconds = time.monotonic() - began
    cache.store_timing(machine, timing)
    plan_sha256 = hashlib.sha256(plan).hexdigest()
    description = Description(machine, precision, graph, bundle.manifest.files[graph], plan_sha256, seconds)
    return BuiltEngine(graph, precision, cache.store(key, plan, description), len(plan), seconds)


def graph_in(bundle: Bundle, graph: str, precision: str) -> bytes:
    """A graph's bytes as TensorRT is to build them. Raises EngineError where TensorRT could not take them."""
    path = bundle.path / graph
    try:
        model = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    for frames, operator in summarize(model).frames_not_cast.items():
        # NVIDIA/TensorRT#3985: nothing but a Cast takes uint8, not even what only moves data.
        raise EngineError(
            f"{path}: {operator} reads the uint8 frames {frames}, and TensorRT takes those through a Cast only; "
            "export the policy again with this version"
        )
    if precision == "int8":
        return with_signed_zeros(model)
    return widened(model) if precision != bundle.manifest.fidelity.precision else model


def build_plan(
    trt: Any, model: bytes, where: str, timing: bytes, workspace: int, progress: BuildProgress | None = None
) -> tuple[bytes, bytes]:
    """(serialized engine, timing cache) of one ONNX file. `where` names it in messages. Raises EngineError."""
    messages = keep_messages(trt)
    try:
        builder = trt.Builder(messages)
    except (TypeError, RuntimeError) as error:  # the binding's way to say that the library gave it nothing
        raise EngineError(f"TensorRT cannot start: {messages.last_error or error}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    if not parser.parse(model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise EngineError(f"TensorRT cannot take {where}: {_first(errors) or messages.last_error}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.max_aux_streams = 0
    config.clear_flag(trt.BuilderFlag.TF32)
    if progress is not None:
        config.progress_monitor = monitor = _monitor(trt, progress)
    known = config.create_timing_cache(timing)
    if not config.set_timing_cache(known, False):  # of another TensorRT, or damaged: begun anew
        known = config.create_timing_cache(b"")
        config.set_timing_cache(known, False)
    plan = builder.build_serialized_network(network, config)
    if progress is not None and monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineError(f"TensorRT could not build an engine of {where}: {messages.last_error or 'no reason given'}")
    measured = config.get_timing_cache()
    return bytes(plan), bytes(measured.serialize())


def _first(errors: Sequence[Any]) -> str:
    for parser_error in errors:
        reason = " ".join(parser_error.desc().split())
        return f"{parser_error.node_operator()} {parser_error.node_name()}: {reason}"
    return ""


def _monitor(trt: Any, progress: BuildProgress) -> Any:
    def tell(what: Callable[..., None], *arguments: object) -> None:
        """Ctrl-C arrives in here, the Python that runs during a build; it must not unwind through TensorRT."""
        try:
            what(*arguments)
        except KeyboardInterrupt:
            monitor.interrupted = True

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of a module that is only known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(progress.begins, phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(progress.completed, phase_name, step)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            tell(progress.ends, phase_name)

    monitor = Monitor()
    return monitor
