"""`understudy export`: a checkpoint in, a policy bundle out.

The command line calls `export_checkpoint`; so do the training recipes and the tests. It reads the checkpoint, asks
for what no checkpoint says (joint names, units, rate), has the network written and proven equal to PyTorch, and only
then puts a bundle where it was asked for.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ValidationError
from rich.console import Console

from device.arrays import Array, load_arrays
from device.bundle import (
    ACTION,
    STATE,
    Camera,
    Fidelity,
    Handoff,
    Joint,
    Manifest,
    Provenance,
)
from export.act import ActPolicy, read_act
from export.act_export import AuthoredPolicy, author, input_shapes
from export.bundle_writer import refuse_occupied, write_bundle
from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.lerobot import read_checkpoint
from export.normalize import Statistics
from export.units import check_units, name_joints
from firmware_bridge.calibration import Unit

IMAGES = "observation.images."
ENSEMBLE_M = 0.01  # Zhao et al. 2023, and LeRobot's documentation
SUPPORTED = ("act",)

Method = Literal["ensemble", "crossfade", "latest"]
Progress = Callable[[str], None]
C = TypeVar("C", bound=Enum)


class Weights(str, Enum):
    """How weights are stored in policy.onnx."""

    fp32 = "fp32"
    fp16 = "fp16"


@dataclass(frozen=True)
class ExportReport:
    """What export did. `max_error` is policy.onnx against PyTorch, in joint units."""

    path: Path
    nodes: int
    seconds: float
    max_error: float
    max_rounding_error: float
    warnings: tuple[str, ...]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    joints: Sequence[str] | None = None,
    rate_hz: float = 30.0,
    units: Unit = Unit.degrees,
    dataset: str | None = None,
    handoff: Method | None = None,
    ensemble_m: float | None = None,
    two_state_joints: Sequence[str] = (),
    weights: Weights | Literal["fp32", "fp16"] = Weights.fp32,
    observation: Path | None = None,
    allow_unnormalized: Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a LeRobot checkpoint directory as a bundle at `out`.

    `joints`: names in action order (NAME=UNIT for one that differs from `units`); SO-101's where there are six.
    `rate_hz`: actions a second in training. `observation`: an .npz of one real observation by LeRobot's names, which
    becomes the golden input and the reference pictures. `weights`: how they are stored; arithmetic is float32.
    Raises ExportError (or BundleError for a bad `observation`); `out` is then as it was.
    """
    started = time.perf_counter()
    weights = Weights(weights)
    say = progress or (lambda step: None)
    refuse_occupied(out, overwrite)
    say("reading the checkpoint")
    source = read_checkpoint(checkpoint, allow_unnormalized)
    policy = _read_policy(source)
    manifest = _manifest(
        source,
        policy,
        joints=name_joints(joints, policy.config.action_size, units),
        rate_hz=rate_hz,
        dataset=dataset,
        handoff=(handoff or "ensemble", ensemble_m),
        two_state_joints=two_state_joints,
    )
    check_units(manifest.joints, _joint_statistics(source, manifest), str(source.path))
    seen = None if observation is None else _observation(source, policy, observation)
    say("writing and checking the network")
    authored = author(policy, _input_names(source, policy), seen, half=weights is Weights.fp16)
    say("writing the bundle")
    write_bundle(
        out,
        manifest.model_copy(update={"fidelity": _fidelity(weights, authored)}),
        authored.model,
        authored.golden,
        pictures={} if seen is None else {camera.name: seen[name] for name, camera in _cameras(source, policy).items()},
        overwrite=overwrite,
    )
    return ExportReport(
        path=out,
        nodes=authored.nodes,
        seconds=time.perf_counter() - started,
        max_error=authored.max_error,
        max_rounding_error=authored.max_rounding_error,
        warnings=tuple(source.warnings),
    )


def run_export(
    checkpoint: Path,
    out: Path,
    *,
    joints: str | None = None,
    rate_hz: float = 30.0,
    units: str = Unit.degrees.value,
    weights: str = "fp32",
    as_json: bool = False,
    **options: Any,
) -> None:
    """What the command line calls: options as text, progress on standard error, the report on standard output.

    `options`: further ones of `export_checkpoint`, as they are there.
    """
    console = Console(stderr=True)
    with console.status("starting") as status:
        report = export_checkpoint(
            checkpoint,
            out,
            joints=None if joints is None else joints.split(","),
            rate_hz=rate_hz,
            units=_choice("--units", units, Unit),
            weights=_choice("--weights", weights, Weights),
            progress=status.update,
            **options,
        )
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(asdict(report) | {"path": str(report.path)}))
        return
    print(
        f"{report.path}: {report.nodes} nodes in {report.seconds:.1f} s, "
        f"largest difference from PyTorch {report.max_error:.2g} of a joint unit"
        + (f", from rounding the weights {report.max_rounding_error:.2g}" if weights == "fp16" else "")
    )


def _choice(option: str, text: str, choices: type[C]) -> C:
    try:
        return choices(text)
    except ValueError:
        known = ", ".join(str(choice.value) for choice in choices)
        raise ExportError(f"{option} {text!r} is unknown; known are {known}") from None


def _read_policy(source: Checkpoint) -> ActPolicy:
    kind = source.config.get("type")
    if kind not in SUPPORTED:
        raise ExportError(f"{source.path}: type: {kind} is not supported; supported are {', '.join(SUPPORTED)}")
    return read_act(source)


def _manifest(
    source: Checkpoint,
    policy: ActPolicy,
    *,
    joints: tuple[Joint, ...],
    rate_hz: float,
    dataset: str | None,
    handoff: tuple[Method, float | None],
    two_state_joints: Sequence[str],
) -> Manifest:
    """The manifest but for what is known only once the network is written: errors and files."""
    try:
        return Manifest(
            schema=1,
            family="act",
            joints=joints,
            cameras=tuple(_cameras(source, policy).values()),
            state_size=policy.config.state_size,
            environment_state=policy.config.environment_state,
            chunk_size=policy.config.chunk_size,
            action_rate_hz=rate_hz,
            handoff=_handoff(policy, *handoff),
            two_state_joints=tuple(two_state_joints),
            provenance=_provenance(source, dataset),
            fidelity=Fidelity(weights="fp32", max_error=0, max_rounding_error=0),
            files={},
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = "".join(f"{part}: " for part in problem["loc"])
        raise ExportError(option + problem["msg"].removeprefix("Value error, ")) from None


def _fidelity(weights: Weights, authored: AuthoredPolicy) -> Fidelity:
    return Fidelity(weights=weights.value, max_error=authored.max_error, max_rounding_error=authored.max_rounding_error)


def _joint_statistics(source: Checkpoint, manifest: Manifest) -> dict[str, Statistics]:
    """Statistics of the features that hold one value a joint."""
    sizes = {feature.name: feature.shape for feature in (*source.inputs, *source.outputs)}
    joints = (len(manifest.joints),)
    return {
        name: source.statistics[name] for name in (STATE, ACTION) if name in source.statistics and sizes[name] == joints
    }


def _input_names(source: Checkpoint, policy: ActPolicy) -> dict[str, str]:
    names = {name: source.robot_name(name) for name in input_shapes(policy.config)}
    for name, given in names.items():
        if not name.startswith(IMAGES) and not name.startswith("observation.image") and given != name:
            raise ExportError(f"{source.path}: rename_map: {given} becomes {name}; only cameras can be renamed")
    return names


def _cameras(source: Checkpoint, policy: ActPolicy) -> dict[str, Camera]:
    """By the policy's name of the image."""
    cameras = {}
    for name, height, width in policy.config.images:
        given = source.robot_name(name)
        short = given.removeprefix(IMAGES).removeprefix("observation.")
        cameras[name] = Camera(name=short, input=given, width=width, height=height)
    return cameras


def _observation(source: Checkpoint, policy: ActPolicy, path: Path) -> dict[str, Array]:
    arrays, inputs = load_arrays(path), {}
    for name, shape in input_shapes(policy.config).items():
        given = source.robot_name(name)
        dtype = np.dtype(np.uint8 if len(shape) == 3 else np.float32)
        if given not in arrays or arrays[given].shape != shape or arrays[given].dtype != dtype:
            found = f"{arrays[given].dtype} {list(arrays[given].shape)}" if given in arrays else "nothing"
            raise ExportError(f"{path}: {given} should be {dtype} {list(shape)}, found {found}")
        inputs[name] = arrays[given]
    return inputs


def _handoff(policy: ActPolicy, method: Method, m: float | None) -> Handoff:
    """`m` (ensemble only): as given, else the checkpoint's own, else the paper's."""
    if method != "ensemble":
        return Handoff(method=method)
    found = policy.config.ensemble_coefficient
    return Handoff(method=method, m=float(m if m is not None else ENSEMBLE_M if found is None else found))


def _provenance(source: Checkpoint, dataset: str | None) -> Provenance:
    return Provenance(
        policy_type=str(source.config["type"]),
        source_layout=source.layout,
        checkpoint=source.path.resolve().name,
        checkpoint_sha256=source.source_files[source.weights_path.name],
        source_files=source.source_files,
        dataset=dataset or source.dataset,
        exporter=_version(),
        exported_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _version() -> str:
    try:
        return metadata.version("understudy")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unreleased"
