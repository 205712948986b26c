"""Where TensorRT's engines lie on a device, and under which key: an engine runs only where it was built.

An engine depends on the GPU, on TensorRT's and CUDA's versions, on the power mode that its kernels were timed in, on
the graph and on how it is built of it; all of them are in its key, so a JetPack update or another `nvpmodel` makes an
engine unfindable instead of wrong. An engine counts once its description stands beside it: the description is written
last and holds the engine's hash, so a power cut or a flipped bit leads to a new build, never into TensorRT's
deserialiser. Timing caches, one a device, make the next build shorter. `tensorrt_build.py` writes here,
`engine_tensorrt.py` reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from device.durable import write_durably
from device.errors import UnderstudyError

DEFAULT_CACHE = Path("/var/cache/understudy/engines")
POWER_STATUS = Path("/var/lib/nvpmodel/status")  # of nvpmodel on a Jetson: "pmode:0002 fmode:fanNull"
BOARD = Path("/proc/device-tree/model")
UNKNOWN = "unknown"
# Of `tensorrt_build.py`: another one with every change to its flags or to what it edits in a graph.
RECIPE = "1"


class EngineCacheError(UnderstudyError, OSError):
    """The folder of engines cannot be written."""


@dataclass(frozen=True)
class Machine:
    """What an engine is bound to. All of it is in its key."""

    gpu: str  # the GPU's name and, on a Jetson, the board's: all Orins call their GPU "Orin"
    sm: str  # compute capability and number of multiprocessors, "8.7 x16"
    tensorrt: str
    cuda: str  # of the driver
    power_mode: str  # nvpmodel's number; unknown where there is no nvpmodel


@dataclass(frozen=True)
class Description:
    """engine.json: what an engine is, for people and for proving that it is whole."""

    machine: Machine
    precision: str
    graph: str  # file name in its bundle
    graph_sha256: str
    plan_sha256: str
    build_s: float


class EngineCache:
    """A folder of engines and timing caches. Reading it never raises; what cannot be read counts as not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan_path(self, key: str) -> Path:
        return self.folder / f"{key}.engine"

    def load(self, key: str) -> bytes | None:
        """A serialized engine, or None where there is none that is whole."""
        try:
            document = json.loads((self.folder / f"{key}.json").read_bytes())
            plan = self.plan_path(key).read_bytes()
            expected = document["plan_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return plan if hashlib.sha256(plan).hexdigest() == expected else None

    def store(self, key: str, plan: bytes, description: Description) -> Path:
        """Keep an engine; its description goes last, and makes it count. Raises EngineCacheError."""
        path = self.plan_path(key)
        document = json.dumps(asdict(description), indent=2) + "\n"
        with self._writing():
            write_durably(path, plan)
            write_durably(self.folder / f"{key}.json", document.encode())
        return path

    def timing(self, machine: Machine) -> bytes:
        """The device's timing cache, empty where there is none."""
        try:
            return self._timing_path(machine).read_bytes()
        except OSError:
            return b""

    def store_timing(self, machine: Machine, timing: bytes) -> None:
        """Raises EngineCacheError."""
        with self._writing():
            write_durably(self._timing_path(machine), timing)

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """One builder at a time: two would time each other's load instead of the kernels. Raises EngineCacheError."""
        with self._writing():
            descriptor = os.open(self.folder / ".building", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._sweep()
            yield
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what builds that were killed left half written; nobody else writes while this one has the lock."""
        for partial in self.folder.glob(".*.partial"):
            with suppress(OSError):
                partial.unlink()

    def _timing_path(self, machine: Machine) -> Path:
        return self.folder / f"{_digest(asdict(machine))[:16]}.timing"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise EngineCacheError(
                f"{self.folder}, where engines are kept, cannot be written: {error}; give another folder with --cache"
            ) from error


def default_cache() -> Path:
    """systemd's cache directory of the unit where there is one, else the system's."""
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    return Path(given) / "engines" if given else DEFAULT_CACHE


def engine_key(machine: Machine, precision: str, graph_sha256: str) -> str:
    """The name of an engine: hex SHA-256 over everything that it depends on."""
    return _digest({**asdict(machine), "precision": precision, "graph_sha256": graph_sha256, "recipe": RECIPE})


def power_mode(status: Path = POWER_STATUS) -> str:
    """nvpmodel's mode as a number, from its status file, else by asking it, else 'unknown'."""
    try:
        for word in status.read_text().split():
            if word.startswith("pmode:"):
                return str(int(word.removeprefix("pmode:")))
    except (OSError, ValueError):
        pass
    try:
        asked = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=5, check=True)
        return str(int(asked.stdout.split()[-1]))  # "NV Power Mode: 15W\n1"
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return UNKNOWN


def board_name(path: Path = BOARD) -> str:
    """The board as the device tree calls it, '' where there is none (a PC)."""
    try:
        return path.read_bytes().rstrip(b"\0").decode(errors="replace").strip()
    except OSError:
        return ""


def _digest(document: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
