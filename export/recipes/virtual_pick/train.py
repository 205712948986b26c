"""Train LeRobot's ACT on the demonstrations of `collect.py`, on a CPU, from scratch.

A person runs this with the Python of an environment that has LeRobot (0.4); what comes out is an ordinary LeRobot
checkpoint, policy and both processors, for `understudy export`. The network is LeRobot's own `ACTPolicy`; ours are
the loader (JPEG shards held in memory, decoded by one thread) and the speed: bfloat16, and both cameras through the
backbone as one batch. LeRobot's ACT normalises nothing in a backbone that starts from random weights, since its batch
norms are frozen; here they live while training, freeze for the last part of it, and are saved as the frozen ones.
Training saves its state at intervals and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import simplejpeg
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d  # type: ignore[import-not-found]  # in LeRobot's environment only

CAMERAS = ("front", "wrist")
JOINT_COUNT = 6
LONGEST_FRAMES = 420  # longer demonstrations are mostly the expert's own trouble
SMALL_SHARE, SMALL_SCALE = 0.5, 2 / 3  # the first part sees smaller pictures: twice as many steps in its time
FREEZE_SHARE = 0.8  # from here on batch norms use the statistics that inference will use
STATE_NOISE = 0.3  # units; about the backlash of a joint, and keeps the policy from copying its own state


@dataclasses.dataclass
class Demonstrations:
    """All shards in memory: JPEG bytes by frame and camera, states and actions, and where each episode ends."""

    jpegs: list[tuple[memoryview, ...]]
    state: np.ndarray  # [N, 6] float32
    action: np.ndarray  # [N, 6] float32
    last: np.ndarray  # [N] index of the last frame of the frame's episode
    image_hw: tuple[int, int]

    @staticmethod
    def load(folder: Path, limit: int | None = None) -> Demonstrations:
        jpegs: list[tuple[memoryview, ...]] = []
        states, actions, lasts = [], [], []
        image_hw = (0, 0)
        for path in sorted(folder.glob("shard_*[0-9].npz"))[:limit]:
            with np.load(path) as shard:
                blob, ends = memoryview(shard["jpeg"]), shard["jpeg_end"]
                state, action, episode_end = shard["state"], shard["action"], shard["episode_end"]
                height, width = shard["image_hw"]
                image_hw = (int(height), int(width))
            starts = np.concatenate([[0], ends.ravel()[:-1]]).reshape(ends.shape)
            for first, end in zip(np.concatenate([[0], episode_end[:-1]]), episode_end, strict=True):
                if end - first > LONGEST_FRAMES:
                    continue
                for i in range(first, end):
                    jpegs.append(tuple(blob[a:b] for a, b in zip(starts[i], ends[i], strict=True)))
                states.append(state[first:end])
                actions.append(action[first:end])
                lasts.append(np.full(end - first, len(jpegs) - 1))
        if not jpegs:
            raise FileNotFoundError(f"{folder}: no shard_*.npz here; run collect first")
        return Demonstrations(jpegs, np.concatenate(states), np.concatenate(actions), np.concatenate(lasts), image_hw)

    def images(self, index: np.ndarray, camera: int) -> Tensor:
        """uint8 [B, 3, H, W] in channels-last memory."""
        pictures = np.stack([simplejpeg.decode_jpeg(self.jpegs[i][camera]) for i in index])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def batch(self, index: np.ndarray, chunk: int) -> dict[str, Tensor]:
        """Raw observations and action chunks under LeRobot's names."""
        ahead = index[:, None] + np.arange(chunk)
        last = self.last[index][:, None]
        out = {
            "observation.state": torch.from_numpy(self.state[index]),
            "action": torch.from_numpy(self.action[np.minimum(ahead, last)]),
            # After its last frame the expert stays where it is: that is what the padding says, so it counts.
            "action_is_pad": torch.zeros(len(index), chunk, dtype=torch.bool),
        }
        for i, camera in enumerate(CAMERAS):
            out[f"observation.images.{camera}"] = self.images(index, i)
        return out

    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Mean, deviation and range of every feature, as LeRobot's processors want them."""

        def of(values: np.ndarray, axes: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
            parts = {
                "mean": values.mean(axes),
                "std": values.std(axes),
                "min": values.min(axes),
                "max": values.max(axes),
            }
            return {name: part.astype(np.float32).reshape(shape) for name, part in parts.items()}

        some = np.random.default_rng(0).choice(len(self.jpegs), min(1000, len(self.jpegs)), replace=False)
        stats = {
            "observation.state": of(self.state.astype(np.float64), (0,), (-1,)),
            "action": of(self.action.astype(np.float64), (0,), (-1,)),
        }
        for i, camera in enumerate(CAMERAS):
            pictures = self.images(some, i).numpy().astype(np.float64) / 255
            stats[f"observation.images.{camera}"] = of(pictures, (0, 2, 3), (3, 1, 1))
        return stats


def batches(data: Demonstrations, chunk: int, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches with light augmentation, prepared by one thread a few steps ahead."""
    ready: queue.Queue[dict[str, Tensor]] = queue.Queue(maxsize=4)

    def work() -> None:
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(data.jpegs))
            for first in range(0, len(order) - size + 1, size):
                batch = data.batch(order[first : first + size], chunk)
                noise = rng.normal(scale=STATE_NOISE, size=(size, JOINT_COUNT)).astype(np.float32)
                batch["observation.state"] = batch["observation.state"] + torch.from_numpy(noise)
                for camera in CAMERAS:
                    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (size, 1, 1, 1)).astype(np.float32))
                    key = f"observation.images.{camera}"
                    batch[key] = (batch[key].float() * (gain / 255)).clamp_(0, 1)
                ready.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


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
    images = {f"observation.images.{c}": PolicyFeature(FeatureType.VISUAL, (3, *image_hw)) for c in CAMERAS}
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


def save_checkpoint(folder: Path, policy: ACTPolicy, processors: tuple[Any, Any]) -> None:
    """A LeRobot checkpoint directory: complete, or not there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in (ordinary(policy), *processors):
        part.save_pretrained(temporary / "pretrained_model")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


class Training:
    """The loop and what it keeps between runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = Demonstrations.load(args.data, args.shards)
        self.config = make_config(self.data.image_hw, args.chunk)
        self.policy = trainable(self.config)
        self.processors = make_pre_post_processors(self.config, dataset_stats=self.data.statistics())
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=args.lr, weight_decay=1e-4, fused=True)
        self.step, self.spent_s = 0, 0.0
        self.state_file: Path = args.out / "training_state.pt"
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent_s = state["step"], state["spent_s"]
            print(f"goes on from step {self.step}", flush=True)
            # The statistics that the weights were trained with, also when data has been added since.
            last = args.out / "last" / "pretrained_model"
            self.processors = make_pre_post_processors(self.config, pretrained_path=str(last))

    def done_share(self) -> float:
        """How much of the training is behind us, 0..1, by steps or by minutes, whichever is further."""
        by_steps, by_minutes = self.step / self.args.steps, self.spent_s / (60 * self.args.minutes)
        return float(min(1.0, max(by_steps, by_minutes)))

    def learn(self, raw: dict[str, Tensor]) -> float:
        """One step of the optimiser on one raw batch. Returns the loss."""
        share = self.done_share()
        rate = self.args.lr * min(1.0, (self.step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.policy.train()
        if share > FREEZE_SHARE:
            self.policy.model.backbone.eval()
        if share < SMALL_SHARE:
            for key in (f"observation.images.{camera}" for camera in CAMERAS):
                raw[key] = nn.functional.interpolate(raw[key], scale_factor=SMALL_SCALE, mode="area")
        batch = self.processors[0](raw)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.policy.model.backbone.prepare([batch[f"observation.images.{c}"] for c in CAMERAS])
            loss: Tensor = self.policy.forward(batch)[0]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def save(self) -> None:
        folder = self.args.out / f"{self.step:06d}"
        save_checkpoint(folder, self.policy, self.processors)
        link = self.args.out / "last.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.rename(self.args.out / "last")
        state = {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self.state_file.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "spent_s": self.spent_s}, temporary)
        temporary.rename(self.state_file)
        print(f"saved {folder}", flush=True)

    def run(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        parameters = sum(p.numel() for p in self.policy.parameters()) / 1e6
        print(f"{len(self.data.jpegs)} frames, {parameters:.1f} M parameters", flush=True)
        feed = batches(self.data, self.args.chunk, self.args.batch, seed=self.step)
        losses: list[float] = []
        saved_s, began, printed = self.spent_s, time.monotonic(), self.step
        while self.done_share() < 1.0:
            losses.append(self.learn(next(feed)))
            self.step += 1
            if self.step % 100 == 0 or self.step == 20:
                took = time.monotonic() - began
                print(
                    f"step {self.step} loss {np.mean(losses):.4f} {(self.step - printed) / took:.2f} steps/s"
                    f" {self.done_share():.1%}",
                    flush=True,
                )
                self.spent_s += took
                losses, began, printed = [], time.monotonic(), self.step
                if self.spent_s - saved_s > 60 * self.args.save_minutes:
                    self.save()
                    saved_s = self.spent_s
        self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LeRobot's ACT on the virtual cell's demonstrations.")
    parser.add_argument("--data", type=Path, default=Path(".cache/virtual_pick/data"))
    parser.add_argument("--out", type=Path, default=Path(".cache/virtual_pick/checkpoints"))
    parser.add_argument("--steps", type=int, default=30_000, help="at most this many")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most this long, all runs together")
    parser.add_argument("--save-minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1, help="more than one helps on idle cores only")
    parser.add_argument("--shards", type=int, default=None, help="use only the first so many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Training(args).run()


if __name__ == "__main__":
    main()
