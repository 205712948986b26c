"""An ACT policy ready to be written down: one answer an observation, a whole chunk of goals.

`export.act.read` makes it of a checkpoint; `export.act.network` is what it computes, here given to PyTorch for the
reference and to ONNX for the bundle. Zhao et al. 2023, arXiv:2304.13705.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from device.bundle import POLICY
from device.manifest import Family, Handoff, Sampler
from export.act.network import act
from export.act.weights import ActConfig
from export.networks.graph import GraphOperations
from export.networks.operations import Array, TorchOperations
from export.normalize import Normalizer
from export.policy import Authored, Inputs
from export.precision import Precision, Storage


@dataclass(frozen=True)
class ActPolicy:
    """Weights as export.act.network names them, normalisation by the policy's feature names. See
    export.policy.Policy."""

    config: ActConfig
    weights: dict[str, torch.Tensor]
    normalizers: dict[str, Normalizer]

    family: ClassVar[Family] = "act"
    observation_steps: ClassVar[int] = 1
    sampler: ClassVar[Sampler | None] = None

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.config.state_size, self.config.environment_state, self.config.images)

    @property
    def action_size(self) -> int:
        return self.config.action_size

    @property
    def chunk_size(self) -> int:
        return self.config.chunk_size

    @property
    def handoff(self) -> Handoff:
        found = self.config.ensemble_coefficient
        return Handoff(method="ensemble", m=None if found is None else float(found))

    def noise(self, seed: int) -> dict[str, Array]:
        return {}

    def reference(self, inputs: Mapping[str, Array]) -> Array:
        with torch.inference_mode():
            result: Array = act(TorchOperations(self.weights, inputs), self).numpy()
        return result

    def author(self, names: Mapping[str, str], storage: Storage, precision: Precision) -> Authored:
        graph = GraphOperations(self.weights, self.inputs.shapes(), names, storage, precision)
        action = act(graph, self)
        model = graph.model({"action": (action, (self.chunk_size, self.action_size))})
        return Authored({POLICY: model.SerializeToString()}, len(model.graph.node))
