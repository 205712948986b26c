"""A behaviour cloning checkpoint, understood: what its tensors say about its size, and those tensors ready to run.

`read_cloning` takes what `export.readers.original_act` read. The files hold no configuration, so cameras and pictures
are what a person told; the number of backbones and the width of the first linear layer show whether that can be true,
and both are checked before anything else. Every tensor that inference reads must be there, of the right shape and
finite; `action_head`, which the repository makes and never uses, is left behind.
"""

from __future__ import annotations

import re

import torch

from export.checkpoint import Checkpoint, check_weights
from export.cloning.policy import CloningPolicy
from export.cloning.weights import CloningConfig, expected_weights
from export.errors import ExportError
from export.features import declared
from export.networks import resnet

PREFIX = "model."  # of every published tensor name
UNUSED = "model.action_head."
USUAL_SIZES = ((480, 640), (240, 320), (720, 1280), (600, 800), (224, 224))  # looked through for a hint, height first


def read_cloning(checkpoint: Checkpoint) -> CloningPolicy:
    """Check and convert a checkpoint of type cloning. Raises ExportError."""
    checkpoint.weights = {name: each for name, each in checkpoint.weights.items() if not name.startswith(UNUSED)}
    config = _config(checkpoint)
    _refuse_other_pictures(checkpoint, config)
    expected = {PREFIX + name: shape for name, shape in expected_weights(config).items()}
    check_weights(checkpoint, expected)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.weights.items()}
    runnable = {name: tensor for name, tensor in weights.items() if not name.startswith("backbones.")}
    for camera in range(len(config.images)):
        runnable |= resnet.runnable(config.resnet(camera), weights)
    return CloningPolicy(config, runnable, checkpoint.normalizers)


def _config(checkpoint: Checkpoint) -> CloningConfig:
    features = declared(checkpoint, "behaviour cloning")
    first = checkpoint.weights.get(f"{PREFIX}mlp.0.weight")
    if first is None or first.ndim != 2:
        raise ExportError(f"{checkpoint.weights_path}: {PREFIX}mlp.0.weight is missing or no matrix")
    return CloningConfig(
        features.state_size, features.images, features.action_size, _backbone(checkpoint.weights), first.shape[0]
    )


def _backbone(weights: dict[str, torch.Tensor]) -> str:
    """The variant whose tensors the first camera's are; resnet18, the repository's only one, where none fits."""
    start = f"{PREFIX}backbones.0.0.body."
    found = {name.removeprefix(start) for name in weights if name.startswith(start)}
    for variant in resnet.VARIANTS:
        if resnet.expected_weights(resnet.ResNet("", variant)).keys() == found:
            return variant
    return "resnet18"


def _refuse_other_pictures(checkpoint: Checkpoint, config: CloningConfig) -> None:
    """Cameras or sizes that the tensors contradict."""
    indices = {re.match(rf"{re.escape(PREFIX)}backbones\.(\d+)\.", name) for name in checkpoint.weights}
    trained, given = len({match.group(1) for match in indices if match}), len(config.images)
    if trained != given:
        raise ExportError(
            f"{checkpoint.weights_path}: trained with {trained} cameras, but --cameras names {given}; name all of them "
            "in training's order"
        )
    width = checkpoint.weights[f"{PREFIX}mlp.0.weight"].shape[1] - config.state_size
    _, height_px, width_px = config.images[0]
    found = given * config.features(height_px, width_px)
    if width != found:
        sizes = [f"{h}x{w}" for h, w in USUAL_SIZES if given * config.features(h, w) == width]
        hint = f"; {' or '.join(sizes)} fits" if sizes else ""
        raise ExportError(
            f"{checkpoint.weights_path}: the first linear layer takes {width} numbers from {given} cameras, and "
            f"pictures of {height_px}x{width_px} give {found}; give training's --image-size{hint}"
        )
