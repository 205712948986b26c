"""Joint names and units of a policy: what a checkpoint does not say, and how far it can be checked.

A checkpoint holds vectors without names or units, and the same SO-101 policy may have been trained in degrees (LeRobot
since 0.4.4) or in range_m100_100 (before), an ALOHA's in radians; an arm fed with the wrong one moves to other places.
`export` asks for both here and holds them against the statistics of the training data, which rule out the worst
confusion. A bundle speaks the three units of LeRobot's motors, so a policy that was trained in others gets its
normalisation multiplied, which costs the graph nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TypeVar

import numpy as np

from device.arrays import Array
from device.bundle import ACTION, STATE, Joint
from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.normalize import Normalizer, Statistics
from export.policy import Policy
from firmware_bridge.calibration import Unit

SO101_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
SLACK = 1.001  # float32 statistics of values that were clamped to +-100


class TrainedIn(str, Enum):
    """What a joint's numbers were in training."""

    degrees = "degrees"
    range_m100_100 = "range_m100_100"
    range_0_100 = "range_0_100"
    radians = "radians"  # degrees in the bundle
    range_0_1 = "range_0_1"  # range_0_100 in the bundle; ALOHA's grippers


# What the bundle speaks instead, and by how much the numbers grow.
_CONVERTED = {
    TrainedIn.radians: (Unit.degrees, 180 / math.pi),
    TrainedIn.range_0_1: (Unit.range_0_100, 100.0),
}
# A gripper's unit where it does not say: all LeRobot arms have it in percent, ALOHA has parts of one beside radians.
_GRIPPER = {TrainedIn.radians: TrainedIn.range_0_1}

P = TypeVar("P", bound=Policy)


def in_bundle_units(source: Checkpoint, policy: P, joints: Sequence[str] | None, units: TrainedIn) -> P:
    """The policy with state and action in the units of `name_joints`' joints; `source`'s statistics go along.
    Raises ExportError where the state has not one value a joint."""
    factors = bundle_factors(joints, policy.action_size, units)
    if (factors == 1).all():
        return policy
    if policy.inputs.state_size != len(factors):
        raise ExportError(
            f"{source.path}: the state has {policy.inputs.state_size} values and the action {len(factors)}, so it is "
            "not known which of the state's are radians; only a state with one value a joint can be converted"
        )
    normalizers = dict(policy.normalizers)
    for name in (STATE, ACTION):
        found = normalizers[name]
        mode = "MEAN_STD" if found.is_identity else found.mode
        normalizers[name] = Normalizer(mode, found.offset * factors, found.scale * factors)
        if name in source.statistics:
            source.statistics[name] = {key: values * factors for key, values in source.statistics[name].items()}
    return dataclasses.replace(policy, normalizers=normalizers)  # type: ignore[type-var]  # every policy is a dataclass


def bundle_factors(joints: Sequence[str] | None, size: int, units: TrainedIn) -> Array:
    """float64 [size]: by how much a joint's numbers grow from training, and from what was recorded for it, to the
    bundle."""
    return np.array([_CONVERTED.get(trained, (None, 1.0))[1] for _, trained in _named(joints, size, units)])


def name_joints(joints: Sequence[str] | None, size: int, units: TrainedIn | Unit) -> tuple[Joint, ...]:
    """Joints in action order, in the bundle's units. `joints` holds names, or NAME=UNIT for one that differs from
    `units`, the training's.

    Grippers are range_0_100 unless they say otherwise, as in every LeRobot arm, and range_0_1 where `units` are
    radians, as in ALOHA. Without `joints`, six actions are an SO-100 or SO-101. Raises ExportError.
    """
    named = _named(joints, size, TrainedIn(units.value))
    return tuple(
        Joint(name=name, unit=_CONVERTED[trained][0] if trained in _CONVERTED else Unit(trained.value))
        for name, trained in named
    )


def _named(joints: Sequence[str] | None, size: int, units: TrainedIn) -> list[tuple[str, TrainedIn]]:
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
    named = [_joint(entry, units) for entry in entries]
    names = [name for name, _ in named]
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


def _joint(entry: str, units: TrainedIn) -> tuple[str, TrainedIn]:
    name, equals, unit = entry.partition("=")
    if equals:
        try:
            return name, TrainedIn(unit)
        except ValueError:
            known = ", ".join(member.value for member in TrainedIn)
            raise ExportError(f"--joints: {entry!r}: unit {unit!r} is unknown; known are {known}") from None
    is_gripper = name == "gripper" or name.endswith("_gripper")
    return name, _GRIPPER.get(units, TrainedIn.range_0_100) if is_gripper else units


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
