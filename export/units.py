"""Joint names and units of a policy: what a LeRobot checkpoint does not say, and how far it can be checked.

A checkpoint holds vectors without names or units, and the same SO-101 policy may have been trained in degrees (LeRobot
since 0.4.4) or in range_m100_100 (before); an arm fed with the wrong one moves to other places. `export` asks for
both here and holds them against the statistics of the training data, which rule out the worst confusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from device.bundle import Joint
from export.errors import ExportError
from export.normalize import Statistics
from firmware_bridge.calibration import Unit

SO101_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
SLACK = 1.001  # float32 statistics of values that were clamped to +-100


def name_joints(joints: Sequence[str] | None, size: int, units: Unit) -> tuple[Joint, ...]:
    """Joints in action order. `joints` holds names, or NAME=UNIT for one that differs from `units`.

    Grippers are range_0_100 unless they say otherwise, as in every LeRobot arm. Without `joints`, six actions are an
    SO-100 or SO-101. Raises ExportError.
    """
    entries = [entry.strip() for part in joints or () for entry in part.split(",")]
    if not entries:
        if size != len(SO101_JOINTS):
            raise ExportError(
                f"the policy has {size} actions, and a checkpoint does not say which joints they are: "
                "name them in order with --joints"
            )
        entries = list(SO101_JOINTS)
    if len(entries) != size:
        raise ExportError(f"--joints names {len(entries)} joints, but the policy has {size} actions")
    named = tuple(_joint(entry, units) for entry in entries)
    names = [joint.name for joint in named]
    if len(set(names)) != len(names) or "" in names:
        raise ExportError(f"--joints has a name that is empty or given twice: {', '.join(names)}")
    return named


def check_units(joints: Sequence[Joint], statistics: Mapping[str, Statistics], where: str) -> None:
    """Raise ExportError where a joint's training data cannot have been in a range that ends at 100."""
    for feature, found in statistics.items():
        for index, joint in enumerate(joints):
            if joint.unit is Unit.degrees:
                continue
            for name in ("min", "max", "mean", "q01", "q99", "q10", "q90"):
                value = _element(found, name, index)
                if value is not None and abs(value) > 100 * SLACK:
                    raise _contradiction(where, feature, joint, f"{name} is {value:.1f}")
            mean, std = _element(found, "mean", index), _element(found, "std", index)
            # E[x^2] = mean^2 + std^2 cannot exceed 100^2 when every |x| <= 100
            if mean is not None and std is not None and np.hypot(mean, std) > 100 * SLACK:
                raise _contradiction(where, feature, joint, f"mean {mean:.1f} with std {std:.1f} is impossible there")


def _joint(entry: str, units: Unit) -> Joint:
    name, equals, unit = entry.partition("=")
    if equals:
        try:
            return Joint(name=name, unit=Unit(unit))
        except ValueError:
            known = ", ".join(member.value for member in Unit)
            raise ExportError(f"--joints: {entry!r}: unit {unit!r} is unknown; known are {known}") from None
    is_gripper = name == "gripper" or name.endswith("_gripper")
    return Joint(name=name, unit=Unit.range_0_100 if is_gripper else units)


def _element(statistics: Statistics, name: str, index: int) -> float | None:
    values = statistics.get(name)
    if values is None or index >= values.size:
        return None
    value = float(values.reshape(-1)[index])
    return value if np.isfinite(value) else None


def _contradiction(where: str, feature: str, joint: Joint, found: str) -> ExportError:
    return ExportError(
        f"{where}: {feature} of joint {joint.name}: {found}, but {joint.unit.value} ends at 100; the policy was "
        "trained in other units: correct --units (or the joint's own, --joints NAME=UNIT)"
    )
