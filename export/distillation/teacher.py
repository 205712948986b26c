"""The teacher of a distillation: a diffusion policy as LeRobot trained it, read by `export` and refused where the
method does not apply.

`command` reads one; the training, the gate and whoever writes the student ask it for its network, its normalisation and
its files. Nothing of it is ever changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from device.bundle import ACTION, ENCODER
from export.checkpoint import Checkpoint, Told
from export.diffusion.policy import DiffusionPolicy
from export.diffusion.sampler import SamplerTable
from export.diffusion.samplers import DiffusionSamplers
from export.diffusion.schedule import NoiseSchedule
from export.diffusion.unet import time_embedding, unet
from export.distillation.sampling import Denoise
from export.errors import ExportError
from export.families import read_policy
from export.networks.operations import TorchOperations
from export.precision import Precision, Storage
from export.sampling import Sampling

LEROBOT = "lerobot"  # how the names of its layouts begin


@dataclass(frozen=True)
class Teacher:
    """`source`: its files; `policy`: what they mean; `samplers`: how it may be sampled."""

    source: Checkpoint
    policy: DiffusionPolicy
    samplers: DiffusionSamplers

    @property
    def identity(self) -> str:
        """SHA-256 of its weights' file."""
        return self.source.source_files[self.source.weights_path.name]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.samplers.schedule

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the denoising network: what learns, under the names that the policy has them by."""
        prefix = self.policy.unet.prefix
        return {name: tensor for name, tensor in self.policy.weights.items() if name.startswith(prefix)}

    @property
    def shape(self) -> tuple[int, int]:
        """(H, A): the horizon and the joints."""
        return self.policy.horizon, self.policy.action_size

    @property
    def names(self) -> dict[str, str]:
        """The policy's inputs to what the robot, and its recordings, call them."""
        return {name: self.source.robot_name(name) for name in self.policy.inputs.shapes()}

    @property
    def units(self) -> NDArray[np.float64]:
        """Joint units to one normalised unit, [A]."""
        return np.asarray(self.policy.normalizers[ACTION].scale, np.float64)

    def table(self, ddim_steps: int | None) -> SamplerTable:
        """Its own sampler, or so many steps of DDIM."""
        if ddim_steps is None:
            return self.policy.table
        return self.samplers.table(Sampling(solver="ddim", steps=ddim_steps, spacing="leading"))

    def encoder(self) -> bytes:
        """encoder.onnx, in float32, with the recordings' names for its inputs."""
        return self.policy.author(self.names, Storage.fp32, Precision.fp32).files[ENCODER]

    def normalized(self, actions: NDArray[Any]) -> NDArray[np.float32]:
        """Actions [..., A] in joint units as the network knows them."""
        normalizer = self.policy.normalizers[ACTION]
        found: NDArray[np.float32] = ((actions - normalizer.offset) / normalizer.scale).astype(np.float32)
        return found

    def denoise(self, weights: Mapping[str, Tensor], x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The network with these weights, at x [B, H, A], timesteps int64 [B] and condition [B, G]; keeps gradients."""
        net = self.policy.unet
        time = time_embedding(weights, net, timesteps)
        return unet(TorchOperations(weights, {}), net, x, time, condition)

    def with_weights(self, weights: Mapping[str, Tensor], device: torch.device) -> Denoise:
        """The network as `export.distillation.sampling` takes it."""
        placed = {name: tensor.to(device) for name, tensor in weights.items()}
        return lambda x, timesteps, condition: self.denoise(placed, x, timesteps, condition)

    def chunk(self, horizons: NDArray[np.float32]) -> NDArray[np.float32]:
        """The part [..., K, A] of horizons [..., H, A] that an arm would execute."""
        first = self.policy.first_action
        return horizons[..., first : first + self.policy.chunk_size, :]


def read_teacher(path: Path) -> Teacher:
    """The diffusion policy at `path`. Raises ExportError for anything that cannot be distilled."""
    source, policy = read_policy(path, Told(), Sampling())
    if not isinstance(policy, DiffusionPolicy):
        raise ExportError(f"{source.path}: {policy.family} answers at once already; there is nothing to distill")
    if policy.samplers.distilled:
        raise ExportError(
            f"{source.path} is a student already, of {policy.table.steps} steps; give the teacher it was distilled from"
        )
    if not source.layout.startswith(LEROBOT) or not isinstance(policy.samplers, DiffusionSamplers):
        raise ExportError(
            f"{source.path}: {source.layout}: only LeRobot's diffusion policies can be distilled, since the student is "
            "a checkpoint of that layout"
        )
    prediction = policy.samplers.schedule.prediction_type
    if prediction != "epsilon":
        raise ExportError(
            f"{source.path}: prediction_type {prediction!r}: only policies that predict the noise ('epsilon') can be "
            "distilled; train one, or export this one with --fast"
        )
    return Teacher(source, policy, policy.samplers)
