"""The gate's verdict as a person reads it: a table of checks, one of joints, and what was lost in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from rich.console import Console
from rich.table import Table

from export.distillation.gate import Verdict

KEPT, REDUCED = 0.8, 0.5  # of the teacher's variety


def print_verdict(console: Console, verdict: Verdict, joints: Sequence[str]) -> None:
    """Everything that distillation.json has of the gate."""
    table = Table(title="The student against its teacher, on held-out episodes (normalised actions)")
    for column in ("", "teacher", "student", "limit", "", "teacher in as few steps"):
        table.add_column(column, justify="left" if not column else "right")
    hurried = verdict.hurried
    without = [] if hurried is None else [hurried.nearest, hurried.worst, hurried.demonstrated, hurried.jerk]
    for check, value in zip_longest(verdict.checks, without):
        row = [f"{value:.4f}" for value in (check.teacher, check.found, check.limit)]
        table.add_row(check.name, *row, "ok" if check.passed else "FAILED", "" if value is None else f"{value:.4f}")
    table.add_row("spread of the samples", f"{verdict.teacher.spread:.4f}", f"{verdict.student.spread:.4f}", "", "")
    table.caption = f"jerk of the demonstrations: {verdict.demonstrated_jerk:.4f}"
    console.print(table)
    by_joint = Table(title="By joint, in its own units: teacher, student")
    for column in ("", "nearest teacher sample", "demonstration", "jerk"):
        by_joint.add_column(column, justify="left" if not column else "right")
    teacher, student = verdict.teacher, verdict.student
    for i, joint in enumerate(joints):
        by_joint.add_row(
            joint,
            f"{teacher.nearest_joints[i]:.3f}  {student.nearest_joints[i]:.3f}",
            f"{teacher.demonstrated_joints[i]:.3f}  {student.demonstrated_joints[i]:.3f}",
            f"{teacher.jerk_joints[i]:.3f}  {student.jerk_joints[i]:.3f}",
        )
    console.print(by_joint)
    console.print(what_was_lost(verdict), highlight=False)


def what_was_lost(verdict: Verdict) -> str:
    """Variety, in a sentence, and what these figures do not say."""
    share = f"{100 * verdict.variety:.0f} % of its teacher's variety"
    if verdict.variety >= KEPT:
        lost = f"The student has {share}."
    elif verdict.variety >= REDUCED:
        lost = f"The student has {share}: it prefers some of the ways in which its teacher does the task."
    else:
        lost = f"The student has {share}: where its teacher knows several ways, it mostly takes one."
    return f"{lost} Success was not measured: that takes rollouts."
