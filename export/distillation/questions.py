"""The gate's questions, put to both networks: the same observations, the same samplers that will run on a device.

`command` asks once for the timesteps and once for the verdict, on different episodes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from export.diffusion.consistency import consistency
from export.diffusion.sampler import SamplerTable
from export.diffusion.solvers import ddim
from export.distillation.choosing import candidates, choose_timesteps
from export.distillation.gate import Samples, Verdict, judge
from export.distillation.options import Limits, Options
from export.distillation.recorded import Frames, Recorded
from export.distillation.sampling import Denoise, repeated
from export.distillation.teacher import Teacher

STUDENT_SEED, TEACHER_SEED = 1, 2  # added to the seed: each answers from noise of its own


class Questions:
    """`student`: the network's weights. Samples are the part of a horizon that an arm would execute, normalised."""

    def __init__(
        self, teacher: Teacher, student: Mapping[str, Tensor], options: Options, limits: Limits, device: torch.device
    ) -> None:
        self._teacher, self._options, self._limits, self._device = teacher, options, limits, device
        self._ask_teacher = teacher.with_weights(teacher.weights, device)
        self._ask_student = teacher.with_weights(student, device)
        self._table = teacher.table(options.teacher_steps)
        self.teacher_sampler = f"{self._table.solver}, {self._table.steps} steps, {self._table.spacing}"

    def timesteps(self, recorded: Recorded) -> tuple[tuple[int, ...], dict[str, float]]:
        """Those that were asked for, or the best of a few, with how each of these did."""
        schedule = self._teacher.schedule
        if self._options.timesteps is not None:
            return self._options.timesteps, {}
        frames = recorded.spread(self._options.conditions, self._options.seed)
        teacher, demonstrated = self._of_teacher(recorded, frames, self._table), self._demonstrated(recorded, frames)
        return choose_timesteps(
            candidates(self._options.steps, schedule.num_train_timesteps),
            lambda times: judge(
                teacher,
                self._of_student(recorded, frames, times),
                demonstrated,
                self._teacher.units,
                self._limits,
            ),
        )

    def verdict(self, recorded: Recorded, timesteps: tuple[int, ...]) -> Verdict:
        """What the gate finds, with the teacher in as few steps beside it."""
        frames = recorded.spread(self._options.conditions, self._options.seed + 1)
        return judge(
            self._of_teacher(recorded, frames, self._table),
            self._of_student(recorded, frames, timesteps),
            self._demonstrated(recorded, frames),
            self._teacher.units,
            self._limits,
            self._of_teacher(recorded, frames, ddim(self._teacher.schedule, len(timesteps))),
        )

    def _of_teacher(self, recorded: Recorded, frames: Frames, table: SamplerTable) -> Samples:
        return self._samples(self._ask_teacher, table, recorded, frames, TEACHER_SEED)

    def _of_student(self, recorded: Recorded, frames: Frames, timesteps: tuple[int, ...]) -> Samples:
        table = consistency(self._teacher.schedule, timesteps)
        return self._samples(self._ask_student, table, recorded, frames, STUDENT_SEED)

    def _samples(self, ask: Denoise, table: SamplerTable, recorded: Recorded, frames: Frames, seed: int) -> Samples:
        conditions = recorded.conditions(frames).to(self._device)
        found = repeated(
            ask,
            table,
            conditions,
            self._options.samples,
            self._teacher.shape,
            seed=self._options.seed + seed,
            threads=self._options.threads if self._device.type == "cpu" else 1,
        )
        return self._teacher.chunk(found)

    def _demonstrated(self, recorded: Recorded, frames: Frames) -> Samples:
        found: Samples = self._teacher.chunk(self._teacher.normalized(recorded.horizons(frames))).astype(np.float32)
        return found
