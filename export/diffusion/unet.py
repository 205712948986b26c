"""The network that denoises: a UNet over the actions of a horizon, told what was seen and how noisy its input is.

Chi et al. 2023 (arXiv:2303.04137), appendix A, as Diffusion Policy, LeRobot and Consistency Policy all have it: one
dimension, FiLM (Perez et al. 2017, arXiv:1709.07871) from the observations and from one time, or from two for a
consistency trajectory model. `unet` is written over `Operations`, so that one description is the reference, the
bundle's denoise.onnx and what distillation trains. Times are embedded by `time_embedding` in PyTorch: a bundle holds
the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from export.errors import ExportError
from export.networks.operations import Operations, TorchOperations

T = TypeVar("T")
FINAL_GROUPS = 8  # of the last block's norm, in every framework, whatever n_groups says


@dataclass(frozen=True, kw_only=True)
class UNet:
    """What decides the network's shape, in elements. Tensor names begin with `prefix` and are LeRobot's after it.

    Raises ExportError for sizes that no such network can have.
    """

    action_size: int
    condition_size: int  # features of all observation steps together
    embedding_size: int  # of one time (diffusion_step_embed_dim)
    times: int = 1  # that the network is told
    down_dims: tuple[int, ...]
    kernel_size: int
    groups: int
    film_scale: bool  # FiLM scales and shifts; or shifts only
    prefix: str = "unet."

    def __post_init__(self) -> None:
        if (
            not self.down_dims
            or any(width % self.groups for width in self.down_dims)
            or self.down_dims[0] % FINAL_GROUPS
        ):
            raise ExportError(
                f"down_dims {list(self.down_dims)}: expected widths that divide by n_groups {self.groups}, "
                f"and a first one that divides by {FINAL_GROUPS}"
            )
        if self.kernel_size % 2 == 0:
            raise ExportError(f"kernel_size {self.kernel_size}: an even one changes the horizon; expected an odd one")
        if self.embedding_size < 4 or self.embedding_size % 2:
            raise ExportError(f"diffusion_step_embed_dim {self.embedding_size}: expected an even number of at least 4")

    @property
    def time_size(self) -> int:
        """D: how wide `time` is."""
        return self.times * self.embedding_size

    @property
    def shortening(self) -> int:
        """What a horizon must divide by."""
        return 1 << (len(self.down_dims) - 1)


def unet(ops: Operations[T], net: UNet, sample: T, time: T, condition: T) -> T:
    """What the network makes of `sample` [B, H, A] at the embedded `time` [B, D] for `condition` [B, G]: [B, H, A]."""
    # Every block puts the same vector through a Mish of its own, so it is computed once.
    told = ops.mish(ops.concat([time, condition], axis=1))
    x, skipped, last = ops.transpose(sample, 0, 2, 1), list[T](), len(net.down_dims) - 1
    blocks = _residual_blocks(net)
    for level in range(last + 1):
        x = _pair(ops, net, blocks, x, told)
        skipped.append(x)
        if level < last:
            x = ops.conv(x, f"{net.prefix}down_modules.{level}.2", stride=2, padding=1)
    x = _pair(ops, net, blocks, x, told)
    for level in range(last):
        x = _pair(ops, net, blocks, ops.concat([x, skipped.pop()], axis=1), told)
        x = ops.conv_transpose(x, f"{net.prefix}up_modules.{level}.2", stride=2, padding=1)
    x = _convolution(ops, net, f"{net.prefix}final_conv.0", x, FINAL_GROUPS)
    return ops.transpose(ops.conv(x, f"{net.prefix}final_conv.1"), 0, 2, 1)


def time_embedding(weights: Mapping[str, torch.Tensor], net: UNet, times: torch.Tensor) -> torch.Tensor:
    """What `unet` is given of `times`, [B] or [B, n] as the sampler's table has them: float32 [B, D].

    Sines, then cosines, of frequencies from 1 to 1/10000 (Vaswani et al. 2017, arXiv:1706.03762, 3.5), in the float32
    roundings of the frameworks, and a small network that all of n times share.
    """
    half = net.embedding_size // 2
    decay = math.log(10000) / (half - 1)
    frequencies = torch.exp(torch.arange(half, device=times.device) * -decay)
    angles = times.float().reshape(len(times), -1, 1) * frequencies
    ops, name = TorchOperations(weights, {}), f"{net.prefix}diffusion_step_encoder"
    embedded = torch.cat([angles.sin(), angles.cos()], dim=-1)
    embedded = ops.linear(ops.mish(ops.linear(embedded, f"{name}.1")), f"{name}.3")
    return embedded.reshape(len(times), net.time_size)


def expected_weights(net: UNet) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this network holds."""
    size, told = net.embedding_size, net.time_size + net.condition_size
    shapes = _affine("diffusion_step_encoder.1", 4 * size, size) | _affine("diffusion_step_encoder.3", size, 4 * size)
    for block in _residual_blocks(net):
        name, width = block.name.removeprefix(net.prefix), block.width
        shapes |= _normed(f"{name}.conv1", width, block.inputs, net.kernel_size)
        shapes |= _affine(f"{name}.cond_encoder.1", width * (2 if net.film_scale else 1), told)
        shapes |= _normed(f"{name}.conv2", width, width, net.kernel_size)
        if block.inputs != width:
            shapes |= _affine(f"{name}.residual_conv", width, block.inputs, 1)
    for level, width in enumerate(net.down_dims[:-1]):
        shapes |= _affine(f"down_modules.{level}.2", width, width, 3)
    for level, width in enumerate(reversed(net.down_dims[:-1])):
        shapes |= _affine(f"up_modules.{level}.2", width, width, 4)
    first = net.down_dims[0]
    shapes |= _normed("final_conv.0", first, first, net.kernel_size) | _affine(
        "final_conv.1", net.action_size, first, 1
    )
    return {net.prefix + name: shape for name, shape in shapes.items()}


class _Block(NamedTuple):
    name: str
    inputs: int  # channels
    width: int  # channels out


def _residual_blocks(net: UNet) -> Iterator[_Block]:
    """In the order they run, two at a time."""
    widths = net.down_dims
    pairs = [
        (f"down_modules.{level}.", inputs, width)
        for level, (inputs, width) in enumerate(zip((net.action_size, *widths), widths, strict=False))
    ]
    pairs.append(("mid_modules.", widths[-1], widths[-1]))
    pairs += [
        (f"up_modules.{level}.", 2 * inputs, width)
        for level, (inputs, width) in enumerate(zip(widths[:0:-1], widths[-2::-1], strict=True))
    ]
    for name, inputs, width in pairs:
        yield _Block(f"{net.prefix}{name}0", inputs, width)
        yield _Block(f"{net.prefix}{name}1", width, width)


def _pair(ops: Operations[T], net: UNet, blocks: Iterator[_Block], x: T, told: T) -> T:
    x = _residual(ops, net, next(blocks), x, told)
    return _residual(ops, net, next(blocks), x, told)


def _residual(ops: Operations[T], net: UNet, block: _Block, x: T, told: T) -> T:
    name, width = block.name, block.width
    film = ops.reshape(ops.linear(told, f"{name}.cond_encoder.1"), -1, width * (2 if net.film_scale else 1), 1)
    inner = _convolution(ops, net, f"{name}.conv1", x, net.groups)
    if net.film_scale:
        inner = ops.mul(inner, ops.slice(film, 1, 0, width))
        film = ops.slice(film, 1, width, 2 * width)
    inner = ops.add(inner, film)
    inner = _convolution(ops, net, f"{name}.conv2", inner, net.groups)
    return ops.add(inner, x if block.inputs == width else ops.conv(x, f"{name}.residual_conv"))


def _convolution(ops: Operations[T], net: UNet, name: str, x: T, groups: int) -> T:
    x = ops.conv(x, f"{name}.block.0", padding=net.kernel_size // 2)
    return ops.mish(ops.group_norm(x, f"{name}.block.1", groups))


def _affine(name: str, outputs: int, *others: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, *others), f"{name}.bias": (outputs,)}


def _normed(name: str, outputs: int, inputs: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """A convolution with its group norm."""
    return _affine(f"{name}.block.0", outputs, inputs, kernel) | _affine(f"{name}.block.1", outputs)
