"""What a behaviour cloning network consists of: its configuration, and the name and shape of every tensor.

`export.cloning.read` holds a checkpoint against this list, and the tests make checkpoints from it. Names are those that
the original ACT repository saves for its policy class CNNMLP (detr/models/detr_vae.py), without the prefix `model.`.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.networks import resnet
from export.networks.resnet import ResNet

DOWN_CHANNELS = (128, 64, 32)  # of the convolutions between a backbone and the first linear layer
DOWN_KERNEL = 5
HIDDEN_LAYERS = (0, 2)  # indices in `mlp`; a ReLU follows each
OUTPUT_LAYER = 4


@dataclass(frozen=True)
class CloningConfig:
    """Sizes in elements; images (name, height, width), in the order of the backbones."""

    state_size: int
    images: tuple[tuple[str, int, int], ...]
    action_size: int
    backbone: str
    hidden: int

    def resnet(self, camera: int) -> ResNet:
        return ResNet(f"backbones.{camera}.0.body.", self.backbone)

    def down_projection(self, camera: int) -> tuple[str, ...]:
        """Names of the convolutions that follow the camera's backbone, in order."""
        return tuple(f"backbone_down_projs.{camera}.{index}" for index in range(len(DOWN_CHANNELS)))

    def features(self, height: int, width: int) -> int:
        """Inputs of the first linear layer that a picture gives; zero where it is too small for the convolutions."""
        lost = len(DOWN_CHANNELS) * (DOWN_KERNEL - 1)
        rows, columns = (max(self.resnet(0).cells(pixels) - lost, 0) for pixels in (height, width))
        return DOWN_CHANNELS[-1] * rows * columns


def expected_weights(config: CloningConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that inference reads."""
    shapes: dict[str, tuple[int, ...]] = {}
    for camera in range(len(config.images)):
        net = config.resnet(camera)
        shapes |= resnet.expected_weights(net)
        channels = net.channels
        for name, outputs in zip(config.down_projection(camera), DOWN_CHANNELS, strict=True):
            shapes[f"{name}.weight"] = (outputs, channels, DOWN_KERNEL, DOWN_KERNEL)
            shapes[f"{name}.bias"] = (outputs,)
            channels = outputs
    inputs = config.state_size + sum(config.features(height, width) for _, height, width in config.images)
    for layer in (*HIDDEN_LAYERS, OUTPUT_LAYER):
        outputs = config.action_size if layer == OUTPUT_LAYER else config.hidden
        shapes |= {f"mlp.{layer}.weight": (outputs, inputs), f"mlp.{layer}.bias": (outputs,)}
        inputs = outputs
    return shapes
