"""The training recipe, without LeRobot: what a batch is made of, and that a training goes on where it stopped."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from export.recipes.virtual_pick.demonstrations import CAMERAS, LONGEST_FRAMES, Demonstrations, ahead, shuffled
from export.recipes.virtual_pick.training import Training

EPISODES = (3, LONGEST_FRAMES + 1, 2)  # frames; the second is too long to learn from


def write_shard(path: Path) -> None:
    count = sum(EPISODES)
    pictures = [np.full((8, 8, 3), i % 200, np.uint8) for i in range(count) for _ in CAMERAS]
    jpegs = [simplejpeg.encode_jpeg(picture) for picture in pictures]
    joints = np.repeat(np.arange(count, dtype=np.float32)[:, None], 6, axis=1)
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(jpegs), np.uint8),
        jpeg_end=np.cumsum([len(jpeg) for jpeg in jpegs]).reshape(-1, len(CAMERAS)),
        state=joints,
        action=joints + 0.5,
        episode_end=np.cumsum(EPISODES),
        image_hw=np.array([8, 8]),
    )


@pytest.fixture
def demonstrations(tmp_path: Path) -> Demonstrations:
    write_shard(tmp_path / "shard_100000.npz")
    return Demonstrations.load(tmp_path)


def test_episodes_that_take_too_long_are_left_out(demonstrations: Demonstrations) -> None:
    assert len(demonstrations) == 5
    second = sum(EPISODES[:2])
    assert demonstrations.state[:, 0].tolist() == [0, 1, 2, second, second + 1]
    picture = demonstrations.images(np.array([3]), 1)
    assert abs(float(picture.float().mean()) - second % 200) < 2


def test_what_lies_beyond_an_episode_is_its_first_or_last_frame(demonstrations: Demonstrations) -> None:
    frames = demonstrations.frames(np.array([0, 2, 3]), np.arange(-1, 3))
    assert frames.tolist() == [[0, 0, 1, 2], [1, 2, 2, 2], [3, 3, 4, 4]]


def test_shuffling_shows_every_frame_once_before_any_twice() -> None:
    feed = shuffled(6, 2, np.random.default_rng(0))
    assert sorted(np.concatenate([next(feed) for _ in range(3)])) == list(range(6))


def test_a_loader_that_fails_fails_the_training() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("a picture cannot be decoded")

    feed = ahead(items(), depth=1)
    assert next(feed) == 1
    with pytest.raises(ValueError, match="cannot be decoded"):
        next(feed)


class Part:
    """What the loop knows of a policy."""

    def __init__(self, value: float) -> None:
        self.value = value

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "value").write_text(str(self.value))


class Counting(Training):
    """Learns by adding one."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        state = self.kept_state()
        self.value = torch.zeros(()) if state is None else state["value"]

    def learn(self) -> float:
        self.value = self.value + 1
        return self.rate()

    def parts(self) -> list[Part]:
        return [Part(float(self.value))]

    def state(self) -> dict[str, Any]:
        return {"value": self.value}


def counted(out: Path, steps: int) -> Counting:
    args = argparse.Namespace(out=out, steps=steps, minutes=float("inf"), save_minutes=60.0, lr=1.0)
    training = Counting(args)
    training.run()
    return training


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    counted(tmp_path, 3)
    again = counted(tmp_path, 5)
    assert (again.step, float(again.value)) == (5, 5.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003", "000005", "last", "training_state.pt"]
    assert (Path(again.last_checkpoint()) / "value").read_text() == "5.0"


def test_the_learning_rate_comes_up_and_goes_down(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, steps=1000, minutes=float("inf"), lr=1.0)
    training = Counting(args)
    rates = []
    for training.step in range(1000):
        rates.append(training.rate())
    assert rates[0] < 0.01 and max(rates) > 0.7 and rates[-1] < 0.02
