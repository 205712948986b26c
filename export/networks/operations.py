"""The few operations that our networks are written in, and PyTorch as the first to execute them.

A network (`export.act.network`, `export.diffusion.unet`) is a function over `Operations`: `TorchOperations` computes
it, which is the reference that every bundle is compared with, and `export.networks.graph.GraphOperations` writes it
down as ONNX nodes. So there is one description of each architecture, and the graph holds what we put there and nothing
that a tracer added. What is computed keeps its gradients, so the same description is what distillation trains. An arm
has one observation at a time: tokens are matrices [tokens, width] without a batch axis; where there is one, it is 1 in
a graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from export.normalize import Normalizer

T = TypeVar("T")
Array = np.ndarray[Any, np.dtype[Any]]


class Operations(Protocol[T]):
    """Names are those of weights: `linear(x, "action_head")` uses action_head.weight and action_head.bias."""

    def vector(self, name: str, normalizer: Normalizer) -> T:
        """The raw input `name`, float32 [n], normalised, as one row [1, n]."""

    def frames(self, names: Sequence[str], normalizers: Sequence[Normalizer]) -> T:
        """Raw uint8 [H, W, 3] inputs of one size, normalised, as one batch float32 [N, 3, H, W]."""

    def weight(self, name: str) -> T: ...
    def constant(self, name: str, value: Array) -> T: ...
    def given(self, name: str) -> T:
        """The input `name` as it is, float32."""

    def add(self, a: T, b: T) -> T: ...
    def mul(self, a: T, b: T) -> T: ...
    def clip(self, x: T, bound: T) -> T:
        """To -bound .. bound."""

    def concat(self, parts: Sequence[T], axis: int = 0) -> T: ...
    def slice(self, x: T, axis: int, start: int, stop: int) -> T: ...
    def reshape(self, x: T, *sizes: int) -> T: ...
    def transpose(self, x: T, *axes: int) -> T: ...
    def relu(self, x: T) -> T: ...
    def gelu(self, x: T) -> T: ...
    def mish(self, x: T) -> T: ...
    def softmax(self, x: T) -> T:
        """Over the last axis."""

    def product(self, a: T, b: T) -> T:
        """Matrix product over the last two axes, in float32 whatever the network computes in."""

    def linear(self, x: T, name: str) -> T: ...
    def layer_norm(self, x: T, name: str) -> T: ...
    def group_norm(self, x: T, name: str, groups: int, dimensions: int = 1) -> T:
        """Of [N, C, ...] with so many `dimensions` after the channels; eps 1e-5."""

    def conv(self, x: T, name: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> T:
        """Over as many dimensions as the weight has; with a bias where the weights have one."""

    def conv_transpose(self, x: T, name: str, stride: int, padding: int) -> T:
        """Of [N, C, L], in one dimension."""

    def max_pool(self, x: T) -> T:
        """3x3, stride 2, padding 1."""

    def mean_pool(self, x: T) -> T:
        """[N, C, h, w] to [N, C]: the mean of each map."""

    def tokens(self, features: T, width: int) -> T:
        """A feature map [N, C, h, w] as rows [N*h*w, C], image by image, line by line."""

    def attention(self, q: T, k: T, v: T, heads: int, width: int) -> T:
        """Scaled dot-product attention of projected rows [*, width], heads side by side in a row."""

    def unnormalize(self, x: T, normalizer: Normalizer) -> T: ...


class TorchOperations:
    """Computes with PyTorch, in float32 where the weights are. `inputs` are raw observations by the policy's names."""

    def __init__(self, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, Array]) -> None:
        self._weights = weights
        self._inputs = inputs
        self._device = next((tensor.device for tensor in weights.values()), torch.device("cpu"))

    def vector(self, name: str, normalizer: Normalizer) -> torch.Tensor:
        return (self.given(name)[None] - self._float(normalizer.offset)) / self._float(normalizer.scale)

    def frames(self, names: Sequence[str], normalizers: Sequence[Normalizer]) -> torch.Tensor:
        raw = torch.stack([self.given(name) for name in names])
        offset = torch.stack([self._float(normalizer.offset) for normalizer in normalizers])[..., None, None]
        scale = torch.stack([self._float(normalizer.scale) for normalizer in normalizers])[..., None, None]
        return (raw.permute(0, 3, 1, 2).float() / 255 - offset) / scale

    def weight(self, name: str) -> torch.Tensor:
        return self._weights[name]

    def constant(self, name: str, value: Array) -> torch.Tensor:
        return torch.from_numpy(value).to(self._device)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def given(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._inputs[name])).to(self._device)

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def clip(self, x: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(x, -bound), bound)

    def concat(self, parts: Sequence[torch.Tensor], axis: int = 0) -> torch.Tensor:
        return torch.cat(tuple(parts), dim=axis)

    def slice(self, x: torch.Tensor, axis: int, start: int, stop: int) -> torch.Tensor:
        return x.narrow(axis, start, stop - start)

    def reshape(self, x: torch.Tensor, *sizes: int) -> torch.Tensor:
        return x.reshape(sizes)

    def transpose(self, x: torch.Tensor, *axes: int) -> torch.Tensor:
        return x.permute(axes)

    def mish(self, x: torch.Tensor) -> torch.Tensor:
        return F.mish(x)

    def softmax(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def relu(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def group_norm(self, x: torch.Tensor, name: str, groups: int, dimensions: int = 1) -> torch.Tensor:
        return F.group_norm(x, groups, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def conv(self, x: torch.Tensor, name: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> torch.Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        convolve = F.conv2d if weight.ndim == 4 else F.conv1d
        return convolve(x, weight, bias, stride, padding, dilation)

    def conv_transpose(self, x: torch.Tensor, name: str, stride: int, padding: int) -> torch.Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.conv_transpose1d(x, weight, bias, stride, padding)

    def max_pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def mean_pool(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def tokens(self, features: torch.Tensor, width: int) -> torch.Tensor:
        return features.permute(0, 2, 3, 1).reshape(-1, width)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, width: int) -> torch.Tensor:
        split_q, split_k, split_v = (x.reshape(-1, heads, width // heads).transpose(0, 1) for x in (q, k, v))
        scores = split_q / math.sqrt(width // heads) @ split_k.transpose(1, 2)
        return (scores.softmax(-1) @ split_v).transpose(0, 1).reshape(-1, width)

    def unnormalize(self, x: torch.Tensor, normalizer: Normalizer) -> torch.Tensor:
        return x * self._float(normalizer.scale) + self._float(normalizer.offset)

    def _float(self, values: Array) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(self._device)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one core while a network runs many times in a row: threads that wait for each other on a busy machine
    have been seen to take a hundred times as long, and one observation gives two of them little to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
