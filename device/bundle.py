"""A policy bundle: what a policy is, once exported, and the checks that stand between it and an arm.

`predict` opens the bundle that the cell names, `understudy bundle` shows and runs one, the update flow opens one
before it activates it, and `export` writes one. Opening proves that the manifest is of a known schema and that every
file it lists is there with the bytes it had when exported; `check_fits` proves that joints, units, order, cameras and
rates are those of this cell. Every refusal is a BundleError of one sentence. Nothing here imports torch or unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from device.arrays import Array, load_arrays
from device.errors import BundleError
from firmware_bridge.calibration import Unit

if TYPE_CHECKING:
    from device.config import CameraConfig, LoadedCell

SCHEMA = 1
MANIFEST = "manifest.json"
POLICY = "policy.onnx"
GOLDEN = "golden.npz"
STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
ACTION = "action"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Joint(_Strict):
    """One joint of the policy; the list's order is the order of state and action vectors."""

    name: Annotated[str, Field(min_length=1)]
    unit: Unit


class Camera(_Strict):
    """One camera as the policy saw it. `input` is the name of its frames among the policy's inputs."""

    name: Annotated[str, Field(min_length=1)]
    input: Annotated[str, Field(min_length=1)]  # observation.images.<name>, as the checkpoint's training data had it
    width: Count  # px
    height: Count  # px


class Handoff(_Strict):
    """How one chunk should give way to the next; a cell may override it."""

    method: Literal["ensemble", "crossfade", "latest"]
    m: Annotated[float, Field(allow_inf_nan=False)] | None = None  # ensemble: weights exp(-m * i), i = 0 the oldest


class Provenance(_Strict):
    """Where the policy comes from."""

    policy_type: str  # as the training framework calls it
    source_layout: str  # which checkpoint layout was read
    checkpoint: str  # folder name, for people
    checkpoint_sha256: Sha256  # of the weights file
    source_files: dict[str, Sha256]  # every file of the checkpoint that was read
    dataset: str | None = None
    exporter: str  # understudy's version
    exported_at: str  # UTC, ISO 8601


class Fidelity(_Strict):
    """What export measured on its golden inputs, in joint units."""

    weights: Literal["fp32", "fp16"]  # as stored; arithmetic is fp32 either way
    max_error: float  # policy.onnx in onnxruntime against the PyTorch forward with the same (rounded) weights
    max_rounding_error: float  # PyTorch forward with the stored weights against the checkpoint's own


class Manifest(_Strict):
    """manifest.json, whole."""

    schema_version: Literal[1] = Field(alias="schema")
    family: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    joints: Annotated[tuple[Joint, ...], Field(min_length=1)]
    cameras: tuple[Camera, ...]
    state_size: Count
    environment_state: Count | None = None
    chunk_size: Count
    action_rate_hz: Positive
    observation_steps: Count = 1
    handoff: Handoff
    two_state_joints: tuple[str, ...] = ()  # a gripper that only opens or closes: never averaged
    provenance: Provenance
    fidelity: Fidelity
    files: dict[str, Sha256]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [joint.name for joint in self.joints]
        cameras = [camera.name for camera in self.cameras]
        for kind, found in (("joint", names), ("camera", cameras)):
            if len(set(found)) != len(found):
                raise ValueError(f"a {kind} is named twice in {', '.join(found)}")
        if unknown := sorted(set(self.two_state_joints) - set(names)):
            raise ValueError(f"two_state_joints names {unknown[0]!r}, which is no joint of this policy")
        for name in self.files:
            if not _stays_inside(name):
                raise ValueError(f"files: {name!r} points outside the bundle")
        return self

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)

    def input_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Name -> (shape, dtype) of every input of one observation step, in LeRobot's names."""
        inputs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {STATE: ((self.state_size,), np.dtype(np.float32))}
        if self.environment_state is not None:
            inputs[ENVIRONMENT_STATE] = ((self.environment_state,), np.dtype(np.float32))
        for camera in self.cameras:
            inputs[camera.input] = ((camera.height, camera.width, 3), np.dtype(np.uint8))
        return inputs

    def to_json(self) -> bytes:
        document = self.model_dump(mode="json", by_alias=True)
        return (json.dumps(document, indent=2) + "\n").encode()


class Bundle:
    """An opened bundle. Attributes: path, manifest, digest (sha256 of manifest.json, hex: the policy's identity)."""

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read the manifest and prove that every file it lists is there, unchanged. Raises BundleError."""
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise BundleError(f"{path} {what}; a bundle is a directory that holds {MANIFEST}")
        try:
            raw = (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise BundleError(f"{path} holds no {MANIFEST}, so it is no bundle (or its export was cut short)") from None
        except OSError as error:
            raise BundleError(f"{path / MANIFEST} cannot be read: {error}") from error
        manifest = parse_manifest(raw, path / MANIFEST)
        for name, expected in manifest.files.items():
            _check_file(path, name, expected)
        for name in (POLICY, GOLDEN):
            if manifest.family == "act" and name not in manifest.files:
                raise BundleError(f"{path / MANIFEST}: files: lists no {name}; export the policy again")
        return cls(path, manifest, hashlib.sha256(raw).hexdigest())

    def check_fits(self, cell: LoadedCell) -> None:
        """Raise BundleError, with one sentence, where the policy's joints, cameras or rates are not the cell's."""
        _check_joints(self.path, self.manifest, cell)
        _check_cameras(self.path, self.manifest, cell.cell.cameras)
        if self.manifest.environment_state is not None:
            raise BundleError(
                f"{self.path}: the policy takes {ENVIRONMENT_STATE}, which only a simulator has; a cell cannot run it"
            )
        rate, control = self.manifest.action_rate_hz, cell.cell.control.rate_hz
        if control < rate:
            raise BundleError(
                f"{self.path}: the policy acts at {rate:g} Hz, but control.rate_hz of {cell.path} is {control:g}; "
                f"raise it to {rate:g} or more, or actions would be skipped"
            )

    def golden(self) -> tuple[dict[str, Array], Array]:
        """The inputs that export ran, and the reference's action chunk, float32 [K, A] in joint units."""
        arrays = load_arrays(self.path / GOLDEN)
        expected = arrays.pop(ACTION, None)
        shape = (self.manifest.chunk_size, len(self.manifest.joints))
        if expected is None or expected.shape != shape:
            found = "nothing" if expected is None else f"shape {list(expected.shape)}"
            raise BundleError(f"{self.path / GOLDEN}: {ACTION} should have shape {list(shape)}, found {found}")
        for name, array in [*arrays.items(), (ACTION, expected)]:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise BundleError(f"{self.path / GOLDEN}: {name} holds NaN or infinity; export the policy again")
        return arrays, expected


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """manifest.json's bytes to a Manifest. `path` is for the messages. Raises BundleError."""
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(schema, int):
        raise BundleError(f"{path}: schema: is missing, so this is no bundle manifest")
    if schema > SCHEMA:
        raise BundleError(
            f"{path} was written by a newer exporter (schema {schema}; this device knows {SCHEMA}): "
            "update the device software"
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path}: {key + ': ' if key else ''}{message}; export the policy again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _check_file(root: Path, name: str, expected: str) -> None:
    file = root / name
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)):
        raise BundleError(f"{file} is a link that points outside the bundle; export or download the bundle again")
    if not file.is_file():
        raise BundleError(f"{file} is missing; export or download the bundle again")
    try:
        found = file_sha256(file)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
    if found != expected:
        raise BundleError(
            f"{file} is not the file that was exported (sha256 {found[:12]}..., the manifest says {expected[:12]}...); "
            "export or download the bundle again"
        )


def _check_joints(path: Path, manifest: Manifest, cell: LoadedCell) -> None:
    wanted, found = manifest.joint_names, cell.cell.joint_names
    if wanted != found:
        reason = "in another order" if sorted(wanted) == sorted(found) else "other joints"
        raise BundleError(f"{path}: the policy moves {', '.join(wanted)}; {cell.path} has {reason}: {', '.join(found)}")
    for joint in manifest.joints:
        unit = cell.cell.arm.joints[joint.name].unit
        if unit is not joint.unit:
            raise BundleError(
                f"{path}: the policy has joint {joint.name} in {joint.unit.value}, but arm.joints.{joint.name}.unit of "
                f"{cell.path} is {unit.value}; correct the cell, or export again with the units that it was trained in"
            )
    if manifest.state_size != len(wanted):
        raise BundleError(
            f"{path}: the policy's {STATE} has {manifest.state_size} values for {len(wanted)} joints; "
            "a cell can only give the joints' positions"
        )


def _check_cameras(path: Path, manifest: Manifest, cameras: Mapping[str, CameraConfig]) -> None:
    for camera in manifest.cameras:
        found = cameras.get(camera.name)
        if found is None:
            have = ", ".join(cameras) or "no camera"
            raise BundleError(f"{path}: the policy needs a camera named {camera.name!r}; the cell has {have}")
        if (found.width, found.height) != (camera.width, camera.height):
            raise BundleError(
                f"{path}: the policy was trained on {camera.width}x{camera.height} pixels of camera {camera.name!r}, "
                f"but the cell's gives {found.width}x{found.height}; set cameras.{camera.name}.width and height"
            )
