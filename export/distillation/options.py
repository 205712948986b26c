"""What a person may choose of a distillation, and the limits that a student has to keep to be called one.

`understudy distill` fills `Options`; everything else reads it. `Limits` is in the table that the gate prints and in
the student's distillation.json, so that whoever looks at a verdict sees what it was held against.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.errors import ExportError

MOST_STEPS = 4  # more than that is what DDIM is for
ONE_STEP_WARNING = (
    "one step is unreliable: published one-step students reach 0 to 0.7 of their teachers' success where two-step ones "
    "come close to all of it (alexander-soare/consistency_policy, PushT and Transport); measure it on the arm"
)


@dataclass(frozen=True)
class Options:
    """`steps`: of the student's sampler. `skip`: levels of noise that the teacher's step covers. `minutes` counts all
    runs together. `timesteps`: of the sampler; None to have them chosen. Raises ExportError for what makes no sense."""

    steps: int = 2
    train_steps: int = 10_000
    minutes: float | None = None
    batch: int = 64
    lr: float = 1e-4
    threads: int = 2
    seed: int = 0
    skip: int = 10
    held_out: float = 0.1
    episodes_limit: int | None = None
    timesteps: tuple[int, ...] | None = None
    teacher_steps: int | None = None  # of DDIM in the gate; None: the teacher's own sampler
    conditions: int = 64  # observations that the gate looks at
    samples: int = 8  # that each of the two gives at every one of them

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise ExportError(
                f"--steps: expected 1 to {MOST_STEPS}, found {self.steps}; for more, the teacher "
                "with fewer steps of DDIM (`understudy export --fast`) does as well without any training"
            )
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ExportError(f"--timesteps: expected {self.steps}, as --steps says, found {list(self.timesteps)}")
        for name in ("train_steps", "batch", "threads", "skip", "conditions"):
            if getattr(self, name) < 1:
                raise ExportError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        if self.samples < 2:
            raise ExportError(f"--samples: expected at least 2, so that the teacher has others, found {self.samples}")
        if not self.lr > 0 or (self.minutes is not None and not self.minutes > 0):
            raise ExportError("--lr and --minutes: expected numbers above 0")


@dataclass(frozen=True)
class Limits:
    """A student fails above any of these. Distances are mean absolute differences in normalised actions, whose range
    is 2; jerk is the root mean square of the chunk's third difference, in the same. The floors are added to the
    limits, for teachers that are so sure of themselves that a ratio says nothing: jerk of 0.01 is a tremble of 0.002,
    a tenth of a degree in a joint that moves by 90, which is within the backlash of a small servo."""

    nearest_ratio: float = 1.5  # to the nearest of the teacher's samples, against the teacher's own to each other
    worst_ratio: float = 2.0  # the same, of the observations' 95th percentile: answers between two modes
    demonstrated_ratio: float = 1.15  # to what was demonstrated, against the teacher's
    jerk_ratio: float = 1.5  # against the teacher's, or the demonstration's where that is more
    floor: float = 0.005
    jerk_floor: float = 0.01
