"""Reads what Diffusion Policy's workspaces save, and Consistency Policy's after them: one file with everything in it.

A workspace's checkpoint is a torch.save of its hydra configuration, of the state of its model, of the averaged model
beside it and of the optimizer, and of further pickles that are never looked into. `read_payload` takes the weights that
the policy is run with, the configuration with its interpolations resolved, and leaves the rest; which network that is,
is for `export.diffusion.stanford` and `export.diffusion.consistency_policy`. Nothing of the file is run. Layout: Chi et
al. 2023 (arXiv:2303.04137), diffusion_policy/workspace/base_workspace.py.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from device.bundle import file_sha256
from export.checkpoint import Checkpoint, Told, as_published
from export.errors import ExportError
from export.readers.hydra_config import OMEGACONF, Section, Unresolved, plain, resolve
from export.readers.safe_pickle import load_torch

LATEST = ("latest.ckpt", "checkpoints/latest.ckpt", "../checkpoints/latest.ckpt")
LOOKED_AT = 1 << 20  # bytes of a pickle in which its kind shows
# The class of a policy -> `type` of the checkpoint, which decides what understands it.
STUDENTS = ("CTMPPUnetHybridImagePolicy",)
TEACHERS = ("KarrasUnetHybridImagePolicy",)
DIFFUSION, CONSISTENCY = "diffusion_policy", "consistency_policy"


def find_payload(path: Path) -> Path | None:
    """The workspace checkpoint at `path`, or the latest one in that folder of a run; None where there is none."""
    candidates = [path] if path.is_file() else [path / name for name in LATEST]
    return next((candidate for candidate in candidates if candidate.is_file() and _is_payload(candidate)), None)


def read_payload(path: Path, told: Told) -> Checkpoint:
    """Read a workspace's checkpoint; `path` as for `find_payload`. Raises ExportError."""
    file = find_payload(path) or path
    payload = load_torch(file, OMEGACONF)
    if not isinstance(payload, dict) or not {"cfg", "state_dicts"} <= payload.keys():
        raise ExportError(f"{file} should hold cfg and state_dicts, as a workspace of Diffusion Policy saves them")
    tree = plain(payload["cfg"], file)
    if not isinstance(tree, dict):
        raise ExportError(f"{file}: cfg should be a configuration, found {type(tree).__name__}")
    policy = Section({"policy": resolve(tree, "policy")}, f"{file}: cfg").section("policy")
    training = resolve(tree, "training")
    kind = _kind(policy)
    return Checkpoint(
        path=file,
        config_path=file,
        weights_path=file,
        config={"type": kind, "policy": dict(policy.values)},
        inputs=(),
        outputs=(),
        weights=_weights(payload["state_dicts"], training if isinstance(training, dict) else {}, kind, file),
        layout=f"{kind} workspace",
        source_files={file.name: file_sha256(file)},
        dataset=_dataset(tree),
        rate_hz=told.rate_hz,
        warnings=_warnings(path, file, told),
    )


def policy_section(checkpoint: Checkpoint) -> Section:
    """The configuration of the policy itself."""
    return Section(checkpoint.config["policy"], f"{checkpoint.path}: cfg.policy")


def _is_payload(path: Path) -> bool:
    """Whether a file is a workspace's, by the words in its pickle; every other file of torch.save has other readers."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as pickled:
                start = pickled.read(LOOKED_AT)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, StopIteration, RuntimeError):
        return False
    return b"cfg" in start and (b"state_dicts" in start or b"omegaconf" in start)


def _kind(policy: Section) -> str:
    name = policy.target()
    if name in TEACHERS:
        raise ExportError(f"{policy.where}: {name}: a Consistency Policy teacher is not supported: export its student")
    return CONSISTENCY if name in STUDENTS else DIFFUSION


def _weights(states: Any, training: dict[str, Any], kind: str, file: Path) -> dict[str, torch.Tensor]:
    """The state of the model that is run: the average where training kept one. Floating point as float32."""
    averaged = training.get("use_ema", False)
    if isinstance(averaged, Unresolved):
        raise ExportError(f"{file}: cfg.training.use_ema is {averaged.text!r}, which {averaged.why}")
    # A student of Consistency Policy keeps its average inside its model, and does not run it.
    name = "ema_model" if averaged and kind == DIFFUSION else "model"
    found = states.get(name) if isinstance(states, dict) else None
    if not isinstance(found, dict) or not found:
        there = ", ".join(str(key) for key in states) if isinstance(states, dict) else type(states).__name__
        raise ExportError(f"{file}: state_dicts.{name} is missing, found {there or 'nothing'}")
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ExportError(f"{file}: state_dicts.{name}.{key} should be a tensor, found {type(tensor).__name__}")
    weights = as_published(file, found)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _dataset(tree: dict[str, Any]) -> str | None:
    for key in ("task.dataset.dataset_path", "task.dataset.zarr_path", "task.dataset_path", "task.name"):
        if isinstance(found := resolve(tree, key), str):
            return found
    return None


def _warnings(path: Path, file: Path, told: Told) -> list[str]:
    warnings = [] if file == path else [f"{path} is a run of Diffusion Policy; using {file}"]
    if told.rate_hz is None:
        warnings.append(
            f"{file} does not say how many actions a second the policy gives; say it with --rate if it is not 30"
        )
    return warnings
