"""What is done to a picture before a network looks at it: resizing, antialiased or not, then a crop from the middle.

As torchvision.transforms.Resize (bilinear) and CenterCrop do on float tensors at inference. ONNX has an
antialiased Resize since opset 18 only and TensorRT has none, so both are two constant matrices here, rows and columns,
with the crop already taken out of them: a picture is resized by two matrix products, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from export.errors import ExportError
from export.networks.operations import Operations

T = TypeVar("T")
Float32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Framing:
    """Sizes are (height, width) in px; None leaves the picture as it is."""

    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    antialias: bool = True  # False: torchvision before 0.17

    def size(self, picture: tuple[int, int]) -> tuple[int, int]:
        """What the network gets of a picture of this size. Raises ExportError where the crop does not fit."""
        whole = self.resize or picture
        if self.crop is None:
            return whole
        if self.crop[0] > whole[0] or self.crop[1] > whole[1]:
            raise ExportError(f"a crop of {_said(self.crop)} px does not fit into pictures of {_said(whole)}")
        return self.crop


def frame(ops: Operations[T], framing: Framing, picture: tuple[int, int], x: T) -> T:
    """Pictures [N, 3, H, W] of the size `picture` to [N, 3, h, w] of `framing.size(picture)`."""
    whole, size = framing.resize or picture, framing.size(picture)
    starts = tuple(_first(outer, inner) for outer, inner in zip(whole, size, strict=True))
    if whole == picture:
        for axis, start, outer, inner in zip((2, 3), starts, whole, size, strict=True):
            x = x if inner == outer else ops.slice(x, axis, start, start + inner)
        return x
    down, across = (
        resizing(before, after, framing.antialias)[start : start + inner]
        for before, after, start, inner in zip(picture, whole, starts, size, strict=True)
    )
    name = f"resize.{_said(picture)}.{_said(whole)}.{_said(size)}{'' if framing.antialias else '.plain'}"
    x = ops.product(x, ops.constant(f"{name}.across", np.ascontiguousarray(across.T)))
    return ops.product(ops.constant(f"{name}.down", down), x)


def resizing(before: int, after: int, antialias: bool = True) -> Float32:
    """float32 [after, before]: the weights of old pixels in every new one, rows that add to 1.

    A triangle as wide as two old or two new pixels, whichever is wider, around the new pixel's centre, cut at the
    picture's edge (torch.nn.functional.interpolate, bilinear with antialias); always two old pixels without. Rounded to
    float32 where torch rounds: in a picture of 640 pixels its centres are off by 1e-5 of a pixel, and so were those
    that the policy was trained on.
    """
    scale = np.float32(before) / np.float32(after)
    reach = max(scale, np.float32(1)) if antialias else np.float32(1)
    centres = (np.float64(scale) * (np.arange(after) + 0.5)).astype(np.float32)
    first = np.maximum(((centres - reach).astype(np.float64) + 0.5).astype(int), 0)
    last = np.minimum(((centres + reach).astype(np.float64) + 0.5).astype(int), before)
    pixels = np.arange(before)
    away = (pixels.astype(np.float32) - centres[:, None]).astype(np.float64) + 0.5
    weights = np.maximum(0, 1 - np.abs((away * np.float64(np.float32(1) / reach)).astype(np.float32)))
    weights[(pixels < first[:, None]) | (pixels >= last[:, None])] = 0
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _first(outer: int, inner: int) -> int:
    """Where a crop begins: torchvision rounds half a pixel to the even one."""
    return round((outer - inner) / 2)


def _said(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
