"""Behaviour cloning's forward pass, from raw observation to one goal in joint units, written once over `Operations`.

CNNMLP of the original ACT repository (detr/models/detr_vae.py): each camera has a ResNet of its own, three
convolutions without anything between them make its feature map small, and the flattened maps, in the order of the
cameras, go with the robot's state through linear layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from device.bundle import ACTION, STATE
from export.cloning.weights import HIDDEN_LAYERS, OUTPUT_LAYER
from export.networks.operations import Operations
from export.networks.resnet import resnet

if TYPE_CHECKING:
    from export.cloning.policy import CloningPolicy

T = TypeVar("T")


def cloning(ops: Operations[T], policy: CloningPolicy) -> T:
    """One goal [1, A], in joint units."""
    config, parts = policy.config, []
    for camera, (name, height, width) in enumerate(config.images):
        x = resnet(ops, config.resnet(camera), ops.frames([name], [policy.normalizers[name]]))
        for convolution in config.down_projection(camera):
            x = ops.conv(x, convolution)
        parts.append(ops.reshape(x, 1, config.features(height, width)))
    x = ops.concat([*parts, ops.vector(STATE, policy.normalizers[STATE])], axis=1)
    for layer in HIDDEN_LAYERS:
        x = ops.relu(ops.linear(x, f"mlp.{layer}"))
    return ops.unnormalize(ops.linear(x, f"mlp.{OUTPUT_LAYER}"), policy.normalizers[ACTION])
