"""Policies of one graph (ACT, behaviour cloning) in onnxruntime, and how any graph of a bundle is loaded there.

`open_engine` makes an OnnxEngine for policy.onnx; the engine of policies that sample loads its two graphs with the same
functions. Inputs and output are bound to the network once. onnxruntime's worker threads sleep between inferences
instead of spinning: on a small board a spinning worker would take its core from the control loop.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from device.arrays import Array
from device.bundle import ACTION, Manifest
from device.engine import NOT_FINITE, EngineError, HeldStep, Signature

Provider = str | tuple[str, dict[str, str]]
"""One of onnxruntime's execution providers, with its options."""

ON_CPU: tuple[Provider, ...] = ("CPUExecutionProvider",)
ON_CUDA: tuple[Provider, ...] = (("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider")

_TENSOR_TYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}


class OnnxEngine:
    """policy.onnx on the CPU: what `inputs` holds is its one observation step."""

    def __init__(
        self, path: Path, manifest: Manifest, threads: int = 1, providers: Sequence[Provider] = ON_CPU
    ) -> None:
        shape = (manifest.chunk_size, len(manifest.joints))
        expected = manifest.input_shapes()
        session = open_session(path, threads, providers)
        check_signature(path, session, expected, {ACTION: (shape, np.dtype(np.float32))})
        self._path = path
        self._held = HeldStep(path)
        self._output: Array = np.zeros(shape, np.float32)
        self.inputs = zeros(expected)
        self._graph = BoundGraph(path, session, self.inputs, {ACTION: self._output})

    def observe(self, key: Hashable) -> None:
        """See Engine.observe."""
        self._held.observe(key)

    def knows(self, key: Hashable) -> bool:
        """See Engine.knows."""
        return self._held.knows(key)

    def infer(
        self, keys: Sequence[Hashable] | None = None, *, noise: Array | None = None, step_noise: Array | None = None
    ) -> Array:
        """See Engine.infer."""
        self._held.check(keys, noise, step_noise)
        self._graph.run()
        if not np.isfinite(self._output).all():
            raise EngineError(f"{self._path}: {NOT_FINITE}")
        return self._output


class BoundGraph:
    """A session that reads and writes the same arrays on every run; whoever made it holds them and keeps them alive."""

    def __init__(self, path: Path, session: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._path = path
        self._session = session
        self._arrays = (*inputs.values(), *outputs.values())
        self._binding = session.io_binding()
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._options = onnxruntime.RunOptions()

    def run(self) -> None:
        """Raises EngineError where onnxruntime fails."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise EngineError(f"{self._path}: inference failed: {error}") from error


def zeros(signature: Signature) -> dict[str, Array]:
    """An array for every name, to be bound."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in signature.items()}


def open_session(path: Path, threads: int, providers: Sequence[Provider] = ON_CPU) -> Any:
    """An onnxruntime session. Raises EngineError for a file that is no network, and where `providers` begin with one
    that onnxruntime has not got here (left to itself it would go on with the next one and only warn)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path} cannot be loaded: {reason}; export or download the bundle again") from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise EngineError(f"onnxruntime could not start {wanted} here; its message says which library it lacks")
    return session


def check_signature(path: Path, session: Any, inputs: Signature, outputs: Signature) -> None:
    """Raise EngineError unless the graph takes and gives just these."""
    found, results = signature(session.get_inputs()), signature(session.get_outputs())
    if found != inputs:
        wrong = sorted(name for name in {*found, *inputs} if found.get(name) != inputs.get(name))
        raise EngineError(f"{path} does not take the inputs that its manifest names ({', '.join(wrong)})")
    for name, (shape, dtype) in outputs.items():
        if results.pop(name, None) != (shape, dtype):
            raise EngineError(f"{path} does not give {name} {dtype} {list(shape)}, as its manifest says")
    if results:
        raise EngineError(f"{path} gives {', '.join(results)} too, which its manifest knows nothing of")


def signature(nodes: Any) -> dict[str, tuple[tuple[Any, ...], np.dtype[Any] | None]]:
    """What a session says of its inputs or outputs; a dimension that is not fixed is a name, an unknown type None."""
    return {node.name: (tuple(node.shape), _TENSOR_TYPES.get(node.type)) for node in nodes}
