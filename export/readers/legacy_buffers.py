"""Normalisation of a checkpoint from before LeRobot 0.4: buffers among the weights.

A buffer's name is made from the feature's by replacing dots by underscores, so `wrist_left` and `wrist.left` give the
same buffer, and the way back cannot be known. The features that config.json declares are therefore mapped forward and
looked up; nothing is ever guessed from a buffer's name (LeRobot's own migration does, and turns `wrist_left` into
another camera's statistics). Source: lerobot/common/policies/normalize.py, 0.3.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from export.checkpoint import Checkpoint, Feature
from export.errors import ExportError
from export.normalize import MODES, identity, normalizer

INPUTS, TARGETS, OUTPUTS = "normalize_inputs.", "normalize_targets.", "unnormalize_outputs."
EPS = 1e-8


def read_normalization(checkpoint: Checkpoint, allowed: frozenset[str]) -> list[str]:
    """Take the buffers out of the checkpoint's weights and fill its normalizers and statistics."""
    modes = checkpoint.config.get("normalization_mapping")
    if not isinstance(modes, dict):
        raise ExportError(f"{checkpoint.config_path}: normalization_mapping is missing")
    for feature in checkpoint.inputs:
        _add(checkpoint, feature, INPUTS, modes, allowed)
    for feature in checkpoint.outputs:
        _add(checkpoint, feature, OUTPUTS, modes, allowed)
        _take(checkpoint, TARGETS, feature)  # what training normalised with: the same numbers, not needed here
    return []


def _add(checkpoint: Checkpoint, feature: Feature, prefix: str, modes: dict[str, Any], allowed: frozenset[str]) -> None:
    where = str(checkpoint.weights_path)
    statistics = _take(checkpoint, prefix, feature)
    mode = modes.get(feature.kind)
    if mode is None:
        checkpoint.warnings.append(
            f"{checkpoint.config_path}: no normalization_mapping for {feature.name}; it has none"
        )
        mode = "IDENTITY"
    if not statistics and feature.name in allowed:
        checkpoint.normalizers[feature.name] = identity(feature.channels)
        return
    if not statistics and MODES.get(str(mode)) is not None:
        raise ExportError(
            f"{where}: {_buffer(prefix, feature)}* is missing, the statistics of {feature.name}; "
            f"there is neither a policy_preprocessor.json nor a buffer, so export cannot normalise it"
        )
    checkpoint.normalizers[feature.name] = normalizer(
        feature.name, mode, statistics, feature.channels, eps=EPS, inverse=prefix == OUTPUTS, where=where
    )
    checkpoint.statistics[feature.name] = statistics


def _buffer(prefix: str, feature: Feature) -> str:
    return f"{prefix}buffer_{feature.name.replace('.', '_')}."


def _take(checkpoint: Checkpoint, prefix: str, feature: Feature) -> dict[str, Any]:
    start = _buffer(prefix, feature)
    names = [name for name in checkpoint.weights if name.startswith(start)]
    return {
        name.removeprefix(start): checkpoint.weights.pop(name).numpy().astype(np.float64).reshape(-1) for name in names
    }
