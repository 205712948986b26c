"""The gate of a distillation: any of the teacher's modes is right, between them is wrong, and what was lost is said."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="distillation needs the export extra")

from export.distillation.gate import judge
from export.distillation.options import Limits
from export.distillation.report import what_was_lost

UNITS = np.array([10.0, 20.0])


def two_modes(seed: int, count: int = 8, noise: float = 0.01) -> np.ndarray:
    """Samples [30, count, 12, 2] of a policy that goes to one of two sides along a smooth curve."""
    rng = np.random.default_rng(seed)
    side = rng.choice([-1.0, 1.0], (30, count, 1, 1))
    curve = np.sin(np.linspace(0, 1, 12))[:, None] * np.ones(2)
    return (0.5 * side * curve + rng.normal(scale=noise, size=(30, count, 12, 2))).astype(np.float32)


TEACHER, STUDENT, DEMONSTRATED = two_modes(0), two_modes(1), two_modes(2, count=1)[:, 0]


def test_the_gate_passes_a_student_that_answers_as_its_teacher_does() -> None:
    verdict = judge(TEACHER, STUDENT, DEMONSTRATED, UNITS, Limits())
    assert verdict.passed and verdict.objections == []
    assert verdict.strain < 1
    assert verdict.variety == pytest.approx(1, abs=0.15)


def test_the_gate_fails_a_student_between_the_modes() -> None:
    student = np.zeros((30, 8, 12, 2), np.float32)
    verdict = judge(TEACHER, student, DEMONSTRATED, UNITS, Limits())
    assert not verdict.passed and verdict.strain > 1
    assert any("nearest teacher sample" in objection for objection in verdict.objections)


def test_the_gate_fails_a_student_that_is_between_the_modes_in_a_tenth_of_all_observations() -> None:
    student = STUDENT.copy()
    student[:3] = 0
    verdict = judge(TEACHER, student, DEMONSTRATED, UNITS, Limits())
    assert any("95 %" in objection for objection in verdict.objections)


def test_the_gate_fails_a_student_that_trembles() -> None:
    verdict = judge(TEACHER, two_modes(1, noise=0.02), DEMONSTRATED, UNITS, Limits(nearest_ratio=3, worst_ratio=3))
    assert [objection.split()[0] for objection in verdict.objections] == ["jerk"]


def test_a_student_that_lost_a_mode_passes_and_it_is_said() -> None:
    student = np.where(STUDENT.mean(axis=(2, 3), keepdims=True) < 0, -STUDENT, STUDENT)
    verdict = judge(TEACHER, student, DEMONSTRATED, UNITS, Limits())
    assert verdict.passed
    assert verdict.variety < 0.2
    assert "mostly takes one" in what_was_lost(verdict)


def test_figures_by_joint_are_in_the_joints_units() -> None:
    one_mode = np.abs(TEACHER)
    student = one_mode + np.array([0.0, 0.1], np.float32)
    verdict = judge(one_mode, student, DEMONSTRATED, UNITS, Limits())
    first, second = verdict.student.nearest_joints
    assert second == pytest.approx(0.1 * 20, rel=0.1)
    assert first == pytest.approx(verdict.teacher.nearest_joints[0], rel=0.2)
