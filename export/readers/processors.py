"""Normalisation of a checkpoint since LeRobot 0.4: two pipelines of steps, each a JSON file with state files.

What runs in LeRobot is what these files say, even where config.json says otherwise, so they are what is read: the
features, modes and eps of the normaliser steps, their statistics from the state files that the JSON names, and the
rename map of a policy that was fine-tuned on other camera names. Any step that this reader does not know might change
numbers, and is refused. Facts: lerobot/processor/pipeline.py and normalize_processor.py, 0.4.4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from device.bundle import ACTION
from export.checkpoint import (
    Checkpoint,
    Feature,
    group_statistics,
    parse_features,
    read_json,
    read_tensors,
)
from export.errors import ExportError
from export.normalize import Normalizer, identity, normalizer

PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
RENAME, NORMALIZE, UNNORMALIZE = "rename_observations_processor", "normalizer_processor", "unnormalizer_processor"
NO_EFFECT = {"to_batch_processor", "device_processor"}  # a batch axis and a device, which the graph has no need of


def has_processors(directory: Path) -> bool:
    return (directory / PREPROCESSOR).exists() or (directory / POSTPROCESSOR).exists()


def read_normalization(checkpoint: Checkpoint, allowed: frozenset[str]) -> list[str]:
    """Fill the checkpoint's normalizers, statistics and robot_names; returns the names of the files that were read."""
    before = _steps(checkpoint, PREPROCESSOR, {RENAME, NORMALIZE})
    after = _steps(checkpoint, POSTPROCESSOR, {UNNORMALIZE})
    if RENAME in before:
        checkpoint.robot_names = _inverse_rename(checkpoint, before[RENAME])
    for feature in checkpoint.inputs:
        _add(checkpoint, feature, before.get(NORMALIZE), PREPROCESSOR, allowed)
    for feature in checkpoint.outputs:
        _add(checkpoint, feature, after.get(UNNORMALIZE), POSTPROCESSOR, allowed)
    states = [step["state_file"] for step in (*before.values(), *after.values()) if "state_file" in step]
    return [PREPROCESSOR, POSTPROCESSOR, *dict.fromkeys(states)]


def _steps(checkpoint: Checkpoint, file: str, known: set[str]) -> dict[str, dict[str, Any]]:
    path = checkpoint.path / file
    found: dict[str, dict[str, Any]] = {}
    steps = read_json(path).get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ExportError(f"{path}: steps should be a list of JSON objects")
    for step in steps:
        name = str(step.get("registry_name") or step.get("class") or "a step without a name")
        if name in NO_EFFECT:
            if (dtype := _section(step, "config", str(path)).get("float_dtype")) not in (None, "float32"):
                checkpoint.warnings.append(f"{path}: {name} casts to {dtype}; the bundle computes in float32")
            continue
        if name not in known or name in found:
            supported = ", ".join(sorted(known))
            problem = "is there twice" if name in found else f"is not supported; supported are {supported}"
            raise ExportError(f"{path}: step {name} {problem}")
        if name != RENAME:
            step = {**step, "statistics": group_statistics(_state(checkpoint, step))}
        found[name] = step
    return found


def _state(checkpoint: Checkpoint, step: dict[str, Any]) -> dict[str, torch.Tensor]:
    name = step.get("state_file")
    if not name:
        return {}
    if not isinstance(name, str) or Path(name).name != name:
        raise ExportError(f"{checkpoint.path}: the state file {name!r} is outside the checkpoint")
    return read_tensors(checkpoint.path / name)


def _inverse_rename(checkpoint: Checkpoint, step: dict[str, Any]) -> dict[str, str]:
    """rename_map says robot name -> policy name; a bundle needs the way back, so it must be one to one."""
    robot_names: dict[str, str] = {}
    inputs, where = {feature.name for feature in checkpoint.inputs}, str(checkpoint.path / PREPROCESSOR)
    for robot, policy in _section(_section(step, "config", where), "rename_map", where).items():
        if not isinstance(policy, str):
            raise ExportError(f"{where}: rename_map should say a name for {robot}, found {policy!r}")
        if policy not in inputs:
            checkpoint.warnings.append(f"rename_map: {robot} becomes {policy}, which the policy does not take; ignored")
            continue
        if policy in robot_names:
            raise ExportError(f"{where}: rename_map gives both {robot_names[policy]} and {robot} to {policy}")
        robot_names[policy] = robot
    return robot_names


def _add(
    checkpoint: Checkpoint, feature: Feature, step: dict[str, Any] | None, file: str, allowed: frozenset[str]
) -> None:
    where = str(checkpoint.path / file)
    if step is None:
        raise ExportError(f"{where} has no normaliser step, so LeRobot would pass {feature.name} through unnormalised")
    checkpoint.normalizers[feature.name] = _normalizer(checkpoint, feature, step, where, allowed)
    if feature.name in step["statistics"]:
        checkpoint.statistics[feature.name] = step["statistics"][feature.name]


def _normalizer(
    checkpoint: Checkpoint, feature: Feature, step: dict[str, Any], where: str, allowed: frozenset[str]
) -> Normalizer:
    config = _section(step, "config", where)
    declared = {found.name: found for found in parse_features(_section(config, "features", where), where)}
    only, eps = config.get("normalize_observation_keys"), config.get("eps", 1e-8)
    if only is not None and not isinstance(only, list):
        raise ExportError(f"{where}: normalize_observation_keys should be a list of names, found {only!r}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ExportError(f"{where}: eps should be a small number, found {eps!r}")
    if only is not None and feature.name != ACTION and feature.name not in only:
        return identity(feature.channels)
    if feature.name in allowed and (feature.name not in declared or feature.name not in step["statistics"]):
        return identity(feature.channels)
    if feature.name not in declared:
        raise ExportError(
            f"{where}: {feature.name} is not among the normaliser's features ({', '.join(declared)}), so LeRobot would "
            f"pass it through unnormalised; say that this is meant with --allow-unnormalized {feature.name}"
        )
    mode = _section(config, "norm_map", where).get(declared[feature.name].kind)
    if mode is None:
        checkpoint.warnings.append(f"{where}: norm_map names no mode for {feature.name}; it is not normalised")
        mode = "IDENTITY"
    return normalizer(
        feature.name,
        mode,
        step["statistics"].get(feature.name),
        feature.channels,
        eps=float(eps),
        inverse=feature.name == ACTION,
        where=where,
    )


def _section(holder: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object of the JSON; empty where it is left out. Raises ExportError."""
    found = holder.get(key, {})
    if not isinstance(found, dict):
        raise ExportError(f"{where}: {key} should be a JSON object, found {found!r}")
    return found
