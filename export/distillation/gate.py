"""Whether a student may stand in for its teacher, by what both answer to observations that neither was fitted to.

For every observation the teacher and the student give K samples each. A student's sample is as good as the nearest of
the teacher's is close, held against how close the teacher's own samples lie to each other: this takes any of several
modes for right, and an answer between them for wrong. Distances to the demonstration and jerk are compared as well.
What a student typically loses, its variety, is measured and said, and is no reason to fail. No success rate follows
from any of this: that takes rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.distillation.options import Limits

Samples = NDArray[np.float32]
PERCENTILE = 95


@dataclass(frozen=True)
class Figures:
    """Of one of the two, in normalised actions, and by joint in joint units. See `measure` for what they are."""

    nearest: float
    worst: float
    demonstrated: float
    jerk: float
    spread: float
    nearest_joints: list[float]
    demonstrated_joints: list[float]
    jerk_joints: list[float]


@dataclass(frozen=True)
class Check:
    """One thing that was asked of the student: `found` must not exceed `limit`."""

    name: str
    teacher: float
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        return bool(self.found <= self.limit)


@dataclass(frozen=True)
class Verdict:
    """What the gate found. `hurried`: the teacher with as many steps of DDIM as the student has, where it was asked.
    `variety`: the student's spread over the teacher's, 1 where nothing was lost."""

    teacher: Figures
    student: Figures
    hurried: Figures | None
    demonstrated_jerk: float
    checks: tuple[Check, ...]
    variety: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def strain(self) -> float:
        """How close it came to failing: the largest share of a limit that was used, above 1 where it failed."""
        return max(check.found / check.limit if check.limit > 0 else float(check.found > 0) for check in self.checks)

    @property
    def objections(self) -> list[str]:
        return [
            f"{check.name} {check.found:.4g} is above {check.limit:.4g}" for check in self.checks if not check.passed
        ]


def judge(
    teacher: Samples,
    student: Samples,
    demonstrated: Samples,
    units: NDArray[np.float64],
    limits: Limits,
    hurried: Samples | None = None,
) -> Verdict:
    """`teacher`, `student`, `hurried` [N, K, H, A] and `demonstrated` [N, H, A], normalised; `units` [A]: joint units
    to one."""
    of_teacher = measure(teacher, teacher, demonstrated, units)
    of_student = measure(student, teacher, demonstrated, units)
    natural = float(jerk(demonstrated).mean())
    checks = (
        Check(
            "distance to the nearest teacher sample",
            of_teacher.nearest,
            of_student.nearest,
            limits.nearest_ratio * of_teacher.nearest + limits.floor,
        ),
        Check(
            f"the same, {PERCENTILE} % of observations",
            of_teacher.worst,
            of_student.worst,
            limits.worst_ratio * of_teacher.worst + limits.floor,
        ),
        Check(
            "distance to the demonstration",
            of_teacher.demonstrated,
            of_student.demonstrated,
            limits.demonstrated_ratio * of_teacher.demonstrated + limits.floor,
        ),
        Check(
            "jerk",
            of_teacher.jerk,
            of_student.jerk,
            limits.jerk_ratio * max(of_teacher.jerk, natural) + limits.jerk_floor,
        ),
    )
    variety = of_student.spread / of_teacher.spread if of_teacher.spread > 0 else 1.0
    of_hurried = None if hurried is None else measure(hurried, teacher, demonstrated, units)
    return Verdict(of_teacher, of_student, of_hurried, natural, checks, variety)


def measure(samples: Samples, teacher: Samples, demonstrated: Samples, units: NDArray[np.float64]) -> Figures:
    """Figures of `samples` [N, K, H, A]. Distances are mean absolute differences over a chunk.

    nearest: of sample k to the nearest of the teacher's but its k-th, so that both have as many to be near to; the mean
    over everything. worst: the mean over k, 95th percentile over observations. demonstrated: to the demonstration.
    jerk: root mean square of third differences. spread: mean distance of pairs of samples to the same observation.
    """
    between = _apart(samples, teacher)  # [N, K, K, A]
    total = between.mean(axis=3)
    own = np.eye(total.shape[1], dtype=bool)
    nearest = np.where(own, np.inf, total).argmin(axis=2)
    by_joint = np.take_along_axis(between, nearest[:, :, None, None], axis=2)[:, :, 0]  # [N, K, A]
    to_demonstration = np.abs(samples - demonstrated[:, None]).mean(axis=2)  # [N, K, A]
    pairs = _apart(samples, samples).mean(axis=3)[:, ~own]
    rough = jerk(samples)
    return Figures(
        nearest=float(by_joint.mean()),
        worst=float(np.percentile(by_joint.mean(axis=(1, 2)), PERCENTILE)),
        demonstrated=float(to_demonstration.mean()),
        jerk=float(rough.mean()),
        spread=float(pairs.mean()),
        nearest_joints=_in_units(by_joint, units),
        demonstrated_joints=_in_units(to_demonstration, units),
        jerk_joints=_in_units(rough, units),
    )


def jerk(chunks: Samples) -> NDArray[np.float64]:
    """Root mean square of the third difference over a chunk [..., H, A], by joint [..., A]; zeros below four actions.

    By Flash and Hogan 1985 (J. Neurosci. 5, 1688) what smooth reaching keeps small; here in one per action period
    cubed."""
    if chunks.shape[-2] < 4:
        return np.zeros(chunks.shape[:-2] + chunks.shape[-1:])
    third = np.diff(chunks.astype(np.float64), n=3, axis=-2)
    rough: NDArray[np.float64] = np.sqrt((third**2).mean(axis=-2))
    return rough


def _apart(a: Samples, b: Samples) -> NDArray[Any]:
    """Mean absolute differences over a chunk of every pair, by joint: [N, K, H, A] twice to [N, K, K, A]."""
    return np.stack([np.abs(a[:, :, None] - b[:, None, k : k + 1]).mean(axis=3)[:, :, 0] for k in range(b.shape[1])], 2)


def _in_units(values: NDArray[Any], units: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in values.reshape(-1, values.shape[-1]).mean(axis=0) * units]
