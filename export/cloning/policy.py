"""A behaviour cloning policy ready to be written down: one answer an observation, a chunk of one goal.

`export.cloning.read` makes it of a checkpoint; `export.cloning.network` is what it computes, here given to PyTorch for
the reference and to ONNX for the bundle. Its single goal is meant for now and says nothing about later, so the newest
one alone has the say: that is the hand-over `latest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from device.bundle import POLICY
from device.manifest import Family, Handoff, Sampler
from export.cloning.network import cloning
from export.cloning.weights import CloningConfig
from export.networks.graph import GraphOperations
from export.networks.operations import Array, TorchOperations
from export.normalize import Normalizer
from export.policy import Authored, Inputs
from export.precision import Precision, Storage


@dataclass(frozen=True)
class CloningPolicy:
    """Weights as export.cloning.network names them, normalisation by the policy's feature names. See
    export.policy.Policy."""

    config: CloningConfig
    weights: dict[str, torch.Tensor]
    normalizers: dict[str, Normalizer]

    family: ClassVar[Family] = "cloning"
    observation_steps: ClassVar[int] = 1
    chunk_size: ClassVar[int] = 1
    handoff: ClassVar[Handoff] = Handoff(method="latest")
    sampler: ClassVar[Sampler | None] = None

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.config.state_size, None, self.config.images)

    @property
    def action_size(self) -> int:
        return self.config.action_size

    def noise(self, seed: int) -> dict[str, Array]:
        return {}

    def reference(self, inputs: Mapping[str, Array]) -> Array:
        with torch.inference_mode():
            result: Array = cloning(TorchOperations(self.weights, inputs), self).numpy()
        return result

    def author(self, names: Mapping[str, str], storage: Storage, precision: Precision) -> Authored:
        graph = GraphOperations(self.weights, self.inputs.shapes(), names, storage, precision)
        action = cloning(graph, self)
        model = graph.model({"action": (action, (self.chunk_size, self.action_size))})
        return Authored({POLICY: model.SerializeToString()}, len(model.graph.node))
