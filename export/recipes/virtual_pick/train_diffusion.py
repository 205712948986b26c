"""Train a small LeRobot DiffusionPolicy on the demonstrations of `collect.py`, on a CPU, with the ACT policy's eyes.

A person runs this after `train.py`, with the same Python; what comes out is an ordinary LeRobot checkpoint with
LeRobot's own `DiffusionPolicy` (DDPM, 100 steps, epsilon). Its ResNet is the one that ACT has trained on these very
pictures and stays as it is: every picture goes through it once, the feature maps are kept in a file, and only what
follows learns. The weights that are saved are a moving average.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel, DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import OBS_IMAGES
from safetensors.torch import load_file
from torch import Tensor, nn

from export.recipes.virtual_pick.demonstrations import (
    CAMERAS,
    JOINT_COUNT,
    Demonstrations,
    ahead,
    image_key,
    shuffled,
)
from export.recipes.virtual_pick.training import Training, arguments

OBSERVATION_STEPS, HORIZON, ACTION_STEPS = 2, 32, 16  # at 30 Hz: it plans for a second and acts for half of it
BATCH = 64  # observations a step
AVERAGE_POWER, AVERAGE_MAX = 0.75, 0.9999  # Diffusion Policy's EMA (Chi et al. 2023), diffusers' EMAModel
# Where torchvision's ResNet parts stand in the sequence that LeRobot makes of them.
PLACES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}

Batch = dict[str, Tensor]


def make_config(image_hw: tuple[int, int]) -> DiffusionConfig:
    images = {image_key(c): PolicyFeature(FeatureType.VISUAL, (3, *image_hw)) for c in CAMERAS}
    return DiffusionConfig(
        device="cpu",
        push_to_hub=False,
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (JOINT_COUNT,)), **images},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (JOINT_COUNT,))},
        n_obs_steps=OBSERVATION_STEPS,
        horizon=HORIZON,
        n_action_steps=ACTION_STEPS,
        vision_backbone="resnet18",
        use_group_norm=False,  # the batch norms of ACT, with the statistics they have
        crop_shape=None,  # a grasp wants every pixel's place, and there is too little training here to overfit
        down_dims=(64, 128, 256),
        diffusion_step_embed_dim=128,
        noise_scheduler_type="DDPM",
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
    )


def load_backbone(backbone: nn.Module, weights: Path) -> None:
    """Give `backbone`, LeRobot's sequence of ResNet parts, the weights of an ACT checkpoint's."""
    prefix = "model.backbone."
    found = {name[len(prefix) :]: value for name, value in load_file(weights).items() if name.startswith(prefix)}
    renamed = {f"{PLACES[name.split('.')[0]]}.{name.split('.', 1)[1]}": value for name, value in found.items()}
    counters = {name: value for name, value in backbone.state_dict().items() if name.endswith("num_batches_tracked")}
    backbone.load_state_dict({**counters, **renamed}, strict=True)


class Learner(nn.Module):
    """The policy with its ResNet taken out, so that feature maps can come from a file as well as from pictures."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.policy = DiffusionPolicy(config)
        self.backbone: nn.Module = self.policy.diffusion.rgb_encoder.backbone
        self.policy.diffusion.rgb_encoder.backbone = nn.Identity()
        self.backbone.to(memory_format=torch.channels_last)
        self.train()

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        self.backbone.eval()  # its batch norms keep the statistics that inference will use
        return self

    def loss(self, batch: Batch) -> Tensor:
        """LeRobot's loss (DiffusionModel.compute_loss) of a batch with feature maps for pictures."""
        model: DiffusionModel = self.policy.diffusion
        condition, actions = model._prepare_global_conditioning(batch), batch["action"]
        noise, scheduler = torch.randn_like(actions), model.noise_scheduler
        timesteps = spread(len(actions), scheduler.config.num_train_timesteps)
        noisy = scheduler.add_noise(actions, noise, timesteps)
        return nn.functional.mse_loss(model.unet(noisy, timesteps, global_cond=condition), noise)


def spread(count: int, below: int) -> Tensor:
    """`count` random timesteps below `below`, in random order, each part of the range drawn equally often."""
    return ((torch.randperm(count) + torch.rand(count)) * (below / count)).long().clamp_(max=below - 1)


class Average:
    """The moving average of a module's parameters, which forgets more slowly the longer it has gone on."""

    def __init__(self, module: nn.Module) -> None:
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def follow(self, module: nn.Module, step: int) -> None:
        keep = min(AVERAGE_MAX, 1 - (1 + step) ** -AVERAGE_POWER)
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in module.parameters()], 1 - keep)


def ordinary(learner: Learner, average: Average) -> DiffusionPolicy:
    """LeRobot's own policy with the averaged weights, nothing of ours left."""
    plain = DiffusionPolicy(learner.policy.config)
    weights = {
        name.replace("backbone.", "policy.diffusion.rgb_encoder.backbone.", 1).removeprefix("policy."): value
        for name, value in {**learner.state_dict(), **average.values}.items()
    }
    plain.load_state_dict({name: value.contiguous() for name, value in weights.items()}, strict=True)
    return plain.eval()


def observations(data: Demonstrations, index: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Batch]:
    """The frames [B, steps] that are seen at `index`, and the raw states and actions that go with them."""
    seen = data.frames(index, np.arange(1 - OBSERVATION_STEPS, 1))
    meant = data.frames(index, np.arange(1 - OBSERVATION_STEPS, 1 - OBSERVATION_STEPS + HORIZON))
    return seen, {"observation.state": data.noisy_state(seen, rng), "action": torch.from_numpy(data.action[meant])}


def map_batches(data: Demonstrations, maps: np.ndarray, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches with feature maps for pictures."""
    rng = np.random.default_rng(seed)
    for index in shuffled(len(data), min(BATCH, len(data)), rng):
        seen, batch = observations(data, index, rng)
        batch[OBS_IMAGES] = torch.from_numpy(maps[seen]).view(torch.bfloat16).float()
        yield batch


def feature_maps(data: Demonstrations, learner: Learner, normalise: Any, folder: Path) -> np.ndarray:
    """Every picture's feature map, int16 (bfloat16's bits) [N, cameras, C, h, w], from a file that is made once."""
    weights = b"".join(value.numpy().tobytes() for value in learner.backbone.state_dict().values())
    path = folder / f"maps_{hashlib.sha256(weights).hexdigest()[:12]}_{len(data)}.npy"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        write_feature_maps(data, learner, normalise, temporary)
        temporary.rename(path)
    return np.asarray(np.load(path, mmap_mode="r"))


@torch.no_grad()
def write_feature_maps(data: Demonstrations, learner: Learner, normalise: Any, path: Path) -> None:
    """Every picture through the ResNet once."""
    shape = (len(data), len(CAMERAS), *learner.backbone(torch.zeros(1, 3, *data.image_hw)).shape[1:])
    file = np.lib.format.open_memmap(path, "w+", np.int16, shape)
    began, size = time.monotonic(), 64
    for batch, first in enumerate(range(0, len(data), size)):
        index = np.arange(first, min(first + size, len(data)))
        pictures = normalise({image_key(c): data.images(index, i).float() / 255 for i, c in enumerate(CAMERAS)})
        both = torch.cat([pictures[image_key(c)] for c in CAMERAS]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = learner.backbone(both).bfloat16()
        file[index] = torch.stack(maps.chunk(len(CAMERAS)), dim=1).contiguous().view(torch.int16).numpy()
        if batch % 200 == 0:
            print(f"feature maps of {first} frames, {time.monotonic() - began:.0f} s", flush=True)
    file.flush()


class DiffusionTraining(Training):
    """How the diffusion policy learns: what follows the ResNet, from its feature maps."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        torch.manual_seed(0)
        self.data = Demonstrations.load(args.data, args.shards)
        self.config = make_config(self.data.image_hw)
        self.learner = Learner(self.config)
        self.processors = make_pre_post_processors(self.config, dataset_stats=self.data.statistics())
        state = self.kept_state()
        if state is None:
            load_backbone(self.learner.backbone, args.eyes / "model.safetensors")
        self.average = Average(self.learner)
        self.optimizer = self.make_optimizer()
        if state is not None:
            self.learner.load_state_dict(state["learner"])
            self.average.values = state["average"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.processors = make_pre_post_processors(self.config, pretrained_path=self.last_checkpoint())
            torch.manual_seed(self.step)
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (self.learner.policy, self.learner.backbone)]
        print(f"{len(self.data)} frames, {sizes[0]:.1f} M parameters and {sizes[1]:.1f} M in the ResNet", flush=True)
        # Small convolutions in one dimension gain little from torch's own threads; halves of a batch do.
        self.workers = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
        args.out.mkdir(parents=True, exist_ok=True)
        maps = feature_maps(self.data, self.learner, self.processors[0], args.out)
        self.feed = ahead(map_batches(self.data, maps, seed=self.step))

    def make_optimizer(self) -> torch.optim.AdamW:
        # The ResNet's group has no gradients; it is there because a state that is kept has it.
        groups = [{"params": list(m.parameters())} for m in (self.learner.policy, self.learner.backbone)]
        return torch.optim.AdamW(groups, lr=self.args.lr, betas=(0.95, 0.999), weight_decay=1e-6, fused=True)

    def batch(self) -> Batch:
        """The next batch, normalised."""
        raw = next(self.feed)
        normalised = self.processors[0]({name: value for name, value in raw.items() if name != OBS_IMAGES})
        return {name: raw[name] if name == OBS_IMAGES else normalised[name] for name in raw}

    def gradients(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a part of a batch and its gradients by `learning()`."""
        loss = self.learner.loss(batch)
        return loss.detach(), torch.autograd.grad(loss, self.learning())

    def learning(self) -> list[nn.Parameter]:
        return list(self.learner.policy.parameters())

    def learn(self) -> float:
        batch, count = self.batch(), self.args.threads
        shares = [{name: value[i::count] for name, value in batch.items()} for i in range(count)]
        losses, gradients = zip(*self.workers.map(self.gradients, shares), strict=True)
        for parameter, *parts in zip(self.learning(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(dim=0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        nn.utils.clip_grad_norm_(self.learning(), 1.0)
        self.optimizer.step()
        self.average.follow(self.learner, self.step)
        return float(torch.stack(losses).mean())

    def parts(self) -> tuple[Any, ...]:
        return ordinary(self.learner, self.average), *self.processors

    def state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
        }


def main() -> None:
    parser = arguments(
        "Train a small LeRobot DiffusionPolicy on the virtual cell's demonstrations.",
        out=".cache/virtual_pick/diffusion",
        steps=25_000,
        minutes=float("inf"),  # by steps: a training that waits for others' work loses nothing
        rate=1e-3,
    )
    parser.add_argument(
        "--eyes",
        type=Path,
        default=Path(".cache/virtual_pick/checkpoints/last/pretrained_model"),
        help="the ACT checkpoint whose ResNet it starts with",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # for the feature maps
    DiffusionTraining(args).run()


if __name__ == "__main__":
    main()
