"""manifest.json: what a bundle says about its policy, and which of it cannot be true.

`bundle.py` reads one when a bundle is opened, `export` writes one, `engine.py` and `predict` take shapes, rates and the
sampler from it. A manifest that parses is consistent in itself: names are unique, paths stay inside the bundle, a
policy that samples says how. Fields that came later have defaults, so that the bundles of earlier exports still open;
what a newer exporter wrote is refused with the remedy. Every refusal is a BundleError of one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from device.errors import BundleError
from firmware_bridge.calibration import Unit

SCHEMA = 1
STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
ACTION = "action"
NOISE = "noise"
STEP_NOISE = "step_noise"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # the bound of parity follows from it
Family = Literal["act", "diffusion", "cloning"]  # ACT; what denoises; plain behaviour cloning
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
    advance: Count | None = (
        None  # actions from one chunk's observation to the next one's; None: as fast as inference is
    )


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

    weights: Literal["fp32", "fp16"]  # as stored
    max_error: Error  # the engine in onnxruntime against the PyTorch forward with the same (rounded) weights
    max_rounding_error: Error  # PyTorch forward with the stored weights against the checkpoint's own
    precision: Literal["fp32", "fp16", "int8"] = "fp32"  # of the network's arithmetic
    joint_errors: tuple[Error, ...] = ()  # per joint, largest error against fp32 on recorded observations
    observations: int = 0  # how many recorded observations that was


class Sampler(_Strict):
    """How a policy of family diffusion samples its actions; the numbers of every step are in sampler.npz."""

    solver: Annotated[str, Field(min_length=1)]  # ddpm, ddim, dpmpp, consistency, ctm; for people, no engine reads it
    steps: Count  # S: runs of denoise.onnx in one inference
    spacing: str  # of the steps over training's schedule, as the solver's literature calls it
    horizon: Count  # H: actions that are denoised
    first_action: Annotated[int, Field(ge=0)]  # index in the horizon of the chunk's first action
    initial_scale: Positive = 1.0  # of the standard normal noise that sampling starts from
    draws_noise: bool  # some step draws noise of its own
    distilled: bool = False  # trained to need few steps


class Manifest(_Strict):
    """manifest.json, whole."""

    schema_version: Literal[1] = Field(alias="schema")
    family: Family
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
    sampler: Sampler | None = None  # of family diffusion, and only of it
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
        if self.fidelity.joint_errors and len(self.fidelity.joint_errors) != len(names):
            raise ValueError(f"fidelity.joint_errors has {len(self.fidelity.joint_errors)} for {len(names)} joints")
        self._check_family()
        return self

    def _check_family(self) -> None:
        sampler = self.sampler
        if self.family != "diffusion":
            if sampler is not None:
                raise ValueError(f"sampler: a policy of family {self.family} answers at once and has none")
            if self.observation_steps != 1:
                raise ValueError(f"observation_steps: a policy of family {self.family} looks at one step")
        elif sampler is None:
            raise ValueError("sampler: is missing, and a policy of family diffusion needs one")
        elif sampler.first_action + self.chunk_size > sampler.horizon:
            last = sampler.first_action + self.chunk_size
            raise ValueError(f"sampler: actions {sampler.first_action} to {last} of a horizon of {sampler.horizon}")

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

    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the float32 noise that an inference may be given; empty where the policy does not sample."""
        if self.sampler is None:
            return {}
        drawn = (self.sampler.horizon, len(self.joints))
        return {NOISE: drawn, STEP_NOISE: (self.sampler.steps, *drawn)}

    def to_json(self) -> bytes:
        document = self.model_dump(mode="json", by_alias=True)
        return (json.dumps(document, indent=2) + "\n").encode()


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
    family = document.get("family")
    if isinstance(family, str) and family not in get_args(Family):
        raise BundleError(
            f"{path}: holds a policy of family {family!r}; this device runs {', '.join(get_args(Family))}: "
            "update the device software"
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path}: {key + ': ' if key else ''}{message}; export the policy again") from None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
