"""What a diffusion policy sees: one observation step as a row of features, in LeRobot's order.

`encoder.onnx` is `Encoder.encode` written down, and a bundle runs it once an observation. LeRobot's encoder, Diffusion
Policy's after robomimic: each picture is cropped, goes through a ResNet whose maps become keypoints, the places where a
softmax puts each map's mass (Finn et al. 2016, arXiv:1509.06113), and through one layer. State comes first, then the
cameras in the policy's order, then the environment's state. Other frameworks have encoders of their own: anything that
is an `Encoder` can be part of a DiffusionPolicy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from device.bundle import ENVIRONMENT_STATE, STATE
from export.networks import resnet
from export.networks.framing import Framing, frame
from export.networks.operations import Array, Operations
from export.networks.resnet import ResNet
from export.normalize import Normalizer
from export.policy import Inputs

T = TypeVar("T")


class Encoder(Protocol):
    """Implementations are frozen dataclasses."""

    @property
    def inputs(self) -> Inputs: ...
    @property
    def feature_size(self) -> int:
        """F, of one observation step."""

    def encode(self, ops: Operations[T], normalizers: Mapping[str, Normalizer]) -> T:
        """The executor's observation as features [1, F]."""


@dataclass(frozen=True, kw_only=True)
class KeypointEncoder:
    """LeRobot's. Sizes in elements; images (name, height, width), all of one size."""

    state_size: int
    environment_state: int | None
    images: tuple[tuple[str, int, int], ...]
    backbone: str
    group_norm: bool
    separate: bool  # an encoder for each camera, or one for all
    keypoints: int
    framing: Framing
    prefix: str = "rgb_encoder."

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.state_size, self.environment_state, self.images)

    @property
    def feature_size(self) -> int:
        return self.state_size + 2 * self.keypoints * len(self.images) + (self.environment_state or 0)

    @property
    def eyes(self) -> tuple[str, ...]:
        """How the names of each encoder's tensors begin."""
        if not self.images:
            return ()
        return tuple(f"{self.prefix}{index}." for index in range(len(self.images))) if self.separate else (self.prefix,)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of a feature map."""
        height, width = self.framing.size(self.images[0][1:])
        net = self.resnet("")
        return net.cells(height), net.cells(width)

    def resnet(self, eye: str) -> ResNet:
        """Of the encoder whose names begin with `eye`."""
        name = f"{eye}backbone."
        return ResNet(name, self.backbone, numbered=True, group_norm=self.group_norm, counts_batches=True)

    def encode(self, ops: Operations[T], normalizers: Mapping[str, Normalizer]) -> T:
        """See Encoder.encode."""
        parts = [ops.vector(STATE, normalizers[STATE])]
        names = [name for name, _, _ in self.images]
        groups = [[name] for name in names] if self.separate else [names] if names else []
        for eye, seen in zip(self.eyes, groups, strict=True):
            pixels = ops.frames(seen, [normalizers[name] for name in seen])
            features = look(ops, self, eye, pixels)
            parts.append(ops.reshape(features, 1, 2 * self.keypoints * len(seen)))
        if self.environment_state is not None:
            parts.append(ops.vector(ENVIRONMENT_STATE, normalizers[ENVIRONMENT_STATE]))
        return ops.concat(parts, axis=1)


def look(ops: Operations[T], encoder: KeypointEncoder, eye: str, pixels: T) -> T:
    """Normalised pictures [N, 3, H, W] through the encoder whose names begin with `eye`: [N, 2 * keypoints]."""
    x = frame(ops, encoder.framing, encoder.images[0][1:], pixels)
    x = ops.conv(resnet.resnet(ops, encoder.resnet(eye), x), f"{eye}pool.nets")
    rows, columns = encoder.cells
    mass = ops.softmax(ops.reshape(x, -1, rows * columns))
    places = ops.product(mass, ops.constant(f"keypoint_grid.{rows}x{columns}", grid(rows, columns)))
    return ops.relu(ops.linear(ops.reshape(places, -1, 2 * encoder.keypoints), f"{eye}out"))


def grid(rows: int, columns: int) -> Array:
    """x and y of a feature map's cells, each from -1 to 1: float32 [rows * columns, 2]."""
    x, y = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-1, 1, rows))
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def expected_weights(encoder: KeypointEncoder) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this encoder holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    points = encoder.keypoints
    for eye in encoder.eyes:
        net, (rows, columns) = encoder.resnet(eye), encoder.cells
        shapes |= resnet.expected_weights(net)
        shapes |= {f"{eye}pool.nets.weight": (points, net.channels, 1, 1), f"{eye}pool.nets.bias": (points,)}
        shapes |= {f"{eye}pool.pos_grid": (rows * columns, 2)}
        shapes |= {f"{eye}out.weight": (2 * points, 2 * points), f"{eye}out.bias": (2 * points,)}
    return shapes


def runnable(encoder: KeypointEncoder, published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that `look` reads: batch norms folded away, the grid left out, which is a constant."""
    weights: dict[str, torch.Tensor] = {}
    for eye in encoder.eyes:
        weights |= resnet.runnable(encoder.resnet(eye), published)
        weights |= {f"{eye}{part}": published[f"{eye}{part}"] for part in HEAD}
    return weights


HEAD = ("pool.nets.weight", "pool.nets.bias", "out.weight", "out.bias")  # of an eye, behind its ResNet
