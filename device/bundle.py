"""A policy bundle on disk: the policy of one export, and the checks that stand between it and an arm.

`predict` opens the bundle that the cell names, `understudy bundle` shows and runs one, the update flow opens one
before it activates it, and `export` writes one. Opening proves that the manifest is of a known schema and that every
file it lists is there with the bytes it had when exported; `check_fits` proves that joints, units, order, cameras and
rates are those of this cell. Every refusal is a BundleError of one sentence. Nothing here imports torch or unpickles.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from device.arrays import Array, load_arrays
from device.errors import BundleError
from device.manifest import (
    ACTION,
    ENVIRONMENT_STATE,
    NOISE,
    SCHEMA,
    STATE,
    STEP_NOISE,
    Camera,
    Fidelity,
    Handoff,
    Joint,
    Manifest,
    Provenance,
    Sampler,
    parse_manifest,
)
from device.messages import TOPICS
from device.sampler_table import COEFFICIENTS, SamplerTable, read_sampler_table

if TYPE_CHECKING:
    from device.config import CameraConfig, LoadedCell

__all__ = [
    "ACTION",
    "COEFFICIENTS",
    "DENOISE",
    "ENCODER",
    "ENVIRONMENT_STATE",
    "GOLDEN",
    "MANIFEST",
    "NOISE",
    "POLICY",
    "SAMPLER",
    "SCHEMA",
    "STATE",
    "STEP_NOISE",
    "Bundle",
    "Camera",
    "Fidelity",
    "Handoff",
    "Joint",
    "Manifest",
    "Provenance",
    "Sampler",
    "SamplerTable",
    "file_sha256",
    "parse_manifest",
]

MANIFEST = "manifest.json"
POLICY = "policy.onnx"
ENCODER = "encoder.onnx"
DENOISE = "denoise.onnx"
SAMPLER = "sampler.npz"
GOLDEN = "golden.npz"
FILES_OF_FAMILY = {
    "act": (POLICY, GOLDEN),
    "cloning": (POLICY, GOLDEN),
    "diffusion": (ENCODER, DENOISE, SAMPLER, GOLDEN),
}
# Slots that a reader should not count on: the newest frame, the one that is being written, one that comes meanwhile.
_FRAMES_IN_FLIGHT = 3


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
        path = Path(os.path.realpath(path))  # a link that is turned to another bundle meanwhile must not mix the two
        try:
            raw = (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise BundleError(f"{path} holds no {MANIFEST}, so it is no bundle (or its export was cut short)") from None
        except OSError as error:
            raise BundleError(f"{path / MANIFEST} cannot be read: {error}") from error
        manifest = parse_manifest(raw, path / MANIFEST)
        for name, expected in manifest.files.items():
            _check_file(path, name, expected)
        for name in FILES_OF_FAMILY[manifest.family]:
            if name not in manifest.files:
                raise BundleError(f"{path / MANIFEST}: files: lists no {name}; export the policy again")
        _refuse_unlisted(path, manifest)
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
        _check_history(self.path, self.manifest, cell)
        _check_advance(self.path, self.manifest, cell)

    def golden(self) -> tuple[dict[str, Array], Array]:
        """The inputs that export ran (noise included, where the policy samples), and the reference's action chunk,
        float32 [K, A] in joint units. Raises BundleError."""
        arrays = load_arrays(self.path / GOLDEN)
        expected = arrays.pop(ACTION, None)
        shape = (self.manifest.chunk_size, len(self.manifest.joints))
        if expected is None or expected.shape != shape or expected.dtype != np.float32:
            found = "nothing" if expected is None else f"{expected.dtype} {list(expected.shape)}"
            raise BundleError(f"{self.path / GOLDEN}: {ACTION} should be float32 {list(shape)}, found {found}")
        for name, array in [*arrays.items(), (ACTION, expected)]:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise BundleError(f"{self.path / GOLDEN}: {name} holds NaN or infinity; export the policy again")
        return arrays, expected

    def sampler_table(self) -> SamplerTable:
        """The numbers of every denoising step. Raises BundleError, also for a policy that does not sample."""
        if self.manifest.sampler is None:
            raise BundleError(f"{self.path}: a policy of family {self.manifest.family} does not sample")
        return read_sampler_table(self.path / SAMPLER, self.manifest.sampler)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_unlisted(root: Path, manifest: Manifest) -> None:
    """A graph may name further files to read weights from; whatever no hash covers must not reach an engine."""
    there = {file.relative_to(root).as_posix() for file in root.rglob("*") if not file.is_dir()}
    if unlisted := sorted(there - set(manifest.files) - {MANIFEST}):
        raise BundleError(
            f"{root / unlisted[0]} is not in the manifest's list of files; remove it, or export or download the bundle "
            "again"
        )


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


def _check_history(path: Path, manifest: Manifest, cell: LoadedCell) -> None:
    """A policy of several observation steps sees frames that are one action period apart, from the topics' history."""
    back, rate = manifest.observation_steps - 1, manifest.action_rate_hz
    for name in [camera.name for camera in manifest.cameras] if back else []:
        fps = cell.cell.cameras[name].fps
        if fps < rate:
            raise BundleError(
                f"{path}: the policy looks at {back + 1} steps at {rate:g} Hz, but {cell.path} takes {fps:g} frames/s "
                f"of camera {name!r}; set cameras.{name}.fps to {rate:g} or more"
            )
        held = (TOPICS["frames/*"].slots - _FRAMES_IN_FLIGHT) / fps
        if back / rate > held:
            raise BundleError(
                f"{path}: the policy looks back {back / rate:.2g} s, but at {fps:g} frames/s of camera {name!r} "
                f"{held:.2g} s are held; lower cameras.{name}.fps of {cell.path} (the policy acts at {rate:g} Hz)"
            )


def _check_advance(path: Path, manifest: Manifest, cell: LoadedCell) -> None:
    """A chunk must last until the next one's observation, or the arm would stop before each of them."""
    policy, rate = cell.cell.policy, manifest.action_rate_hz
    advance = policy.advance or manifest.handoff.advance
    if advance is None:
        return
    source = f"policy.advance of {cell.path}" if policy.advance else "the bundle"
    gap_s = advance / rate
    if manifest.chunk_size > 1 and advance >= manifest.chunk_size:
        raise BundleError(
            f"{path}: {source} asks for a chunk every {advance} actions, but a chunk has {manifest.chunk_size}, and "
            f"the next one takes time to infer; set policy.advance to {manifest.chunk_size - 1} or less"
        )
    if gap_s >= policy.staleness_s:
        raise BundleError(
            f"{path}: {source} asks for a chunk every {advance} actions at {rate:g} Hz, which is every {gap_s:.2g} s, "
            f"but after policy.staleness_s = {policy.staleness_s:g} without an observation the arm holds; set "
            f"policy.advance to fewer actions, or policy.staleness_s to more than {gap_s:.2g} s and an inference"
        )
