"""What a bundle's weights are stored in and what its networks compute in."""

from __future__ import annotations

from enum import Enum

import torch

SMALL = 4096  # elements; biases, norms and the like keep float32 when weights are stored in half precision


class Storage(str, Enum):
    """How weights are stored in the graphs; the arithmetic does not follow from it."""

    fp32 = "fp32"
    fp16 = "fp16"


class Precision(str, Enum):
    """What convolutions and matrix products compute in. Normalisation, norms, softmax and the sampler are float32 in
    all of them."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


def stored_in_half(tensor: torch.Tensor) -> bool:
    """Whether half-precision storage rounds this weight."""
    return tensor.ndim >= 2 and tensor.numel() >= SMALL
