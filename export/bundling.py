"""A checkpoint in, a policy bundle out: what `understudy export`, the recipes and the tests call.

It reads the checkpoint, asks for what no checkpoint says (joint names, units, rate), has the network written and proven
equal to PyTorch, measures what a lower precision costs and what fewer steps would save, and only then puts a bundle
where it was asked for. Which frameworks and families there are is `export.families`' business.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from device.arrays import Array
from device.bundle import (
    ACTION,
    STATE,
    Camera,
    Fidelity,
    Handoff,
    Manifest,
    Provenance,
)
from export import fidelity, golden
from export.bundle_writer import PartialBundle, partial_bundle, refuse_occupied
from export.checkpoint import Checkpoint, Told
from export.errors import ExportError
from export.families import read_policy
from export.fast import Saving, what_fast_saves
from export.fidelity import Lowered, Proven
from export.normalize import Statistics
from export.policy import Policy, rounded
from export.precision import Precision, Storage
from export.sampling import Sampling
from export.units import TrainedIn, bundle_factors, check_units, in_bundle_units, name_joints
from firmware_bridge.calibration import Unit

IMAGES = "observation.images."
ENSEMBLE_M = 0.01  # Zhao et al. 2023, and LeRobot's documentation
USUAL_RATE_HZ = 30.0  # of the field's recordings, where neither files nor person say
# What a manifest calls its fields -> the options that a person gave them by.
OPTIONS = {"action_rate_hz": "--rate", "method": "--handoff", "m": "--ensemble-m", "advance": "--advance"}

Method = Literal["ensemble", "crossfade", "latest"]
Progress = Callable[[str], None]
C = TypeVar("C", bound=Enum)


@dataclass(frozen=True)
class ExportReport:
    """What export did. `max_error` is the bundle against PyTorch on the golden inputs, `joint_errors` what a lower
    precision costs on recorded observations at most, by joint, `mean_joint_errors` on average; all in joint units."""

    path: Path
    family: str
    nodes: int
    seconds: float
    max_error: float
    max_rounding_error: float
    precision: Precision
    joint_errors: dict[str, float]
    mean_joint_errors: dict[str, float]
    sampler: str | None
    saving: Saving | None  # what --fast would save
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Choices:
    """What a person decides about a bundle, beside what is `Told` and `Sampling`. See `export_checkpoint`."""

    joints: Sequence[str] | None = None
    units: TrainedIn = TrainedIn.degrees
    dataset: str | None = None
    handoff: Method | None = None
    ensemble_m: float | None = None
    advance: int | None = None
    two_state_joints: Sequence[str] = ()
    storage: Storage = Storage.fp32
    precision: Precision = Precision.fp32
    observation: Path | None = None
    episodes: Path | None = None
    force: bool = False
    told: Told = field(default_factory=Told)
    sampling: Sampling = field(default_factory=Sampling)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    joints: Sequence[str] | None = None,
    rate_hz: float | None = None,
    units: TrainedIn | Unit | None = None,
    weights: Storage | Literal["fp32", "fp16"] = Storage.fp32,
    precision: Precision | Literal["fp32", "fp16", "int8"] = Precision.fp32,
    allow_unnormalized: Iterable[str] = (),
    cameras: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    sampling: Sampling | None = None,
    force: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **choices: Any,
) -> ExportReport:
    """Export a checkpoint as a bundle at `out`.

    `joints`: names in action order (NAME=UNIT for one that differs from `units`); SO-101's where there are six.
    `units`: of the joints in training, degrees unless they are given; a bundle has radians as degrees.
    `rate_hz`: actions a second in training. `cameras`, `image_size` (height, width): for checkpoints that do not say.
    `weights`: how they are stored. `precision`: what is computed in; measured on `episodes` (a folder) or `observation`
    and refused above `export.fidelity`'s bounds unless `force`. `choices`: further fields of `Choices`; `observation`,
    an .npz of one real observation by LeRobot's names, becomes the golden input and the reference pictures.
    Raises ExportError (or BundleError for a bad `observation`); `out` is then as it was.
    """
    started = time.perf_counter()
    chosen = Choices(
        joints=joints,
        units=TrainedIn.degrees if units is None else TrainedIn(units.value),
        storage=Storage(weights),
        precision=Precision(precision),
        force=force,
        told=Told(
            frozenset(allow_unnormalized),
            None if cameras is None else tuple(cameras),
            image_size,
            rate_hz,
            None if units is None else units.value,
        ),
        sampling=sampling or Sampling(force=force),
        **choices,
    )
    say = progress or (lambda step: None)
    refuse_occupied(out, overwrite)
    say("reading the checkpoint")
    source, policy = read_policy(checkpoint, chosen.told, chosen.sampling)
    policy = in_bundle_units(source, policy, chosen.joints, chosen.units)
    with partial_bundle(out, overwrite) as partial:
        manifest, written = _write(partial, source, policy, chosen, say)
        say("timing an inference")
        saving = what_fast_saves(partial.path, policy, manifest)
    measured = written.fidelity
    return ExportReport(
        path=out,
        family=policy.family,
        nodes=written.authored.nodes,
        seconds=time.perf_counter() - started,
        max_error=measured.max_error,
        max_rounding_error=measured.max_rounding_error,
        precision=chosen.precision,
        joint_errors=dict(zip(manifest.joint_names, measured.joint_errors, strict=False)),
        mean_joint_errors=dict(zip(manifest.joint_names, written.mean_errors, strict=False)),
        sampler=_describe_sampler(manifest),
        saving=saving,
        warnings=tuple(source.warnings),
    )


def _write(
    partial: PartialBundle, source: Checkpoint, policy: Policy, chosen: Choices, say: Progress
) -> tuple[Manifest, Lowered]:
    """Everything that a bundle holds. Returns the manifest but for its list of files, and what was written."""
    manifest = draft_manifest(source, policy, chosen)
    check_units(manifest.joints, _joint_statistics(source, manifest), str(source.path))
    names = input_names(source, policy)
    say("reading observations")
    factors = bundle_factors(chosen.joints, policy.action_size, chosen.units)
    observed = fidelity.observations(
        source, policy, manifest, chosen.precision, chosen.episodes, chosen.observation, factors
    )
    seen = _golden_observation(source, policy, chosen.observation, observed)
    say("computing the reference in PyTorch")
    inputs = (seen or golden.made_up(policy)) | policy.noise(golden.NOISE_SEED)
    stored = rounded(policy) if chosen.storage is Storage.fp16 else policy
    expected = stored.reference(inputs)
    rounding = float(np.abs(expected - policy.reference(inputs)).max()) if stored is not policy else 0.0
    say("writing and checking the network")
    authored = stored.author(names, chosen.storage, Precision.fp32)
    partial.write(authored.files)
    robot_inputs = {names.get(name, name): array for name, array in inputs.items()}
    partial.write_golden(robot_inputs | {ACTION: expected})
    partial.write_pictures(_pictures(source, policy, seen))
    error = fidelity.prove(
        partial.path, manifest, robot_inputs, expected, lambda: fidelity.unsteadiness(stored, inputs, expected)
    )
    if error > fidelity.TOLERANCE:
        source.warnings.append(
            f"the bundle differs from PyTorch by {error:.2g} joint units, as PyTorch would from itself on another "
            "machine: the policy's sampler amplifies roundings, which a trained policy's should not"
        )
    measured = Fidelity(weights=chosen.storage.value, max_error=error, max_rounding_error=rounding)
    written = Lowered(authored, measured, ())
    if chosen.precision is not Precision.fp32:
        say(f"measuring {chosen.precision.value} against fp32 on {len(observed)} observations")
        proven = Proven(partial, manifest, stored, names, authored, measured, robot_inputs, expected)
        written = fidelity.lower(proven, observed, chosen.precision, chosen.force)
    say("writing the bundle")
    manifest = manifest.model_copy(update={"fidelity": written.fidelity})
    partial.finish(manifest)
    return manifest, written


def _golden_observation(
    source: Checkpoint, policy: Policy, path: Path | None, observed: Sequence[dict[str, Array]]
) -> dict[str, Array] | None:
    """A real observation by the policy's names, where there is one: the file's, else the first recorded one."""
    if path is not None:
        return golden.from_file(path, source, policy)
    return {name: observed[0][source.robot_name(name)] for name in policy.inputs.shapes()} if observed else None


def draft_manifest(source: Checkpoint, policy: Policy, chosen: Choices) -> Manifest:
    """The manifest but for what is known only once the network is written: errors and files."""
    try:
        return Manifest(
            schema=1,
            family=policy.family,
            joints=name_joints(chosen.joints, policy.action_size, chosen.units),
            cameras=tuple(_cameras(source, policy).values()),
            state_size=policy.inputs.state_size,
            environment_state=policy.inputs.environment_state,
            chunk_size=policy.chunk_size,
            action_rate_hz=next(r for r in (chosen.told.rate_hz, source.rate_hz, USUAL_RATE_HZ) if r is not None),
            observation_steps=policy.observation_steps,
            handoff=_handoff(policy, chosen),
            two_state_joints=tuple(chosen.two_state_joints),
            provenance=_provenance(source, chosen.dataset),
            fidelity=Fidelity(weights="fp32", max_error=0, max_rounding_error=0),
            sampler=policy.sampler,
            files={},
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{OPTIONS.get(str(part), part)}: " for part in problem["loc"])
        raise ExportError(where + problem["msg"].removeprefix("Value error, ")) from None


def _describe_sampler(manifest: Manifest) -> str | None:
    sampler = manifest.sampler
    return None if sampler is None else f"{sampler.solver}, {sampler.steps} steps, {sampler.spacing}"


def _joint_statistics(source: Checkpoint, manifest: Manifest) -> dict[str, Statistics]:
    """Statistics of the features that hold one value a joint."""
    sizes = {feature.name: feature.shape for feature in (*source.inputs, *source.outputs)}
    joints = (len(manifest.joints),)
    return {
        name: source.statistics[name] for name in (STATE, ACTION) if name in source.statistics and sizes[name] == joints
    }


def input_names(source: Checkpoint, policy: Policy) -> dict[str, str]:
    names = {name: source.robot_name(name) for name in policy.inputs.shapes()}
    for name, given in names.items():
        if not name.startswith(IMAGES) and not name.startswith("observation.image") and given != name:
            raise ExportError(f"{source.path}: rename_map: {given} becomes {name}; only cameras can be renamed")
    return names


def _cameras(source: Checkpoint, policy: Policy) -> dict[str, Camera]:
    """By the policy's name of the image."""
    cameras = {}
    for name, height, width in policy.inputs.images:
        given = source.robot_name(name)
        short = given.removeprefix(IMAGES).removeprefix("observation.")
        if "/" in short or "\\" in short or "\0" in short:
            raise ExportError(f"{source.path}: {given!r} is no name of a camera: its pictures are files of that name")
        cameras[name] = Camera(name=short, input=given, width=width, height=height)
    return cameras


def _pictures(source: Checkpoint, policy: Policy, seen: dict[str, Array] | None) -> dict[str, Array]:
    """By camera, the newest of a real observation."""
    if seen is None:
        return {}
    newest = {name: array if policy.observation_steps == 1 else array[-1] for name, array in seen.items()}
    return {camera.name: newest[name] for name, camera in _cameras(source, policy).items()}


def _handoff(policy: Policy, chosen: Choices) -> Handoff:
    """As chosen, else what the policy recommends; `m` is for the ensemble only."""
    recommended = policy.handoff
    method = chosen.handoff or recommended.method
    if chosen.ensemble_m is not None and method != "ensemble":
        raise ExportError(f"--ensemble-m is of the ensemble, and chunks are handed over by {method}: leave it out")
    m = next((m for m in (chosen.ensemble_m, recommended.m, ENSEMBLE_M) if m is not None), None)
    if chosen.advance is not None and chosen.advance > policy.chunk_size:
        raise ExportError(f"--advance: expected at most {policy.chunk_size}, a chunk's actions, found {chosen.advance}")
    advance = chosen.advance or recommended.advance
    return Handoff(method=method, m=m if method == "ensemble" else None, advance=advance)


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
