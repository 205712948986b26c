"""One cell, one file: `cell.toml`, read once at start and checked whole, before anything touches a camera or the bus.

Every command and every role calls `load_cell`. What it returns is immutable and complete: unknown keys, missing
cameras, a calibration that lacks a joint, and limits outside the calibrated range have already been refused, each with
one sentence that names file, key and remedy. Paths in the file are relative to it. Joint order in the file is the order
of everything: bus ids, topics, bundles.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from device.errors import ConfigError
from firmware_bridge.calibration import JointCalibration, Unit, UnitMap, load_calibration

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Ubuntu 22.04
    import tomli as tomllib

DEFAULT_CELL = Path("/etc/understudy/cell.toml")
VIRTUAL_CELL = Path(__file__).parent / "cells" / "virtual" / "cell.toml"
VIRTUAL = "virtual"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JointConfig(_Strict):
    """One joint, in its own unit (and unit/s, unit/s^2)."""

    unit: Unit
    min: Finite
    max: Finite
    max_speed: Positive
    max_acceleration: Positive
    home: Finite | None = None  # where `home` moves it to
    grips: bool = False  # it holds things: need not reach its goal, and may push as hard as it is set up to

    @model_validator(mode="after")
    def _ordered(self) -> JointConfig:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        if self.home is not None and not self.min <= self.home <= self.max:
            raise ValueError(f"home {self.home:g} is outside min {self.min:g} to max {self.max:g}")
        return self


class ArmConfig(_Strict):
    """The follower arm: the bus and its joints in order."""

    port: str  # /dev/..., or "virtual": the emulated servos of this cell
    baudrate: Annotated[int, Field(ge=38_400, le=1_000_000)] = 1_000_000
    calibration: Path
    joints: dict[str, JointConfig] = Field(min_length=1)


class CameraConfig(_Strict):
    """One camera. `device` is a path (by-id or by-path for a real cell) or "virtual"."""

    device: str
    width: Annotated[int, Field(gt=0, le=8192)]
    height: Annotated[int, Field(gt=0, le=8192)]
    fps: Annotated[float, Field(gt=0, le=240)] = 30
    format: Literal["MJPG", "YUYV"] = "MJPG"

    @property
    def jpeg_capacity(self) -> int:
        """Bytes reserved for one JPEG: two a pixel, what UVC cameras reserve for their own largest frame."""
        return max(self.width * self.height * 2, 65_536)


class ControlConfig(_Strict):
    """The loop of `execute`."""

    rate_hz: Annotated[float, Field(ge=10, le=500)] = 60
    cpu: Annotated[int, Field(ge=0)] | None = None  # core to pin to
    priority: Annotated[int, Field(ge=1, le=98)] = 50  # SCHED_FIFO, where the system allows it
    read_timeout_ms: Positive | None = None  # default: wire time and a margin, see firmware_bridge.bus

    @model_validator(mode="after")
    def _reads_within_a_period(self) -> ControlConfig:
        if self.read_timeout_ms is not None and self.read_timeout_ms * self.rate_hz >= 1000:
            raise ValueError(f"read_timeout_ms {self.read_timeout_ms:g} is not below the period of {self.rate_hz:g} Hz")
        return self


class PolicyConfig(_Strict):
    """Which policy runs, and how its chunks are handed over."""

    bundle: Path | None = None
    handoff: Literal["ensemble", "crossfade", "latest"] | None = None  # default: what the bundle recommends
    advance: Annotated[int, Field(gt=0)] | None = None  # actions from chunk to chunk; default: as the bundle recommends
    staleness_s: Annotated[float, Field(gt=0, le=5)] = (
        0.5  # the newest chunk's observation is older: decelerate and hold
    )
    max_skew_ms: Positive = 50  # between the cameras' newest frames
    max_frame_age_ms: Positive = 150  # an older newest frame is no observation
    threads: Annotated[int, Field(ge=1)] = 1  # of the inference engine


class GuardConfig(_Strict):
    """What turns motion into a hold or a fault (position, speed and acceleration limits stand with the joints)."""

    max_load: Annotated[float, Field(gt=0, le=1)] = 0.9  # fraction of stall torque, sustained for load_s
    load_s: Positive = 1.0
    max_temperature_c: Annotated[float, Field(gt=0, le=85)] = 65
    min_voltage_v: Positive = 4.5
    max_voltage_v: Positive = 13.0
    silent_s: Positive = 0.5  # a servo that has not answered for so long is a fault
    follow_error: Positive = 30.0  # joint units between goal and position, for follow_s
    follow_s: Positive = 0.7


class WorldConfig(_Strict):
    """The virtual cell only."""

    seed: Annotated[int, Field(ge=0)] = 0


class Cell(_Strict):
    """A whole cell file."""

    schema_version: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    arm: ArmConfig
    cameras: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")], CameraConfig] = {}
    control: ControlConfig = ControlConfig()
    policy: PolicyConfig = PolicyConfig()
    guard: GuardConfig = GuardConfig()
    world: WorldConfig | None = None

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(self.arm.joints)

    @property
    def is_virtual(self) -> bool:
        return self.arm.port == VIRTUAL


class LoadedCell:
    """A checked cell with its calibration. Attributes: cell, path, calibration (in joint order), units (UnitMap)."""

    def __init__(self, cell: Cell, path: Path, calibration: Mapping[str, JointCalibration]) -> None:
        self.cell = cell
        self.path = path
        self.calibration = tuple(calibration[name] for name in cell.joint_names)
        self.units = UnitMap(self.calibration, [joint.unit for joint in cell.arm.joints.values()])

    @property
    def servo_ids(self) -> list[int]:
        return [joint.id for joint in self.calibration]

    def joint_array(self, field: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """One field of every joint's config as float64 [J], in the joint's unit."""
        return np.array([getattr(joint, field) for joint in self.cell.arm.joints.values()], dtype=np.float64)

    @property
    def bundle_path(self) -> Path | None:
        bundle = self.cell.policy.bundle
        return None if bundle is None else self.path.parent / bundle


def load_cell(path: Path) -> LoadedCell:
    """Read and check a cell file. Raises ConfigError with one sentence for the first thing that is wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give --cell PATH, or --cell virtual for the virtual cell") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        cell = Cell.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    return _with_calibration(cell, path)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or correct its spelling{more}"
    if problem["type"] == "missing":
        return f"{key}: is missing; add it{more}"
    found = "" if isinstance(problem["input"], dict) else f", found {problem['input']!r}"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}{found}{more}"


def _with_calibration(cell: Cell, path: Path) -> LoadedCell:
    file = path.parent / cell.arm.calibration
    try:
        calibration = load_calibration(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: arm.calibration: {error}") from error
    missing = [name for name in cell.joint_names if name not in calibration]
    if missing:
        raise ConfigError(
            f"{path}: arm.joints.{missing[0]}: is not in the calibration {file}, which has {', '.join(calibration)}"
        )
    loaded = LoadedCell(cell, path, calibration)
    low, high = loaded.units.limits()
    for index, (name, joint) in enumerate(cell.arm.joints.items()):
        slack = 1e-6 * (high[index] - low[index])
        for key, value in (("min", joint.min), ("max", joint.max)):
            if not low[index] - slack <= value <= high[index] + slack:
                raise ConfigError(
                    f"{path}: arm.joints.{name}.{key}: {value:g} {joint.unit.value} is outside the calibrated range "
                    f"{low[index]:.2f} to {high[index]:.2f}; narrow the limit or calibrate the joint again"
                )
    if cell.is_virtual and cell.world is None:
        raise ConfigError(f"{path}: world: is missing; a cell with arm.port = {VIRTUAL!r} needs a [world] table")
    return loaded


def runtime_directory(cell: LoadedCell) -> Path:
    """Where a cell's topics and sockets live: systemd's $RUNTIME_DIRECTORY, else a folder of its own on a tmpfs."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    base = Path(os.environ.get("XDG_RUNTIME_DIR", f"/dev/shm/user-{os.getuid()}"))
    return base / "understudy" / cell.cell.name
