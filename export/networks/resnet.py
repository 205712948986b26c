"""torchvision's ResNets, which every camera policy looks through: tensors, folding, and the forward pass.

ACT has one with frozen batch norms, LeRobot's and Diffusion Policy's encoders have them with group norms or with batch
norms that stood still at inference; a `ResNet` says which, and under which names its tensors are published. Batch norms
are folded into their convolutions, in float64, so that the network is the same for PyTorch and for ONNX. The list of
convolutions is written once: checkpoints are held against it and the forward pass walks it. Architecture: He et al.
2015, arXiv:1512.03385, as torchvision.models.resnet has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from export.networks.operations import Operations

T = TypeVar("T")
BATCH_NORM_EPS = 1e-5  # torch.nn.BatchNorm2d and torchvision.ops.FrozenBatchNorm2d
CHANNELS_A_GROUP = 16  # where group norms stand in for batch norms (Diffusion Policy, and LeRobot after it)

# bottleneck or basic blocks, and how many of them in each of the four stages
VARIANTS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
# Where the parts stand when the network is kept as the sequence of its children.
NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


@dataclass(frozen=True)
class ResNet:
    """A ResNet without its classifier, in a checkpoint whose tensor names begin with `prefix`."""

    prefix: str
    variant: str
    dilate: bool = False  # the last stage's stride becomes dilation (replace_final_stride_with_dilation)
    numbered: bool = False  # published as nn.Sequential(*children), so `0.weight` is the stem's convolution
    group_norm: bool = False  # instead of batch norms, C/16 groups
    counts_batches: bool = False  # its batch norms are torch's own, which also save num_batches_tracked

    @property
    def bottleneck(self) -> bool:
        return VARIANTS[self.variant][0]

    @property
    def channels(self) -> int:
        """Of the last feature map."""
        return 2048 if self.bottleneck else 512

    def part(self, name: str) -> str:
        return self.prefix + (NUMBERED[name] if self.numbered else name)

    def cells(self, pixels: int) -> int:
        """Rows (or columns) of the last feature map: every stride of 2 rounds up."""
        for _ in range(4 if self.dilate else 5):
            pixels = (pixels + 1) // 2
        return pixels


@dataclass(frozen=True)
class Convolution:
    """One convolution with the norm that follows it, by their published names."""

    name: str
    norm: str
    shape: tuple[int, int, int, int]  # out, in, height, width
    stride: int
    padding: int
    dilation: int = 1


def convolutions(net: ResNet) -> Iterator[Convolution]:
    """The stem's convolution, then `blocks` in order."""
    yield Convolution(net.part("conv1"), net.part("bn1"), (64, 3, 7, 7), stride=2, padding=3)
    for block in blocks(net):
        yield from block


def blocks(net: ResNet) -> Iterator[list[Convolution]]:
    """Residual blocks: their convolutions in order; a `downsample` at the end is on the shortcut."""
    expansion = 4 if net.bottleneck else 1
    channels = 64
    for stage, count in enumerate(VARIANTS[net.variant][1]):
        width = 64 << stage
        for index in range(count):
            first = index == 0
            stride = 2 if first and stage > 0 else 1
            dilation = 1
            if net.dilate and stage == 3:  # torchvision: from the second block on
                stride, dilation = 1, 1 if first else 2
            name = f"{net.part(f'layer{stage + 1}')}.{index}"
            shortcut = first and (stage > 0 or net.bottleneck)
            yield _block(name, channels, width, width * expansion, stride, dilation, net.bottleneck, shortcut)
            channels = width * expansion


def expected_weights(net: ResNet) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this network holds."""
    parts = ("weight", "bias") if net.group_norm else ("weight", "bias", "running_mean", "running_var")
    shapes: dict[str, tuple[int, ...]] = {}
    for convolution in convolutions(net):
        shapes[f"{convolution.name}.weight"] = convolution.shape
        shapes |= {f"{convolution.norm}.{part}": (convolution.shape[0],) for part in parts}
        if net.counts_batches and not net.group_norm:
            shapes[f"{convolution.norm}.num_batches_tracked"] = ()
    return shapes


def runnable(net: ResNet, published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that `resnet` reads: batch norms folded away, group norms as they are."""
    if net.group_norm:
        return {name: published[name] for name in expected_weights(net)}
    weights: dict[str, torch.Tensor] = {}
    for convolution in convolutions(net):
        weights |= _fold(convolution, published)
    return weights


def resnet(ops: Operations[T], net: ResNet, x: T) -> T:
    """Pictures [N, 3, H, W] to feature maps [N, C, h, w]."""
    stem = next(convolutions(net))
    x = ops.max_pool(ops.relu(_convolution(ops, net, stem, x)))
    for block in blocks(net):
        x = _residual(ops, net, block, x)
    return x


def _residual(ops: Operations[T], net: ResNet, block: list[Convolution], x: T) -> T:
    shortcut, inner = x, list(block)
    if "downsample" in block[-1].name:
        shortcut = _convolution(ops, net, inner.pop(), x)
    for convolution in inner[:-1]:
        x = ops.relu(_convolution(ops, net, convolution, x))
    return ops.relu(ops.add(_convolution(ops, net, inner[-1], x), shortcut))


def _convolution(ops: Operations[T], net: ResNet, convolution: Convolution, x: T) -> T:
    x = ops.conv(x, convolution.name, convolution.stride, convolution.padding, convolution.dilation)
    if net.group_norm:
        x = ops.group_norm(x, convolution.norm, convolution.shape[0] // CHANNELS_A_GROUP, dimensions=2)
    return x


def _fold(convolution: Convolution, published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A convolution with its batch norm folded in, computed in float64."""
    parts = ("weight", "bias", "running_mean", "running_var")
    gain, shift, mean, variance = (published[f"{convolution.norm}.{part}"].double() for part in parts)
    gain = gain / torch.sqrt(variance + BATCH_NORM_EPS)
    weight = published[f"{convolution.name}.weight"].double() * gain[:, None, None, None]
    return {f"{convolution.name}.weight": weight.float(), f"{convolution.name}.bias": (shift - mean * gain).float()}


def _block(
    name: str, inputs: int, width: int, outputs: int, stride: int, dilation: int, bottleneck: bool, shortcut: bool
) -> list[Convolution]:
    first, second, third = ((f"{name}.conv{index}", f"{name}.bn{index}") for index in (1, 2, 3))
    if bottleneck:
        block = [
            Convolution(*first, (width, inputs, 1, 1), 1, 0),
            Convolution(*second, (width, width, 3, 3), stride, dilation, dilation),
            Convolution(*third, (outputs, width, 1, 1), 1, 0),
        ]
    else:
        block = [
            Convolution(*first, (width, inputs, 3, 3), stride, 1),
            Convolution(*second, (width, width, 3, 3), 1, 1),
        ]
    if shortcut:
        block.append(Convolution(f"{name}.downsample.0", f"{name}.downsample.1", (outputs, inputs, 1, 1), stride, 0))
    return block
