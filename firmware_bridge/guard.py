"""The last thing before the bus, in every mode: turns whatever it is given into something safe, or says why it cannot.

`execute` owns one Guard and passes every goal through `limit` and every reading through `check`; there is no other way
to the servos. `limit` never raises and never lets through a goal outside the position limits, a speed above the
joint's, or an acceleration above the joint's: without a usable request it decelerates and holds. `check` returns the
reason for a fault, once it has lasted; the caller then enters fault and holds. No clock, file or bus in here: values
and times come in as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# STS3215 status byte: input voltage, angle sensor, overheat, overcurrent, overload (memory table, address 65).
ERROR_NAMES = {1: "voltage", 2: "angle sensor", 4: "overheating", 8: "overcurrent", 32: "overload"}


class Intervention(IntFlag):
    """How the guard changed what it was given, in one tick."""

    NONE = 0
    STALE = 1  # nothing was asked for: decelerated or held
    NOT_FINITE = 2
    POSITION = 4
    SPEED = 8
    ACCELERATION = 16


@dataclass(frozen=True)
class GuardLimits:
    """Per joint [J] in joint units (and per s, s^2); the rest for the whole arm."""

    position_min: Floats
    position_max: Floats
    max_speed: Floats
    max_acceleration: Floats
    max_load: float = 0.9  # fraction of stall torque
    load_s: float = 1.0  # for so long
    max_temperature_c: float = 65.0
    min_voltage_v: float = 4.5
    max_voltage_v: float = 13.0
    silent_s: float = 0.5  # a servo that has not answered for so long
    follow_error: float = 30.0  # joint units between goal and position ...
    follow_s: float = 0.7  # ... for so long: blocked, torque off, or a gear has gone
    error_s: float = 0.1  # an error bit that has been set for so long


class Guard:
    """Limits motion tick by tick. Attributes: interventions (of the last tick); goal, velocity [J] (last sent)."""

    def __init__(self, names: Sequence[str], limits: GuardLimits, period_s: float) -> None:
        self.limits = limits
        self.interventions = Intervention.NONE
        self.goal: Floats = np.zeros(len(names))
        self.velocity: Floats = np.zeros(len(names))
        self._names = tuple(names)
        self._dt = period_s
        self._last_request: Floats | None = None
        self._since: dict[str, NDArray[np.int64]] = {}

    def rest_at(self, position: Floats) -> None:
        """The arm is at rest here (joint units): the next goals start from it."""
        self.goal = np.array(position, dtype=np.float64)
        self.velocity = np.zeros(len(self._names))
        self._last_request = None

    def limit(self, requested: Floats | None) -> Floats:
        """The goal [J] to send in this tick, towards `requested` [J]; None decelerates as fast as allowed and holds.

        A request within all limits passes unchanged. One that is not is chased at the limits, in a way that always
        leaves room to stop at the target and at the position limits.
        """
        limits, dt = self.limits, self._dt
        self.interventions = Intervention.NONE
        if requested is not None and not np.isfinite(requested).all():
            self.interventions |= Intervention.NOT_FINITE
            requested = None
        if requested is None:
            self.interventions |= Intervention.STALE
            wanted = np.zeros_like(self.velocity)
            self._last_request = None
        else:
            wanted = self._chase(requested)
        speed = np.clip(wanted, -limits.max_speed, limits.max_speed)
        change = limits.max_acceleration * dt
        velocity = np.clip(speed, self.velocity - change, self.velocity + change)
        self._note(Intervention.SPEED, speed != wanted)
        self._note(Intervention.ACCELERATION, np.abs(velocity - speed) > 1e-9 * limits.max_speed)
        velocity = self._stoppable(velocity)
        goal = self.goal + velocity * dt
        # The room to stop was kept, so this clip moves nothing but rounding (or an arm that rests outside its limits).
        goal = np.clip(goal, np.minimum(limits.position_min, self.goal), np.maximum(limits.position_max, self.goal))
        self.velocity = (goal - self.goal) / dt
        self.goal = goal
        return goal

    def _note(self, intervention: Intervention, where: NDArray[Any]) -> None:
        if where.any():
            self.interventions |= intervention

    def _chase(self, requested: Floats) -> Floats:
        """Velocity [J] that reaches the request now, or, when it is far, approaches it so that it can still stop there.

        Relative to the request's own motion: a smooth trajectory is followed without lag.
        """
        limits, dt = self.limits, self._dt
        inside = np.clip(requested, limits.position_min, limits.position_max)
        self._note(Intervention.POSITION, inside != requested)
        previous = inside if self._last_request is None else self._last_request
        self._last_request = inside
        moving = np.clip((inside - previous) / dt, -limits.max_speed, limits.max_speed)
        behind = inside - moving * dt - self.goal
        closing = _stopping_speed(np.abs(behind), limits.max_acceleration, dt)
        return np.asarray(moving + np.sign(behind) * closing)

    def _stoppable(self, velocity: Floats) -> Floats:
        """Cap the speed towards each position limit at what can be braked before it."""
        limits, dt = self.limits, self._dt
        up = _stopping_speed(np.maximum(limits.position_max - self.goal, 0.0), limits.max_acceleration, dt)
        down = _stopping_speed(np.maximum(self.goal - limits.position_min, 0.0), limits.max_acceleration, dt)
        capped = np.clip(velocity, -down, up)
        self._note(Intervention.POSITION, capped != velocity)
        return np.asarray(capped)

    def check(
        self,
        t_ns: int,
        position: Floats,
        load: NDArray[Any],
        temperature_c: NDArray[Any],
        voltage_v: NDArray[Any],
        error: NDArray[np.uint8],
        valid: NDArray[Any],
        *,
        torque_on: bool = True,
    ) -> str | None:
        """The reason for a fault, as a sentence, or None. All arrays [J]; `valid` false: no reply in this tick.

        Every condition must have lasted: a single reading never stops a cell, a lasting one always does.
        """
        limits = self.limits
        answered = np.asarray(valid, dtype=bool)
        checks: tuple[tuple[str, NDArray[Any], float], ...] = (
            ("silent", ~answered, limits.silent_s),
            ("error", answered & (error != 0), limits.error_s),
            ("hot", answered & (temperature_c > limits.max_temperature_c), limits.error_s),
            (
                "voltage",
                answered & ((voltage_v < limits.min_voltage_v) | (voltage_v > limits.max_voltage_v)),
                limits.error_s,
            ),
            ("load", answered & (np.abs(load) > limits.max_load), limits.load_s),
            (
                "follow",
                answered & (np.abs(position - self.goal) > limits.follow_error) if torque_on else answered & False,
                limits.follow_s,
            ),
        )
        for kind, condition, lasting_s in checks:
            joint = self._lasted(kind, t_ns, condition, lasting_s)
            if joint is not None:
                return self._sentence(kind, joint, position, load, temperature_c, voltage_v, error)
        return None

    def _lasted(self, kind: str, t_ns: int, condition: NDArray[Any], lasting_s: float) -> int | None:
        """The first joint for which the condition has been true without a break for lasting_s, or None."""
        since = self._since.setdefault(kind, np.full(len(self._names), -1, np.int64))
        since[~condition] = -1
        since[condition & (since < 0)] = t_ns
        if not condition.any():
            return None
        lasted = np.flatnonzero(condition & (t_ns - since >= lasting_s * 1e9))
        return int(lasted[0]) if len(lasted) else None

    def _sentence(
        self,
        kind: str,
        joint: int,
        position: Floats,
        load: NDArray[Any],
        temperature_c: NDArray[Any],
        voltage_v: NDArray[Any],
        error: NDArray[np.uint8],
    ) -> str:
        name, limits = self._names[joint], self.limits
        if kind == "silent":
            return f"{name}: no answer for {limits.silent_s:g} s: check its cable"
        if kind == "error":
            bits = [text for bit, text in ERROR_NAMES.items() if error[joint] & bit] or [f"code {error[joint]}"]
            return f"{name}: the servo reports {', '.join(bits)}"
        if kind == "hot":
            return f"{name}: {temperature_c[joint]:.0f} C is above {limits.max_temperature_c:g} C"
        if kind == "voltage":
            return f"{name}: {voltage_v[joint]:.1f} V is outside {limits.min_voltage_v:g} to {limits.max_voltage_v:g} V"
        if kind == "load":
            return f"{name}: load {abs(load[joint]):.0%} for {limits.load_s:g} s: blocked or overloaded"
        return (
            f"{name}: at {position[joint]:.1f}, its goal {self.goal[joint]:.1f}, for {limits.follow_s:g} s: "
            "blocked, or its torque is off"
        )


def _stopping_speed(distance: Floats, acceleration: Floats, dt: float) -> Floats:
    """Largest speed from which braking by `acceleration` in steps of dt covers exactly `distance`.

    Braking from v in n more steps covers (n + 1)*v*dt - a*dt^2 * n*(n + 1)/2; n is the number of whole steps of a*dt
    that the distance has room for.
    """
    step = acceleration * dt
    n = np.floor((np.sqrt(1.0 + 8.0 * distance / (step * dt)) - 1.0) / 2.0)
    return np.asarray(distance / ((n + 1.0) * dt) + step * n / 2.0)
