"""What both trainings of this recipe have in common: the loop, its log, and what they leave behind.

`train.py` and `train_diffusion.py` say how one step learns and what a checkpoint is made of; the rest is here. Progress
counts by steps or by minutes, whichever is further, and the learning rate follows it. A checkpoint folder is complete
or not there at all, and the state file and the link to the last checkpoint are replaced in one step each, so that a
training may be killed at any moment and goes on when it is started again with the same `--out`. The layout is
LeRobot's: `<step>/pretrained_model/` holds the policy and both processors.
"""

from __future__ import annotations

import abc
import argparse
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE_FILE, PRETRAINED, LAST = "training_state.pt", "pretrained_model", "last"
WARM_UP_STEPS = 300


def arguments(description: str, out: str, steps: int, minutes: float, rate: float) -> argparse.ArgumentParser:
    """A parser with the options that both trainings take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path(".cache/virtual_pick/data"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--steps", type=int, default=steps, help="at most this many")
    parser.add_argument("--minutes", type=float, default=minutes, help="at most this long, all runs together")
    parser.add_argument("--save-minutes", type=float, default=8.0)
    parser.add_argument("--lr", type=float, default=rate)
    parser.add_argument("--threads", type=int, default=1, help="more than one helps on idle cores only")
    parser.add_argument("--shards", type=int, default=None, help="use only the first so many")
    return parser


class Training(abc.ABC):
    """A training that can be stopped and started. What is kept of it lies in `args.out`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.step, self.spent_s = 0, 0.0

    @abc.abstractmethod
    def learn(self) -> float:
        """One step of the optimiser. Returns the loss."""

    @abc.abstractmethod
    def parts(self) -> Iterable[Any]:
        """What a checkpoint is made of: the policy and its processors, each with LeRobot's save_pretrained."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """What the training needs in order to go on, besides steps and seconds."""

    def kept_state(self) -> dict[str, Any] | None:
        """What an earlier run kept, after taking over its steps and seconds; None where there was none."""
        path = self.args.out / STATE_FILE
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.step, self.spent_s = state["step"], state["spent_s"]
        print(f"goes on from step {self.step}", flush=True)
        return state

    def last_checkpoint(self) -> str:
        """The newest complete checkpoint."""
        return str(self.args.out / LAST / PRETRAINED)

    def done_share(self) -> float:
        """How much of the training is behind us, 0..1, by steps or by minutes, whichever is further."""
        by_steps, by_minutes = self.step / self.args.steps, self.spent_s / (60 * self.args.minutes)
        return float(min(1.0, max(by_steps, by_minutes)))

    def rate(self) -> float:
        """The learning rate of this step: a short warm-up, then half a cosine down to a hundredth."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.done_share()))
        return float(self.args.lr * min(1.0, (self.step + 1) / WARM_UP_STEPS) * (0.01 + 0.99 * cosine))

    def save(self) -> None:
        """A checkpoint of this step, the link to it, and the state."""
        out: Path = self.args.out
        folder = out / f"{self.step:06d}"
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        for part in self.parts():
            part.save_pretrained(temporary / PRETRAINED)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        link = out / f"{LAST}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.rename(out / LAST)
        kept = out / f"{STATE_FILE}.tmp"
        torch.save({**self.state(), "step": self.step, "spent_s": self.spent_s}, kept)
        kept.rename(out / STATE_FILE)
        print(f"saved {folder}", flush=True)

    def run(self) -> None:
        """Learn until the steps or the minutes are spent; a line every hundred steps, a checkpoint at intervals."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        losses: list[float] = []
        saved_s, began, printed = self.spent_s, time.monotonic(), self.step
        while self.done_share() < 1.0:
            losses.append(self.learn())
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
