"""One built engine, loaded: its tensors are held against the manifest, given addresses, and it is put into a stream.

`engine_tensorrt.py` opens a bundle's engines through `TensorRt` and runs them as `Network`. An engine that is not
there, that TensorRT cannot load or whose tensors are not the manifest's is an EngineError that says which command makes
a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from device.bundle import Bundle
from device.cuda_runtime import Cuda
from device.engine import EngineError, Signature
from device.engine_cache import EngineCache
from device.tensorrt_build import key_of
from device.tensorrt_library import keep_messages, load_tensorrt, this_machine

Tensors = dict[str, tuple[tuple[int, ...], np.dtype[Any] | None]]
"""Name -> (shape, dtype), the dtype None where it is none that we use."""


class NotBuiltError(EngineError):
    """TensorRT is here, an engine for this bundle is not (any more)."""


class Network:
    """An engine with its execution context."""

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        self._path = path
        self.inputs: Tensors = {}
        self.outputs: Tensors = {}
        types: dict[Any, np.dtype[Any]] = {
            trt.DataType.FLOAT: np.dtype(np.float32),
            trt.DataType.UINT8: np.dtype(np.uint8),
        }
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            side = self.inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else self.outputs
            side[name] = tuple(engine.get_tensor_shape(name)), types.get(engine.get_tensor_dtype(name))
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"TensorRT has no memory for running {path}; another process may hold the GPU's")

    def check(self, inputs: Signature, outputs: Signature) -> None:
        """Raise EngineError unless the engine takes and gives just these; inputs that no node reads may be missing."""
        for name, found in self.inputs.items():
            if inputs.get(name) != found:
                raise EngineError(f"{self._path}: its engine takes {name} {_show(found)}, its manifest says otherwise")
        if self.outputs != outputs:
            given = ", ".join(f"{name} {_show(found)}" for name, found in self.outputs.items())
            raise EngineError(f"{self._path}: its engine gives {given}, its manifest says otherwise")

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Where tensors lie on the device, from the next `enqueue` on. Raises EngineError."""
        for name, address in addresses.items():
            dropped = name not in self.inputs and name not in self.outputs
            if not dropped and not self._context.set_tensor_address(name, address):
                raise EngineError(f"{self._path}: TensorRT refused the address of {name}")

    def enqueue(self, stream: int) -> None:
        """Run, in the stream's order. Raises EngineError."""
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._path}: TensorRT could not run its engine")

    def close(self) -> None:
        """The context before its engine: TensorRT asks for that order."""
        self._context = None
        self._engine = None


class TensorRt:
    """TensorRT's runtime for one bundle's engines of one precision."""

    def __init__(self, bundle: Bundle, precision: str, cache: EngineCache, cuda: Cuda) -> None:
        self._trt = load_tensorrt()
        self._bundle, self._precision, self._cache = bundle, precision, cache
        self._machine = this_machine(self._trt, cuda.gpu())
        self._messages = keep_messages(self._trt)
        try:
            self._runtime = self._trt.Runtime(self._messages)
        except (TypeError, RuntimeError) as error:  # the binding's way to say that the library gave it nothing
            raise EngineError(f"TensorRT cannot start: {self._messages.last_error or error}") from error

    def open(self, graph: str) -> Network:
        """The engine of one of the bundle's graphs. Raises NotBuiltError, EngineError."""
        path = self._bundle.path / graph
        plan = self._cache.load(key_of(self._bundle, graph, self._precision, self._machine))
        if plan is None:
            raise NotBuiltError(
                f"{path} has no {self._precision} engine for this machine in {self._cache.folder}; "
                f"understudy bundle build {self._bundle.path} makes one"
            )
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"TensorRT cannot load the engine of {path}: {self._messages.last_error or 'no reason given'}; "
                f"understudy bundle build --rebuild {self._bundle.path} makes it anew"
            )
        return Network(self._trt, engine, path)

    def close(self) -> None:
        """After its networks: TensorRT asks for that order."""
        self._runtime = None


def _show(found: tuple[tuple[int, ...], np.dtype[Any] | None]) -> str:
    shape, dtype = found
    return f"{dtype or 'of a type that is not used here'} {list(shape)}"
