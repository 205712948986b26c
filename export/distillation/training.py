"""The training loop of a distillation: the UNet learns, everything else stands still.

`command` runs it between the features and the gate. Each step's draws come from the seed and the step's number alone,
so a training that was stopped and went on learns what it would have learnt in one go. It can be stopped at any moment:
state is kept every few minutes and on SIGINT and SIGTERM. On a CPU each thread takes a part of every batch.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.diffusion.consistency import consistency_function
from export.distillation.loss import LevelDraws, Levels, consistency_loss
from export.distillation.options import Options
from export.distillation.recorded import Recorded
from export.distillation.state import load_state, save_state
from export.distillation.teacher import Teacher
from export.distillation.workers import workers
from export.errors import ExportError

WARM_UP_STEPS = 100
LAST_RATE = 0.3  # of the learning rate, at the end of the cosine
AVERAGE_POWER, AVERAGE_MAX = 0.75, 0.9999  # Chi et al. 2023 (arXiv:2303.04137): its moving average, diffusers' EMAModel
SAVE_EVERY_S = 120.0
RECENT = 0.98  # of the loss that is shown, from before the last step

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Status:
    """Where a training stands: `loss` averaged over the last fifty steps or so, `seconds` of all runs together."""

    step: int
    share: float  # that is done, 0 to 1
    loss: float
    seconds: float


Report = Callable[[Status], None]


class Training:
    """One distillation. `folder` keeps its state; `belongs_to` says what else the state must have been kept for."""

    def __init__(
        self,
        teacher: Teacher,
        recorded: Recorded,
        options: Options,
        folder: Path,
        belongs_to: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._options, self._recorded, self._folder, self._device = options, recorded, folder, device
        self._belongs_to = dict(belongs_to)
        self._denoise = teacher.denoise
        self._levels = Levels.of(consistency_function(teacher.schedule), device)
        self._normalized = teacher.normalized
        self._teacher = {name: tensor.to(device) for name, tensor in teacher.weights.items()}
        self._draws = LevelDraws(self._levels.last)
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        state = load_state(folder, belongs_to)
        kept: Mapping[str, Weights] = {} if state is None else state["weights"]
        self._student = self._copied(kept.get("student", teacher.weights))
        self._average = self._copied(kept.get("average", teacher.weights))
        for leaf in self._student.values():
            leaf.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            list(self._student.values()), lr=options.lr, betas=(0.95, 0.999), weight_decay=1e-6
        )
        if state is not None:
            self._optimizer.load_state_dict(state["optimizer"])
            self._draws.remembered = state["level_losses"].numpy()
            self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]
        self._shares = 1 if device.type == "cuda" else min(options.threads, options.batch)

    @property
    def average(self) -> Weights:
        """The student: the moving average of what was learnt, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._average.items()}

    def run(self, report: Report, stopped: Callable[[], bool]) -> bool:
        """Learn until the steps or the minutes are spent; False where it `stopped` before.

        Either way the state is kept. Raises ExportError where it cannot be, and where the loss is not finite.
        """
        kept_at = time.monotonic()
        with workers(self._shares) as pool:
            while self.share < 1 and not stopped():
                began = time.monotonic()
                self._learn(pool)
                self.seconds += time.monotonic() - began
                report(self.status)
                if time.monotonic() - kept_at > SAVE_EVERY_S:
                    self.save()
                    kept_at = time.monotonic()
        self.save()
        return self.share >= 1

    @property
    def share(self) -> float:
        """How much is behind us, by steps or by minutes, whichever is further."""
        minutes = self._options.minutes
        by_time = 0.0 if minutes is None else self.seconds / (60 * minutes)
        return min(1.0, max(self.step / self._options.train_steps, by_time))

    @property
    def status(self) -> Status:
        return Status(self.step, self.share, self.loss, self.seconds)

    def save(self) -> None:
        save_state(
            self._folder,
            self._belongs_to,
            {
                "weights": {"student": self._student, "average": self._average},
                "optimizer": self._optimizer.state_dict(),
                "level_losses": torch.from_numpy(self._draws.remembered),
                "step": self.step,
                "seconds": self.seconds,
                "loss": self.loss,
            },
        )

    def _learn(self, pool: ThreadPoolExecutor) -> None:
        rng = np.random.default_rng([self._options.seed, self.step])
        index = self._recorded.draw(self._options.batch, rng)
        actions = torch.from_numpy(self._normalized(self._recorded.horizons(index)))
        epsilon = torch.from_numpy(rng.standard_normal(actions.shape, np.float32))
        n, factors = self._draws.draw(len(index), rng)
        batch = [self._recorded.conditions(index), actions, epsilon, n, factors]
        parts = [[part[i :: self._shares].to(self._device) for part in batch] for i in range(self._shares)]
        found = list(pool.map(self._gradients, parts))
        losses = torch.empty(len(index))
        for i, (loss, _) in enumerate(found):
            losses[i :: self._shares] = loss
        if not torch.isfinite(losses).all():
            raise ExportError(f"the loss is not finite at step {self.step}; try a lower --lr than {self._options.lr:g}")
        self._draws.saw(n, losses)
        self._follow([sum(parts) for parts in zip(*(gradients for _, gradients in found), strict=True)])
        self.step += 1
        weighted = float((losses * factors).mean())
        self.loss = RECENT * self.loss + (1 - RECENT) * weighted if self.step > 1 else weighted

    def _gradients(self, batch: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses [b] of a part of a batch, and its share of the whole batch's gradients."""
        condition, actions, epsilon, n, factors = batch
        losses = consistency_loss(
            self._levels,
            lambda x, t: self._denoise(self._student, x, t, condition),
            lambda x, t: self._denoise(self._teacher, x, t, condition),
            actions,
            epsilon,
            n,
            self._options.skip,
        )
        total = (losses * factors).sum() / self._options.batch
        return losses.detach().cpu(), torch.autograd.grad(total, list(self._student.values()))

    def _follow(self, gradients: list[Any]) -> None:
        """One step of the optimiser, and of the moving average after it."""
        leaves = list(self._student.values())
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        self._optimizer.step()
        keep = min(AVERAGE_MAX, 1 - (1 + self.step) ** -AVERAGE_POWER)
        with torch.no_grad():
            torch._foreach_lerp_(list(self._average.values()), leaves, 1 - keep)

    def _rate(self) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * self.share))
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        return self._options.lr * warm * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def _copied(self, weights: Mapping[str, Tensor]) -> Weights:
        return {name: tensor.detach().to(self._device, copy=True) for name, tensor in weights.items()}


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Within it, SIGINT and SIGTERM end nothing; the function says whether one of them came."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = {number: signal.signal(number, lambda *_: came.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
