"""Sorts what a LeRobot policy declares as its inputs and outputs into state, cameras and action.

The readers of ACT and of diffusion policies call it, with the policy's name for the messages. What neither network has
a place for is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from device.bundle import ACTION, ENVIRONMENT_STATE, STATE
from export.checkpoint import Checkpoint, Feature
from export.errors import ExportError


@dataclass(frozen=True)
class Declared:
    """A policy's features. Sizes in elements; images (name, height, width), in the policy's order."""

    state_size: int
    environment_state: int | None
    images: tuple[tuple[str, int, int], ...]
    action_size: int


def declared(checkpoint: Checkpoint, policy: str) -> Declared:
    """The features of a checkpoint of the kind `policy` (ACT). Raises ExportError for any that it cannot have."""
    where = f"{checkpoint.config_path}: input_features"
    state: Feature | None = None
    environment: Feature | None = None
    images: list[Feature] = []
    for feature in checkpoint.inputs:
        if feature.kind == "VISUAL":
            if feature.shape[0] != 3:
                raise ExportError(f"{where}: {feature.name} has {feature.shape[0]} channels; only RGB is supported")
            images.append(feature)
        elif feature.name == STATE and len(feature.shape) == 1:
            state = feature
        elif feature.name == ENVIRONMENT_STATE and len(feature.shape) == 1:
            environment = feature
        else:
            found = f"{feature.name} ({feature.kind} {list(feature.shape)})"
            raise ExportError(f"{where}: {found} is not supported by {policy}")
    if state is None:
        raise ExportError(f"{where}: {STATE} is missing; LeRobot's {policy} cannot run without it either")
    if not images and environment is None:
        raise ExportError(f"{where}: neither a camera nor {ENVIRONMENT_STATE}; {policy} needs one of them")
    return Declared(
        state.shape[0],
        environment.shape[0] if environment else None,
        tuple((image.name, image.shape[1], image.shape[2]) for image in images),
        _action_size(checkpoint),
    )


def _action_size(checkpoint: Checkpoint) -> int:
    actions = [feature for feature in checkpoint.outputs if feature.name == ACTION and len(feature.shape) == 1]
    if len(checkpoint.outputs) != 1 or not actions:
        names = ", ".join(feature.name for feature in checkpoint.outputs)
        raise ExportError(
            f"{checkpoint.config_path}: output_features should be one vector named {ACTION!r}, found {names}"
        )
    return actions[0].shape[0]
