"""Normalisation as LeRobot defines it, reduced to one affine form that a graph can hold.

Every mode (MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10, IDENTITY) is `(x - offset) / scale` on the way in and
`y * scale + offset` on the way out; the checkpoint readers call `normalizer` once per feature. Formulae:
lerobot/processor/normalize_processor.py, `_apply_transform` (0.4.4). LeRobot lets a feature whose statistics are
missing pass through unchanged and divides by 1e-8 where a spread is zero; an arm that moves by such numbers is
dangerous, so both are refused here, and so is anything that is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.errors import ExportError

Vector = np.ndarray[Any, np.dtype[np.float64]]
Statistics = Mapping[str, Vector]  # statistic -> values, flat

# mode -> the two statistics that it needs
MODES: dict[str, tuple[str, str] | None] = {
    "IDENTITY": None,
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
ROUNDING = 1e-6  # a spread below this part of the values themselves is float32 rounding, not motion


@dataclass(frozen=True)
class Normalizer:
    """normalised = (raw - offset) / scale; both float64 [n], in the feature's unit (images: [3], pixel range 0..1)."""

    mode: str
    offset: Vector
    scale: Vector

    @property
    def is_identity(self) -> bool:
        return self.mode == "IDENTITY"


def identity(size: int) -> Normalizer:
    return Normalizer("IDENTITY", np.zeros(size), np.ones(size))


def normalizer(
    feature: str, mode: str, statistics: Statistics | None, size: int, *, eps: float, inverse: bool, where: str
) -> Normalizer:
    """The affine form of one feature's normalisation.

    `eps` is added to a std on the way in only (`inverse` False), as LeRobot does. `where` names the file for messages.
    Raises ExportError where a statistic is missing, of another size, not finite, or without spread.
    """
    if not isinstance(mode, str) or mode not in MODES:
        known = ", ".join(MODES)
        raise ExportError(f"{where}: {feature}: normalisation {mode} is not supported; supported are {known}")
    names = MODES[mode]
    if names is None:
        return identity(size)
    first, second = (_statistic(feature, name, statistics, size, where) for name in names)
    if mode == "MEAN_STD":
        offset, scale = first, second
    else:
        offset, scale = (first + second) / 2, (second - first) / 2
    _refuse_no_spread(feature, names, offset, scale, where)
    if mode == "MEAN_STD" and not inverse:
        scale = scale + eps
    return Normalizer(mode, offset, scale)


def _statistic(feature: str, name: str, statistics: Statistics | None, size: int, where: str) -> Vector:
    if statistics is None:
        raise ExportError(
            f"{where}: {feature} has no statistics, so LeRobot would pass it through unnormalised; train with a "
            f"dataset that has them, or say that this is meant with --allow-unnormalized {feature}"
        )
    if name not in statistics:
        raise ExportError(f"{where}: {feature}.{name} is missing; found {', '.join(sorted(statistics)) or 'nothing'}")
    values = statistics[name].astype(np.float64).reshape(-1)
    if values.size != size:
        raise ExportError(f"{where}: {feature}.{name} should hold {size} values, found {values.size}")
    if not np.isfinite(values).all():
        raise ExportError(f"{where}: {feature}.{name} holds NaN or infinity: {np.array2string(values, precision=4)}")
    return values


def _refuse_no_spread(feature: str, names: tuple[str, str], offset: Vector, scale: Vector, where: str) -> None:
    flat = np.flatnonzero(scale <= ROUNDING * np.maximum(1.0, np.abs(offset)))
    if flat.size:
        what = "std is zero" if names[1] == "std" else f"{names[1]} is not above {names[0]}"
        raise ExportError(
            f"{where}: {feature}: {what} in element {flat[0]}: it never changed in training, so its normalisation "
            "divides by zero; train again without it, or with correct statistics"
        )
