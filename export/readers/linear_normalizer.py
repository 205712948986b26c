"""Diffusion Policy's normalisation: scale and offset of every key, saved among the weights of the policy.

`export.diffusion.stanford` asks for it key by key. It is x * scale + offset on the way in and its inverse on the way
out, with numbers that training computed once; a dimension that never moved has the scale 1 there, so nothing divides by
zero, and statistics are kept beside them for the record only. Source: diffusion_policy/model/common/normalizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from export.errors import ExportError
from export.normalize import Normalizer, Statistics, Vector, identity

PREFIX = "normalizer.params_dict."
LINEAR = "LINEAR"  # the mode's name, beside LeRobot's
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def vector(weights: Mapping[str, torch.Tensor], key: str, size: int, where: str) -> Normalizer:
    """Of a vector of `size` elements. One number for all of them is taken too. Raises ExportError."""
    scale, offset = (np.broadcast_to(part, size) for part in _scale_and_offset(weights, key, (size, 1), where))
    return _affine(-offset / scale, 1 / scale)


def picture(weights: Mapping[str, torch.Tensor], key: str, where: str, *, imagenet: bool) -> Normalizer:
    """Of a picture from 0 to 1, [3]; with `imagenet` what torchvision's Normalize makes of the result. Raises
    ExportError for more than one scale: the original applies those along a picture's rows."""
    scale, offset = _scale_and_offset(weights, key, (1,), where)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (np.zeros(3), np.ones(3))
    return _affine((mean - offset) / scale, std / scale)


def joined(parts: Sequence[Normalizer]) -> Normalizer:
    """Of vectors that stand one behind the other."""
    return _affine(np.concatenate([part.offset for part in parts]), np.concatenate([part.scale for part in parts]))


def statistics(weights: Mapping[str, torch.Tensor], keys: Sequence[str]) -> Statistics:
    """min, max, mean and std of vectors one behind the other, as far as they are known of all of them."""
    found: dict[str, Vector] = {}
    for name in ("min", "max", "mean", "std"):
        tensors = [weights.get(f"{PREFIX}{key}.input_stats.{name}") for key in keys]
        sizes = [weights[f"{PREFIX}{key}.scale"].numel() for key in keys]
        if all(tensor is not None and tensor.numel() == size for tensor, size in zip(tensors, sizes, strict=True)):
            found[name] = np.concatenate(
                [tensor.double().numpy().reshape(-1) for tensor in tensors if tensor is not None]
            )
    return found


def _scale_and_offset(
    weights: Mapping[str, torch.Tensor], key: str, sizes: tuple[int, ...], where: str
) -> tuple[Vector, Vector]:
    found = []
    for part in ("scale", "offset"):
        tensor = weights.get(f"{PREFIX}{key}.{part}")
        if tensor is None:
            known = sorted({name.removeprefix(PREFIX).rpartition(".scale")[0] for name in weights if ".scale" in name})
            raise ExportError(
                f"{where}: {PREFIX}{key}.{part} is missing, so {key} cannot be normalised; found that of "
                f"{', '.join(known) or 'nothing'}"
            )
        values = tensor.double().numpy().reshape(-1)
        if values.size not in sizes:
            raise ExportError(f"{where}: {PREFIX}{key}.{part} should hold {sizes[0]} values, found {values.size}")
        if not np.isfinite(values).all():
            raise ExportError(f"{where}: {PREFIX}{key}.{part} holds NaN or infinity")
        found.append(values)
    scale, offset = found
    if not scale.all():
        element = int(np.flatnonzero(scale == 0)[0])
        raise ExportError(f"{where}: {PREFIX}{key}.scale is zero in element {element}, so {key} would be lost")
    return scale, offset


def _affine(offset: Vector, scale: Vector) -> Normalizer:
    """As export.normalize has it: (x - offset) / scale."""
    if not offset.any() and (scale == 1).all():
        return identity(offset.size)
    return Normalizer(LINEAR, np.asarray(offset, np.float64), np.asarray(scale, np.float64))
