"""The CUDA runtime's calls that the TensorRT engine makes, through NVIDIA's Python bindings, each one checked.

NVIDIA's package keeps the runtime in `cuda.bindings.runtime` since 12.6 and in `cuda.cudart` before. Every call answers
with an error code first; here a code that is not success becomes an EngineError with the code's name. Memory comes as
pairs of a page-locked host array and its place on the device, so that copies can be asynchronous and be captured. A
stream records a CUDA graph in thread-local mode: what other threads of the process do meanwhile cannot spoil it. All of
it is given back by `close`, in the order of making reversed.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from device.arrays import Array
from device.engine import EngineError

ALIGNMENT = 256  # bytes; what cudaMalloc gives, and what TensorRT asks of every tensor's address

_LAYOUTS = ("cuda.bindings.runtime", "cuda.cudart")


class NotHereError(EngineError):
    """What this machine has not got: a GPU, its driver, a library. Nothing is broken."""


@dataclass(frozen=True)
class Gpu:
    """What the CUDA runtime says about the first device."""

    name: str
    sm: str  # compute capability, "8.7"
    multiprocessors: int
    driver: int  # CUDA version of the driver, 12060 for 12.6


@dataclass(frozen=True)
class Buffer:
    """`host` is a view of page-locked memory, `device` the address of as many bytes on the device."""

    host: Array
    device: int


class Cuda:
    """One device, one stream. Not for use from several threads."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._owned = ExitStack()
        # While the GPU works, the waiting thread sleeps: spinning would take its core from the control loop.
        self._check(runtime.cudaSetDeviceFlags, runtime.cudaDeviceScheduleBlockingSync)
        (stream,) = self._check(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self._stream = stream
        self._owned.callback(self._check, runtime.cudaStreamDestroy, stream)

    @classmethod
    def open(cls) -> Cuda:
        """Raises NotHereError where there are no bindings, no driver or no device."""
        runtime = load_bindings()
        try:
            (count,) = _checked(runtime, runtime.cudaGetDeviceCount)
        except RuntimeError as error:  # bindings up to 12.6 raise where there is no libcuda; ours is a RuntimeError too
            raise NotHereError(f"there is no usable NVIDIA GPU here ({error})") from None
        if count == 0:
            raise NotHereError("there is no NVIDIA GPU here")
        return cls(runtime)

    @property
    def stream(self) -> int:
        """The stream's handle, for TensorRT."""
        return int(self._stream)

    def gpu(self) -> Gpu:
        (properties,) = self._check(self._runtime.cudaGetDeviceProperties, 0)
        (driver,) = self._check(self._runtime.cudaDriverGetVersion)
        name = properties.name
        return Gpu(
            name=name.decode() if isinstance(name, bytes) else str(name),
            sm=f"{properties.major}.{properties.minor}",
            multiprocessors=int(properties.multiProcessorCount),
            driver=int(driver),
        )

    def free_bytes(self) -> int:
        """Of the device's memory, by all processes; on a Jetson that is the machine's memory."""
        return int(self._check(self._runtime.cudaMemGetInfo)[0])

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Page-locked and device memory of one array, both zeros."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        (address,) = self._check(self._runtime.cudaHostAlloc, size, self._runtime.cudaHostAllocDefault)
        self._owned.callback(self._check, self._runtime.cudaFreeHost, address)
        (device,) = self._check(self._runtime.cudaMalloc, size)
        self._owned.callback(self._check, self._runtime.cudaFree, device)
        raw = memoryview((ctypes.c_uint8 * size).from_address(int(address)))
        host: Array = np.ndarray(shape, dtype, raw)
        host[...] = 0
        made = Buffer(host, int(device))
        self.upload(made)
        self.synchronize()
        return made

    def upload(self, buffer: Buffer) -> None:
        """Host to device, in the stream's order."""
        self._copy(buffer.device, buffer.host.ctypes.data, buffer.host.nbytes, "cudaMemcpyHostToDevice")

    def download(self, buffer: Buffer) -> None:
        """Device to host, in the stream's order; there once `synchronize` returns."""
        self._copy(buffer.host.ctypes.data, buffer.device, buffer.host.nbytes, "cudaMemcpyDeviceToHost")

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        kinds = self._runtime.cudaMemcpyKind
        direction = {
            "cudaMemcpyHostToDevice": kinds.cudaMemcpyHostToDevice,
            "cudaMemcpyDeviceToHost": kinds.cudaMemcpyDeviceToHost,
        }[kind]
        self._check(self._runtime.cudaMemcpyAsync, target, source, size, direction, self._stream)

    def synchronize(self) -> None:
        """Wait for all that was asked of the stream. Raises EngineError for whatever of it failed."""
        self._check(self._runtime.cudaStreamSynchronize, self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once for warming up, then record it: returns what launches the recording.

        TensorRT must have run once with the same addresses before it is captured (it allocates on a first run, which a
        capture refuses). `work` may only ask for copies and networks of this stream. Raises EngineError.
        """
        runtime = self._runtime
        work()
        self.synchronize()
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(runtime.cudaStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            runtime.cudaStreamEndCapture(self._stream)  # its error would only say that the capture was given up
            raise
        (graph,) = self._check(runtime.cudaStreamEndCapture, self._stream)
        try:
            (executable,) = self._check(runtime.cudaGraphInstantiateWithFlags, graph, 0)
        finally:
            self._check(runtime.cudaGraphDestroy, graph)
        self._owned.callback(self._check, runtime.cudaGraphExecDestroy, executable)

        def launch() -> None:
            self._check(runtime.cudaGraphLaunch, executable, self._stream)

        return launch

    def close(self) -> None:
        """Give everything back. Buffers' host arrays must not be touched any more."""
        self._owned.close()

    def _check(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        return _checked(self._runtime, function, *arguments)


def gpu_free_bytes() -> int | None:
    """Free memory of the first device, None where there is none."""
    try:
        runtime = load_bindings()
        return int(_checked(runtime, runtime.cudaMemGetInfo)[0])
    except RuntimeError:  # an EngineError is one, and so is what old bindings raise without a driver
        return None


def load_bindings() -> Any:
    """NVIDIA's module of the CUDA runtime, in either layout. Raises NotHereError."""
    reasons: list[str] = []
    for name in _LAYOUTS:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(str(error))
    raise NotHereError(
        f"NVIDIA's CUDA bindings are not installed here ({reasons[0]}); pip install 'understudy[jetson]'"
    )


def _checked(runtime: Any, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """What a call gave besides its error code. Raises EngineError with the code's name."""
    result = function(*arguments)
    code, values = (result[0], tuple(result[1:])) if isinstance(result, tuple) else (result, ())
    if int(code) != int(runtime.cudaError_t.cudaSuccess):
        name = runtime.cudaGetErrorName(code)[1]
        text = name.decode() if isinstance(name, bytes) else str(name)
        raise EngineError(f"{function.__name__} failed: {text}")
    return values
