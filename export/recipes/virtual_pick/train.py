"""Train LeRobot's ACT on the demonstrations of `collect.py`, on a CPU, from scratch.

A person runs this with the Python of an environment that has LeRobot (0.4); what comes out is an ordinary LeRobot
checkpoint, policy and both processors, for `understudy export`. The network is LeRobot's own `ACTPolicy`; ours is the
speed: bfloat16, and both cameras through the backbone as one batch. LeRobot's ACT normalises nothing in a backbone that
starts from random weights, since its batch norms are frozen; here they live while training, freeze for the last part of
it, and are saved as the frozen ones.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-not-found]  # in LeRobot's environment only

from export.recipes.virtual_pick.demonstrations import (
    CAMERAS,
    JOINT_COUNT,
    Demonstrations,
    ahead,
    brightened,
    gains,
    image_key,
    shuffled,
)
from export.recipes.virtual_pick.training import Training, arguments

SMALL_SHARE, SMALL_SCALE = 0.5, 2 / 3  # the first part sees smaller pictures: twice as many steps in its time
FREEZE_SHARE = 0.8  # from here on batch norms use the statistics that inference will use


def batches(data: Demonstrations, chunk: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches under LeRobot's names: noisy states, brightened pictures, chunks of actions."""
    rng = np.random.default_rng(seed)
    for index in shuffled(len(data), size, rng):
        batch = {
            "action": torch.from_numpy(data.action[data.frames(index, np.arange(chunk))]),
            # After its last frame the expert stays where it is: that is what the padding says, so it counts.
            "action_is_pad": torch.zeros(size, chunk, dtype=torch.bool),
            "observation.state": data.noisy_state(index, rng),
        }
        for i, camera in enumerate(CAMERAS):
            batch[image_key(camera)] = brightened(data.images(index, i), gains(size, rng))
        yield batch


class BothCameras(nn.Module):
    """ACT's backbone, computed once for all cameras: LeRobot asks camera by camera and is given its share.

    Batch statistics then cover all cameras together, as the one set of frozen statistics does at inference.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._shares: list[Tensor] = []

    def prepare(self, images: list[Tensor]) -> None:
        both = torch.cat(images).contiguous(memory_format=torch.channels_last)
        self._shares = list(self.inner(both)["feature_map"].chunk(len(images)))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"feature_map": self._shares.pop(0)}


def living_batch_norms(module: nn.Module) -> None:
    """Replace every frozen batch norm below `module` by one that learns."""
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(child.weight.numel(), eps=child.eps, momentum=0.02))
        else:
            living_batch_norms(child)


def make_config(image_hw: tuple[int, int], chunk: int) -> ACTConfig:
    images = {image_key(c): PolicyFeature(FeatureType.VISUAL, (3, *image_hw)) for c in CAMERAS}
    return ACTConfig(
        device="cpu",
        push_to_hub=False,
        pretrained_backbone_weights=None,
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (JOINT_COUNT,)), **images},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (JOINT_COUNT,))},
        chunk_size=chunk,
        n_action_steps=chunk,
        vision_backbone="resnet18",
        dim_model=256,
        n_heads=8,
        dim_feedforward=1024,
        n_encoder_layers=4,
        n_decoder_layers=1,
        use_vae=False,  # the expert is one person with one way of doing it: there is no style to encode
        dropout=0.0,
    )


def trainable(config: ACTConfig) -> ACTPolicy:
    """LeRobot's policy with living batch norms and the shared pass through the backbone."""
    torch.manual_seed(0)
    policy = ACTPolicy(config)
    living_batch_norms(policy.model.backbone)
    for module in policy.model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    policy.model.backbone = BothCameras(policy.model.backbone)
    return policy.to(memory_format=torch.channels_last)


def ordinary(policy: ACTPolicy) -> ACTPolicy:
    """The same weights in LeRobot's own class, nothing of ours left."""
    plain = ACTPolicy(policy.config)
    weights = {
        name.replace("backbone.inner.", "backbone."): value.contiguous()
        for name, value in policy.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    plain.load_state_dict(weights, strict=True)
    return plain.eval()


class ActTraining(Training):
    """How ACT learns."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.data = Demonstrations.load(args.data, args.shards)
        self.config = make_config(self.data.image_hw, args.chunk)
        self.policy = trainable(self.config)
        self.processors = make_pre_post_processors(self.config, dataset_stats=self.data.statistics())
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
        state = self.kept_state()
        if state is not None:
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            # The statistics that the weights were trained with, also when data has been added since.
            self.processors = make_pre_post_processors(self.config, pretrained_path=self.last_checkpoint())
        parameters = sum(p.numel() for p in self.policy.parameters()) / 1e6
        print(f"{len(self.data)} frames, {parameters:.1f} M parameters", flush=True)
        self.feed = ahead(batches(self.data, args.chunk, args.batch, seed=self.step))

    def learn(self) -> float:
        raw, share = next(self.feed), self.done_share()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.policy.train()
        if share > FREEZE_SHARE:
            self.policy.model.backbone.eval()
        if share < SMALL_SHARE:
            for key in (image_key(camera) for camera in CAMERAS):
                raw[key] = nn.functional.interpolate(raw[key], scale_factor=SMALL_SCALE, mode="area")
        batch = self.processors[0](raw)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.policy.model.backbone.prepare([batch[image_key(c)] for c in CAMERAS])
            loss: Tensor = self.policy.forward(batch)[0]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def parts(self) -> tuple[Any, ...]:
        return ordinary(self.policy), *self.processors

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}


def main() -> None:
    parser = arguments(
        "Train LeRobot's ACT on the virtual cell's demonstrations.",
        out=".cache/virtual_pick/checkpoints",
        steps=30_000,
        minutes=75.0,
        rate=3e-4,
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ActTraining(args).run()


if __name__ == "__main__":
    main()
