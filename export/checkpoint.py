"""A policy as some training framework saved it, in the one form that the rest of `export` works with.

Readers (`export.readers.lerobot`) fill a Checkpoint from files with the functions here; networks (`export.act.policy`)
take one. It holds what the files say under the names that they use: configuration, weights, features in the policy's
order, and the normalisation already reduced to numbers. Every way in which a file can be unreadable is an ExportError
that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from export.errors import ExportError
from export.normalize import Normalizer, Statistics

LARGEST = 1 << 16  # any size or number of layers, steps, elements or pixels: damage must not fill the memory


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


@dataclass(frozen=True)
class Told:
    """What a checkpoint does not say and a person has to; None where nothing was said. Readers ask for what they
    miss."""

    allow_unnormalized: frozenset[str] = frozenset()  # features that may lack statistics
    cameras: tuple[str, ...] | None = None  # names, in the order of training
    image_size: tuple[int, int] | None = None  # height, width, px
    rate_hz: float | None = None  # actions a second
    units: str | None = None  # of the joints, as --units


@dataclass
class Checkpoint:
    """A policy as it was saved. `weights` keep their published names; `normalizers` are by the policy's feature names
    (inputs as they go in, `action` as it comes out); `robot_names` maps a policy's input to what the robot calls it."""

    path: Path
    config_path: Path
    weights_path: Path
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
    rate_hz: float | None = None  # actions a second, where the files say so
    warnings: list[str] = field(default_factory=list)

    def robot_name(self, feature: str) -> str:
        return self.robot_names.get(feature, feature)


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


def uncompiled(name: str) -> str:
    """A tensor's name without what torch.compile puts into it while training."""
    return name.replace("_orig_mod.", "")


def as_published(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that they have when nothing is compiled. Raises ExportError for a name twice."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if uncompiled(name) in weights:
            raise ExportError(f"{path}: {uncompiled(name)} is there twice, with and without _orig_mod")
        weights[uncompiled(name)] = tensor
    return weights


def parse_features(document: Mapping[str, Any], where: str) -> tuple[Feature, ...]:
    """{name: {type, shape}} in its order, which is the policy's. Raises ExportError."""
    features = []
    for name, entry in document.items():
        try:
            kind, shape = str(entry["type"]), tuple(int(size) for size in entry["shape"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ExportError(f"{where}: {name} should have a type and a shape, found {entry!r}") from None
        if not shape or not 1 <= min(shape) <= max(shape) <= LARGEST or (kind == "VISUAL") != (len(shape) == 3):
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


def integer(checkpoint: Checkpoint, key: str) -> int:
    """A positive integer of the configuration, LARGEST at most. Raises ExportError."""
    value = checkpoint.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ExportError(
            f"{checkpoint.config_path}: {key} should be a positive integer, at most {LARGEST}, found {value!r}"
        )
    return value


def check_weights(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], training_only: str | None = None
) -> None:
    """Raise ExportError unless the checkpoint holds exactly these tensors, of these shapes, all finite.

    Names that begin with `training_only` may hold anything: inference has no use for them.
    """
    where, found = checkpoint.weights_path, checkpoint.weights
    for kind, names in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            raise ExportError(f"{where}: {_listed(sorted(names))} {'is' if len(names) == 1 else 'are'} {kind}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ExportError(f"{where}: {name} should have shape {list(shape)}, found {list(found[name].shape)}")
        if training_only is not None and name.startswith(training_only):
            continue
        if found[name].is_floating_point() and not torch.stack(found[name].aminmax()).isfinite().all():
            raise ExportError(f"{where}: {name} holds NaN or infinity")


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
