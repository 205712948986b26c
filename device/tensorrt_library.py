"""TensorRT on this machine: found or refused in one sentence, its messages kept, its engines' names for this device.

The builder and the engine both begin here. Precision is authored in the graphs, which only strongly typed networks
honour; TensorRT has those since 10.0, and 10.3 (JetPack 6.1) is the oldest that is meant to work. Nothing here or in
the modules that use it may use a name of TensorRT's that tests/fixtures/nvidia_names.json does not know.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from device.cuda_runtime import Gpu, NotHereError
from device.engine_cache import Machine, board_name, power_mode

OLDEST = (10, 3)

logger = logging.getLogger("tensorrt")


def load_tensorrt() -> Any:
    """The module. Raises NotHereError where it is not installed, cannot be loaded or is too old."""
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        raise NotHereError(
            f"TensorRT is not installed here ({error}); on a Jetson it is JetPack's python3-libnvinfer, which a "
            "virtual environment sees with --system-site-packages"
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise NotHereError(
            f"TensorRT {trt.__version__} is installed here, and {OLDEST[0]}.{OLDEST[1]} is the oldest that does as "
            "the graphs say; update JetPack to 6.1 or newer"
        )
    return trt


def this_machine(trt: Any, gpu: Gpu) -> Machine:
    """What engines that are built here are bound to."""
    name = " / ".join(part for part in (gpu.name, board_name()) if part)
    driver = f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
    return Machine(name, f"{gpu.sm} x{gpu.multiprocessors}", str(trt.__version__), driver, power_mode())


def keep_messages(trt: Any) -> Any:
    """A logger for TensorRT: warnings and errors go to ours, and `last_error` is for the exception that follows."""

    class Messages(trt.ILogger):  # type: ignore[misc]  # a class of a module that is only known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last_error = " ".join(msg.split())
                logger.error("%s", self.last_error)
            elif severity == trt.ILogger.WARNING:
                logger.info("%s", " ".join(msg.split()))

    return Messages()
