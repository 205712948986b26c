"""Reads a LeRobot policy directory: configuration, weights and normalisation, in either of its two layouts.

Since 0.4 the normalisation stands in processor files beside the weights; before, in buffers among the weights. Both
become one Checkpoint, and nothing downstream knows which it was. Nothing is guessed: files are found by the names that
the JSON gives, features by the names that the configuration declares, and a processor step that would change numbers
in a way that this reader does not know is refused by name. Nothing is downloaded and nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from device.bundle import file_sha256
from export.errors import ExportError
from export.normalize import Normalizer, Statistics

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TRAINING_CONFIG = "train_config.json"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
ACTION = "action"
NEARBY = ("pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model", "..", "../pretrained_model")


@dataclass(frozen=True)
class Feature:
    """A named input or output of the policy, as config.json declares it. `kind`: STATE, VISUAL, ENV or ACTION."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """How many values its statistics have: one a channel for an image (C, H, W), one an element otherwise."""
        return self.shape[0]


@dataclass
class Checkpoint:
    """A policy as it was saved. `weights` keep their published names; `normalizers` are by the policy's feature names
    (inputs as they go in, `action` as it comes out); `robot_names` maps a policy's input to what the robot calls it."""

    path: Path
    config: dict[str, Any]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    weights: dict[str, torch.Tensor]
    layout: str
    normalizers: dict[str, Normalizer] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    robot_names: dict[str, str] = field(default_factory=dict)
    source_files: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    warnings: list[str] = field(default_factory=list)

    def robot_name(self, feature: str) -> str:
        return self.robot_names.get(feature, feature)


def read_checkpoint(path: Path, allow_unnormalized: Iterable[str] = ()) -> Checkpoint:
    """Read a policy directory. `allow_unnormalized` names features that may lack statistics. Raises ExportError."""
    from export import legacy_buffers, processors

    directory, warnings = find_policy(path)
    config = read_json(directory / CONFIG)
    checkpoint = Checkpoint(
        path=directory,
        config=config,
        inputs=_features(config, "input_features", directory),
        outputs=_features(config, "output_features", directory),
        weights=_read_weights(directory / WEIGHTS),
        layout="",
        warnings=warnings,
    )
    allowed = frozenset(allow_unnormalized)
    if (directory / PREPROCESSOR).exists() or (directory / POSTPROCESSOR).exists():
        checkpoint.layout = "lerobot processors (0.4 and later)"
        files = processors.read_normalization(checkpoint, allowed)
    else:
        checkpoint.layout = "lerobot buffers (before 0.4)"
        files = legacy_buffers.read_normalization(checkpoint, allowed)
    checkpoint.dataset = _training_dataset(directory)
    checkpoint.source_files = {name: file_sha256(directory / name) for name in (CONFIG, WEIGHTS, *files)}
    return checkpoint


def find_policy(path: Path) -> tuple[Path, list[str]]:
    """The folder that holds config.json: `path`, or one level off, which the returned warning says."""
    if not path.exists():
        raise ExportError(f"{path} does not exist; give the folder that holds {CONFIG} and {WEIGHTS}")
    start = path if path.is_dir() else path.parent
    for candidate in (start, *(start / name for name in NEARBY)):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            found = candidate if candidate == start else candidate.resolve()
            return found, [] if found == path else [f"{path} holds no policy itself; using {found}"]
    if (start / CONFIG).is_file():
        raise ExportError(f"{start / WEIGHTS} is missing")
    raise ExportError(
        f"{path} holds no {CONFIG} and {WEIGHTS}, nor does a pretrained_model beside, above or below it; "
        "give the folder <run>/checkpoints/<step>/pretrained_model"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ExportError(f"{path} should hold a JSON object")
    return document


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, floating point as float32. Raises ExportError."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ExportError(f"{path} is damaged or no safetensors file: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def parse_features(document: Mapping[str, Any], where: str) -> tuple[Feature, ...]:
    """{name: {type, shape}} in its order, which is the policy's. Raises ExportError."""
    features = []
    for name, entry in document.items():
        try:
            kind, shape = str(entry["type"]), tuple(int(size) for size in entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise ExportError(f"{where}: {name} should have a type and a shape, found {entry!r}") from None
        if not shape or min(shape) < 1 or (kind == "VISUAL") != (len(shape) == 3):
            raise ExportError(f"{where}: {name}: {list(shape)} is no shape for {kind}")
        features.append(Feature(name, kind, shape))
    return tuple(features)


def group_statistics(tensors: Mapping[str, torch.Tensor]) -> dict[str, Statistics]:
    """`<feature>.<statistic>` -> tensor, to feature -> statistic -> flat float64 (the last dot separates the two)."""
    grouped: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        feature, _, statistic = key.rpartition(".")
        grouped.setdefault(feature, {})[statistic] = tensor.numpy().astype(np.float64).reshape(-1)
    return dict(grouped)


def _features(config: Mapping[str, Any], key: str, directory: Path) -> tuple[Feature, ...]:
    found = config.get(key)
    if not isinstance(found, dict) or not found:
        raise ExportError(
            f"{directory / CONFIG}: {key} is missing; checkpoints from before LeRobot had it (2025) must first be "
            "loaded and saved with LeRobot 0.3.3"
        )
    return parse_features(found, f"{directory / CONFIG}: {key}")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(path).items():
        plain = name.replace("_orig_mod.", "")  # what torch.compile puts into the names while training
        if plain in weights:
            raise ExportError(f"{path}: {plain} is there twice, with and without _orig_mod")
        weights[plain] = tensor
    return weights


def _training_dataset(directory: Path) -> str | None:
    if not (directory / TRAINING_CONFIG).is_file():
        return None
    dataset = read_json(directory / TRAINING_CONFIG).get("dataset")
    name = dataset.get("repo_id") if isinstance(dataset, dict) else None
    return name if isinstance(name, str) else None
