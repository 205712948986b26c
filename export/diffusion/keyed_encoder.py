"""What Diffusion Policy's own policies see: features of one observation step in the order of its keys.

The original names every vector and every picture, and the order in which an encoder puts their features side by side is
part of a policy: that of the configuration for the robomimic encoder, vectors between pictures, and that of the sorted
names, pictures first, for the multi-image encoder. `export.diffusion.stanford` says the order; this is the Encoder that
keeps it. The vectors together are observation.state, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from device.bundle import STATE
from export.diffusion import encoder
from export.diffusion.encoder import KeypointEncoder
from export.errors import ExportError
from export.networks import resnet
from export.networks.framing import Framing, frame
from export.networks.operations import Operations
from export.networks.resnet import ResNet
from export.normalize import Normalizer
from export.policy import Inputs

T = TypeVar("T")


class Eye(Protocol):
    """What looks at one picture. Implementations are frozen dataclasses."""

    @property
    def image(self) -> tuple[str, int, int]:
        """The input's name, height and width."""

    @property
    def feature_size(self) -> int: ...
    def published(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint holds of it."""

    def runnable(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The published weights as `see` reads them."""

    def see(self, ops: Operations[T], normalizer: Normalizer) -> T:
        """Features [1, F]."""


@dataclass(frozen=True)
class Slot:
    """Elements `start` to `stop` of observation.state."""

    start: int
    stop: int


@dataclass(frozen=True)
class KeyedEncoder:
    """Vectors and eyes in the order of their features; the slots follow each other and fill observation.state."""

    parts: tuple[Slot | Eye, ...]

    @property
    def eyes(self) -> tuple[Eye, ...]:
        return tuple(part for part in self.parts if not isinstance(part, Slot))

    @property
    def inputs(self) -> Inputs:
        state = sum(part.stop - part.start for part in self.parts if isinstance(part, Slot))
        return Inputs(state, None, tuple(eye.image for eye in self.eyes))

    @property
    def feature_size(self) -> int:
        return self.inputs.state_size + sum(eye.feature_size for eye in self.eyes)

    def encode(self, ops: Operations[T], normalizers: Mapping[str, Normalizer]) -> T:
        """See export.diffusion.encoder.Encoder."""
        state, whole = ops.vector(STATE, normalizers[STATE]), self.inputs.state_size
        features = []
        for part in self.parts:
            if not isinstance(part, Slot):
                features.append(part.see(ops, normalizers[part.image[0]]))
            elif (part.start, part.stop) == (0, whole):
                features.append(state)
            else:
                features.append(ops.slice(state, 1, part.start, part.stop))
        return ops.concat(features, axis=1)


@dataclass(frozen=True)
class KeypointEye:
    """robomimic's VisualCore: a ResNet-18, keypoints by a softmax with a temperature, one layer. `name`: how its
    tensors begin."""

    name: str
    image: tuple[str, int, int]
    group_norm: bool
    framing: Framing
    keypoints: int = 32

    @property
    def core(self) -> KeypointEncoder:
        """LeRobot's encoder after it, which computes the same under other names."""
        return KeypointEncoder(
            state_size=0,
            environment_state=None,
            images=(self.image,),
            backbone="resnet18",
            group_norm=self.group_norm,
            separate=False,
            keypoints=self.keypoints,
            framing=self.framing,
            prefix=self.name,
        )

    @property
    def feature_size(self) -> int:
        return 2 * self.keypoints

    def published(self) -> dict[str, tuple[int, ...]]:
        """See Eye."""
        shapes = {self._published(name): shape for name, shape in encoder.expected_weights(self.core).items()}
        cells = shapes.pop(f"{self.name}pool.pos_grid")[0]
        return shapes | {
            f"{self.name}pool.temperature": (1,),
            f"{self.name}pool.pos_x": (1, cells),
            f"{self.name}pool.pos_y": (1, cells),
        }

    def runnable(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See Eye. softmax(x / temperature) of a convolution is the softmax of a smaller convolution. Raises
        ExportError for keypoints that are not on the grid from -1 to 1, which is a constant here."""
        cells = encoder.grid(*self.core.cells)
        for part, column in (("pos_x", cells[:, 0]), ("pos_y", cells[:, 1])):
            if not np.allclose(weights[f"{self.name}pool.{part}"].numpy()[0], column, rtol=0, atol=1e-5):
                raise ExportError(f"{self.name}pool.{part} is not the grid from -1 to 1; the file is damaged")
        names = [name for name in encoder.expected_weights(self.core) if not name.endswith("pool.pos_grid")]
        found = encoder.runnable(self.core, {name: weights[self._published(name)] for name in names})
        temperature = weights[f"{self.name}pool.temperature"]
        if not temperature > 0:
            raise ExportError(f"{self.name}pool.temperature should be positive, found {temperature.item()}")
        for part in ("weight", "bias"):
            found[f"{self.name}pool.nets.{part}"] = found[f"{self.name}pool.nets.{part}"] / temperature
        return found

    def see(self, ops: Operations[T], normalizer: Normalizer) -> T:
        """See Eye."""
        return encoder.look(ops, self.core, self.name, ops.frames([self.image[0]], [normalizer]))

    def _published(self, name: str) -> str:
        """LeRobot's name of a tensor to robomimic's."""
        after = name.removeprefix(self.name)
        for ours, theirs in (("backbone.", "backbone.nets."), ("out.", "nets.3.")):
            if after.startswith(ours):
                after = theirs + after.removeprefix(ours)
        return self.name + after


@dataclass(frozen=True)
class PooledEye:
    """torchvision's ResNet without its classifier: the mean of each of its last maps."""

    image: tuple[str, int, int]
    net: ResNet
    framing: Framing

    @property
    def feature_size(self) -> int:
        return self.net.channels

    def published(self) -> dict[str, tuple[int, ...]]:
        """See Eye."""
        return resnet.expected_weights(self.net)

    def runnable(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See Eye."""
        return resnet.runnable(self.net, weights)

    def see(self, ops: Operations[T], normalizer: Normalizer) -> T:
        """See Eye."""
        pixels = ops.frames([self.image[0]], [normalizer])
        return ops.mean_pool(resnet.resnet(ops, self.net, frame(ops, self.framing, self.image[1:], pixels)))
