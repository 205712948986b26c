"""A policy of any family, understood and ready to be written down: the internal form of `export`.

Readers turn files into a Checkpoint, `export.families` turns a Checkpoint into one of these, and everything after that
(golden inputs, precision, sweep, the bundle) works with nothing else. A family implements `Policy`: its weights under
the names that its network reads them by, its normalisation as numbers, the graphs it is written as, and a reference in
PyTorch that the tests hold equal to the framework it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from device.bundle import ENVIRONMENT_STATE, STATE
from device.manifest import Family, Handoff, Sampler
from export.errors import ExportError
from export.networks.operations import Array
from export.normalize import Normalizer
from export.precision import Precision, Storage, stored_in_half


@dataclass(frozen=True)
class Inputs:
    """What a policy sees at one time. Sizes in elements; images (name, height, width), in the policy's order."""

    state_size: int
    environment_state: int | None
    images: tuple[tuple[str, int, int], ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Raw inputs by the policy's names: vectors [n], images [H, W, 3]."""
        shapes: dict[str, tuple[int, ...]] = {STATE: (self.state_size,)}
        if self.environment_state is not None:
            shapes[ENVIRONMENT_STATE] = (self.environment_state,)
        return shapes | {name: (height, width, 3) for name, height, width in self.images}


@dataclass(frozen=True)
class Authored:
    """What a network was written as: a bundle's files by name, and how many nodes its graphs have together."""

    files: dict[str, bytes]
    nodes: int


class Policy(Protocol):
    """One policy. Implementations are frozen dataclasses."""

    @property
    def weights(self) -> dict[str, torch.Tensor]: ...
    @property
    def normalizers(self) -> dict[str, Normalizer]:
        """By the policy's names of inputs, and `action`."""

    @property
    def family(self) -> Family:
        """As the manifest names it."""

    @property
    def inputs(self) -> Inputs: ...
    @property
    def observation_steps(self) -> int: ...
    @property
    def action_size(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def handoff(self) -> Handoff:
        """How its chunks should follow each other."""

    @property
    def sampler(self) -> Sampler | None:
        """How it samples, for the manifest; None for a policy that answers at once."""

    def noise(self, seed: int) -> dict[str, Array]:
        """What the reference and the engine are both given where the policy samples: `noise`, `step_noise`."""

    def reference(self, inputs: Mapping[str, Array]) -> Array:
        """float32 [K, A] in joint units, computed by PyTorch. `inputs`: raw, by the policy's names, with a leading axis
        of observation steps where there are several, and `noise`."""

    def author(self, names: Mapping[str, str], storage: Storage, precision: Precision) -> Authored:
        """The files of a bundle (golden inputs, pictures and manifest excepted). `names`: policy's input -> robot's.
        `precision` is fp32 or fp16; int8 is made of an fp32 bundle by `export.quantize`."""


P = TypeVar("P", bound=Policy)


def rounded(policy: P) -> P:
    """The policy with the weights that half-precision storage would give. Raises ExportError on overflow."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in policy.weights.items():
        weights[name] = tensor.half().float() if stored_in_half(tensor) else tensor
        if not torch.isfinite(weights[name]).all():
            largest = f"{tensor.abs().max():g}"
            raise ExportError(f"{name} does not fit half precision (largest {largest}); use --weights fp32")
    return dataclasses.replace(policy, weights=weights)  # type: ignore[type-var]  # every policy is a dataclass
