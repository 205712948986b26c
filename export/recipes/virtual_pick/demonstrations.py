"""The demonstrations of `collect.py` as a training reads them: whole, in memory, one decoded batch ahead.

`train.py` and `train_diffusion.py` load every shard once and then draw frames by number. The pictures stay JPEG until
a batch needs them and are decoded by one thread, which is faster than any training step here. What lies before an
episode's first frame or after its last one is that frame again: the arm rests there, so the copies are true. The
statistics are those that LeRobot's processors ask for.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
import torch
from torch import Tensor

CAMERAS = ("front", "wrist")
JOINT_COUNT = 6
LONGEST_FRAMES = 420  # longer demonstrations are mostly the expert's own trouble
STATE_NOISE = 0.3  # units; about the backlash of a joint, and keeps the policy from copying its own state

T = TypeVar("T")


def image_key(camera: str) -> str:
    """LeRobot's name for a camera's pictures."""
    return f"observation.images.{camera}"


@dataclasses.dataclass
class Demonstrations:
    """All shards in memory: JPEG bytes by frame and camera, states and actions, and where each episode lies."""

    jpegs: list[tuple[memoryview, ...]]
    state: np.ndarray  # [N, 6] float32
    action: np.ndarray  # [N, 6] float32
    first: np.ndarray  # [N] index of the first frame of the frame's episode
    last: np.ndarray  # [N] index of the last frame of the frame's episode
    image_hw: tuple[int, int]

    @staticmethod
    def load(folder: Path, limit: int | None = None) -> Demonstrations:
        """Every shard in `folder`, or the first `limit`. Raises FileNotFoundError where there is none."""
        jpegs: list[tuple[memoryview, ...]] = []
        states, actions, firsts, lasts = [], [], [], []
        image_hw = (0, 0)
        for path in sorted(folder.glob("shard_*[0-9].npz"))[:limit]:
            with np.load(path) as shard:
                blob, ends = memoryview(shard["jpeg"]), shard["jpeg_end"]
                state, action, episode_end = shard["state"], shard["action"], shard["episode_end"]
                height, width = shard["image_hw"]
                image_hw = (int(height), int(width))
            starts = np.concatenate([[0], ends.ravel()[:-1]]).reshape(ends.shape)
            for begin, end in zip(np.concatenate([[0], episode_end[:-1]]), episode_end, strict=True):
                if end - begin > LONGEST_FRAMES:
                    continue
                firsts.append(np.full(end - begin, len(jpegs)))
                for i in range(begin, end):
                    jpegs.append(tuple(blob[a:b] for a, b in zip(starts[i], ends[i], strict=True)))
                lasts.append(np.full(end - begin, len(jpegs) - 1))
                states.append(state[begin:end])
                actions.append(action[begin:end])
        if not jpegs:
            raise FileNotFoundError(f"{folder}: no shard_*.npz here; run collect first")
        state, action, first, last = (np.concatenate(parts) for parts in (states, actions, firsts, lasts))
        return Demonstrations(jpegs, state, action, first, last, image_hw)

    def __len__(self) -> int:
        return len(self.jpegs)

    def frames(self, index: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The frames [B, S] that lie `offsets` [S] away from `index` [B], held at the ends of the episode."""
        there = index[:, None] + offsets
        return np.asarray(np.clip(there, self.first[index][:, None], self.last[index][:, None]))

    def images(self, index: np.ndarray, camera: int) -> Tensor:
        """uint8 [B, 3, H, W] in channels-last memory."""
        pictures = np.stack([simplejpeg.decode_jpeg(self.jpegs[i][camera]) for i in index])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def noisy_state(self, frames: np.ndarray, rng: np.random.Generator) -> Tensor:
        """The joints at `frames` (any shape), read about as inexactly as a real arm's."""
        state = self.state[frames]
        return torch.from_numpy(state + rng.normal(scale=STATE_NOISE, size=state.shape).astype(np.float32))

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

        some = np.random.default_rng(0).choice(len(self), min(1000, len(self)), replace=False)
        stats = {
            "observation.state": of(self.state.astype(np.float64), (0,), (-1,)),
            "action": of(self.action.astype(np.float64), (0,), (-1,)),
        }
        for i, camera in enumerate(CAMERAS):
            pictures = self.images(some, i).numpy().astype(np.float64) / 255
            stats[image_key(camera)] = of(pictures, (0, 2, 3), (3, 1, 1))
        return stats


def gains(count: int, rng: np.random.Generator) -> Tensor:
    """A brightness for each of `count` observations, [count, 1, 1, 1]: cameras expose as they like."""
    return torch.from_numpy(rng.uniform(0.85, 1.15, (count, 1, 1, 1)).astype(np.float32))


def brightened(pictures: Tensor, gain: Tensor) -> Tensor:
    """uint8 pictures as float32 in 0..1, times `gain`."""
    return (pictures.float() * (gain / 255)).clamp_(0, 1)


def shuffled(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of `size` frame numbers below `count`: every frame once, then all in another order."""
    while True:
        order = rng.permutation(count)
        for begin in range(0, count - size + 1, size):
            yield order[begin : begin + size]


def ahead(items: Iterable[T], depth: int = 4) -> Iterator[T]:
    """The same endless items, made by a thread of their own, up to `depth` ahead of who asks for them."""
    source = iter(items)
    with ThreadPoolExecutor(max_workers=1) as maker:
        waiting = deque(maker.submit(next, source) for _ in range(depth))
        while True:
            item = waiting.popleft().result()
            waiting.append(maker.submit(next, source))
            yield item
