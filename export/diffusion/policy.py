"""A diffusion policy ready to be written down: an encoder, a denoising network, and a table of steps between noise and
actions.

The importers of every framework's checkpoints make one; distillation trains its networks, the sweep exchanges its
table. `reference` runs in PyTorch what the bundle's two graphs and the engine's loop run: the encoder once for each
observation step, the UNet once for each row, the sampler's arithmetic in float32. Chi et al. 2023, arXiv:2303.04137.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from device.arrays import dump_arrays
from device.bundle import ACTION, DENOISE, ENCODER, NOISE, SAMPLER, STEP_NOISE
from device.manifest import Family, Handoff, Sampler
from export.diffusion.encoder import Encoder
from export.diffusion.sampler import COLUMNS, Float32, Float64, SamplerTable, run
from export.diffusion.samplers import Samplers
from export.diffusion.unet import UNet, time_embedding, unet
from export.errors import ExportError
from export.networks.graph import GraphOperations
from export.networks.operations import Array, Operations, T, TorchOperations, one_thread
from export.normalize import Normalizer
from export.policy import Authored, Inputs
from export.precision import Precision, Storage
from export.sampling import Sampling


@dataclass(frozen=True)
class DiffusionPolicy:
    """See export.policy.Policy. Weights are those that `encoder` and `unet` read, normalisation is by the policy's
    feature names; a chunk is the actions from the newest observation on."""

    encoder: Encoder
    unet: UNet
    horizon: int  # H: actions that are denoised, from the oldest observation on
    observation_steps: int  # T
    chunk_size: int  # K
    samplers: Samplers
    table: SamplerTable
    weights: dict[str, torch.Tensor]
    normalizers: dict[str, Normalizer]
    begins: int | None = None  # first_action, where it is not the newest observation's

    family: ClassVar[Family] = "diffusion"

    def __post_init__(self) -> None:
        if self.horizon % self.unet.shortening:
            raise ExportError(
                f"horizon {self.horizon} does not divide by {self.unet.shortening}, which a network of "
                f"{len(self.unet.down_dims)} down_dims needs"
            )
        if self.first_action + self.chunk_size > self.horizon:
            raise ExportError(
                f"a chunk of {self.chunk_size} actions from action {self.first_action} on does not fit into a horizon "
                f"of {self.horizon}"
            )

    @property
    def handoff(self) -> Handoff:
        """Two samples are not averaged, since they may be of two modes. Half a chunk is followed before the next: it
        was trained to be followed for a while, and the other half is there while the next one is computed."""
        return Handoff(method="crossfade", advance=(self.chunk_size + 1) // 2)

    @property
    def inputs(self) -> Inputs:
        return self.encoder.inputs

    @property
    def action_size(self) -> int:
        return self.unet.action_size

    @property
    def first_action(self) -> int:
        """Index in the horizon of the chunk's first action, which is meant for the newest observation's time."""
        return self.observation_steps - 1 if self.begins is None else self.begins

    @property
    def sampler(self) -> Sampler:
        return Sampler(
            solver=self.table.solver,
            steps=self.table.steps,
            spacing=self.table.spacing,
            horizon=self.horizon,
            first_action=self.first_action,
            initial_scale=self.table.initial_scale,
            draws_noise=self.table.draws_noise,
            distilled=self.samplers.distilled,
        )

    def with_sampling(self, sampling: Sampling) -> DiffusionPolicy:
        """The same policy, sampled as chosen. Raises ExportError for what it cannot do."""
        return dataclasses.replace(self, table=self.samplers.table(sampling))

    def noise(self, seed: int) -> dict[str, Array]:
        """`noise` float32 [H, A], and `step_noise` float32 [S, H, A] where the sampler draws in between."""
        rng, shape = np.random.default_rng(seed), (self.horizon, self.action_size)
        drawn: dict[str, Array] = {NOISE: rng.standard_normal(shape, np.float32)}
        if self.table.draws_noise:
            drawn[STEP_NOISE] = rng.standard_normal((self.table.steps, *shape), np.float32)
        return drawn

    def condition(self, inputs: Mapping[str, Array]) -> torch.Tensor:
        """What the network is told of raw inputs, as `reference` takes them: float32 [1, T * F]."""
        names, steps = self.inputs.shapes(), range(self.observation_steps)
        features = []
        for step in steps:
            seen = {name: inputs[name] if len(steps) == 1 else inputs[name][step] for name in names}
            features.append(self.encoder.encode(TorchOperations(self.weights, seen), self.normalizers))
        return torch.cat(features, dim=1)

    def reference(self, inputs: Mapping[str, Array]) -> Array:
        """See Policy.reference."""
        with torch.inference_mode(), one_thread():
            condition, ops = self.condition(inputs), TorchOperations(self.weights, {})

            def network(sample: Float32, time: Float64) -> Float32:
                embedded = time_embedding(self.weights, self.unet, torch.from_numpy(np.asarray(time)[None]))
                answer: Float32 = unet(ops, self.unet, torch.from_numpy(sample)[None], embedded, condition)[0].numpy()
                return answer

            start = np.asarray(np.float32(self.table.initial_scale) * inputs[NOISE])
            denoised = run(self.table, network, start, inputs.get(STEP_NOISE))[-1]
            chunk = torch.from_numpy(denoised[self.first_action : self.first_action + self.chunk_size])
            action: Array = ops.unnormalize(chunk, self.normalizers[ACTION]).numpy()
        return action

    def author(self, names: Mapping[str, str], storage: Storage, precision: Precision) -> Authored:
        """See Policy.author: encoder.onnx, denoise.onnx and sampler.npz."""
        seeing = GraphOperations(self.weights, self.inputs.shapes(), names, storage, precision)
        size = self.encoder.feature_size
        features = seeing.reshape(self.encoder.encode(seeing, self.normalizers), size)
        encoder = seeing.model({"features": (features, (size,))})
        shapes = self._denoising_inputs()
        denoising = GraphOperations(self.weights, shapes, {}, storage, precision)
        after, denoised, action = denoise(denoising, self)
        sample = shapes["sample"]
        denoiser = denoising.model(
            {
                "next": (after, sample),
                "denoised": (denoised, sample),
                ACTION: (action, (self.chunk_size, self.action_size)),
            }
        )
        files = {
            ENCODER: encoder.SerializeToString(),
            DENOISE: denoiser.SerializeToString(),
        } | self.sampler_files()
        return Authored(files, len(encoder.graph.node) + len(denoiser.graph.node))

    def sampler_files(self) -> dict[str, bytes]:
        """What another way of sampling changes of a bundle's files: sampler.npz."""
        return {SAMPLER: dump_arrays(self._rows())}

    def _denoising_inputs(self) -> dict[str, tuple[int, ...]]:
        sample = (self.horizon, self.action_size)
        return {
            "sample": sample,
            "condition": (self.unet.condition_size,),
            "time": (self.unet.time_size,),
            "coefficients": (len(COLUMNS),),
            "noise": sample,
            "previous": sample,
        }

    def _rows(self) -> dict[str, Array]:
        """sampler.npz: what the engine feeds to denoise.onnx, step by step."""
        with torch.inference_mode():
            times = time_embedding(self.weights, self.unet, torch.from_numpy(self.table.times))
        return {
            "timesteps": self.table.times.reshape(self.table.steps, -1)[:, 0].astype(np.float32),
            "time": times.numpy(),
            "coefficients": self.table.coefficients,
        }


def denoise(ops: Operations[T], policy: DiffusionPolicy) -> tuple[T, T, T]:
    """One row of the sampler (docs/formats.md, Bundle): next [H, A], denoised [H, A], action [K, A] in joint units."""
    x, previous, noise, row = (ops.given(name) for name in ("sample", "previous", "noise", "coefficients"))
    of = {name: ops.slice(row, 0, index, index + 1) for index, name in enumerate(COLUMNS)}
    shape = (policy.horizon, policy.action_size)
    m = ops.reshape(
        unet(
            ops,
            policy.unet,
            ops.reshape(ops.mul(of["c_in"], x), 1, *shape),
            ops.reshape(ops.given("time"), 1, policy.unet.time_size),
            ops.reshape(ops.given("condition"), 1, policy.unet.condition_size),
        ),
        *shape,
    )
    predicted = ops.add(ops.mul(of["p_x"], x), ops.mul(of["p_m"], m))
    denoised = ops.clip(predicted, of["clip"])
    after = ops.mul(of["k_denoised"], denoised)
    for name, term in (("k_x", x), ("k_m", m), ("k_noise", noise), ("k_previous", previous)):
        after = ops.add(after, ops.mul(of[name], term))
    last = policy.first_action + policy.chunk_size
    chunk = ops.slice(after, 0, policy.first_action, last)
    return after, denoised, ops.unnormalize(chunk, policy.normalizers[ACTION])
