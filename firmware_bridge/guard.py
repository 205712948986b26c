"""The last thing before the bus, in every mode: turns whatever it is given into something safe, or says why it cannot.

`execute` owns one Guard, shows it every reading through `check`, and passes every goal through `limit`; there is no
other way to the servos. `limit` never raises and never lets through a goal outside the position limits, a speed above
the joint's, or an acceleration above the joint's: without a usable request, or while any servo does not answer, it
decelerates and holds. A servo that answers again starts from where it is, not from where it was told to be. `check`
returns the reason for a fault, once it has lasted. No clock, file or bus in here: values and times come as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# STS3215 status byte: input voltage, angle sensor, overheat, overcurrent, overload (memory table, address 65).
ERROR_NAMES = {1: "voltage", 2: "angle sensor", 4: "overheating", 8: "overcurrent", 32: "overload"}


OVERLOAD = 32

# How much lost replies weigh against good ones: with 1 to 4, a servo may lose one reply in five for ever.
_FORGIVENESS = 0.25
_LONGEST_STEP_S = 0.1  # between two checks, as far as lost replies are counted


class Intervention(IntFlag):
    """How the guard changed what it was given, in one tick."""

    NONE = 0
    STALE = 1  # nothing was asked for: decelerated or held
    NOT_FINITE = 2
    POSITION = 4
    SPEED = 8
    ACCELERATION = 16
    SILENT = 32  # a servo does not answer: decelerated or held
    LEASH = 64  # the goal was not let further away from the joint


@dataclass(frozen=True)
class GuardLimits:
    """Per joint [J] in joint units (and per s, s^2), or one value for all joints; the rest for the whole arm.

    `grips` marks joints that hold things: they need not reach their goal, may push as hard as they are set up to, and
    their servo's overload protection is doing its work, not failing.
    """

    position_min: Floats
    position_max: Floats
    max_speed: Floats
    max_acceleration: Floats
    grips: Bools | bool = False
    max_load: float = 0.9  # fraction of stall torque
    load_s: float = 1.0  # for so long
    max_temperature_c: float = 65.0
    min_voltage_v: float = 4.5
    max_voltage_v: float = 13.0
    trust_s: float = 0.05  # a servo that has been silent for longer gets no goals, and the arm holds
    silent_s: float = 0.5  # a servo that has been silent for so long, or has lost so much in all, is a fault
    follow_error: float = 30.0  # joint units between goal and position ...
    follow_s: float = 0.7  # ... for so long: blocked, torque off, or a gear has gone
    leash_s: float = 0.2  # a goal is not let further from its joint than full speed covers in this time ...
    blackout_s: float = 0.15  # all servos silent for so long: their power was cut
    error_s: float = 0.1  # an error bit that has been set for so long


class Guard:
    """Limits motion tick by tick.

    Attributes: goal, velocity [J] (last let through); interventions (of the last tick); answering [J], the servos that
    may be sent goals; returned [J], those that began to answer again with the last `check`.
    """

    def __init__(self, names: Sequence[str], limits: GuardLimits, period_s: float) -> None:
        joints = len(names)
        self.limits = limits
        self.interventions = Intervention.NONE
        self.goal: Floats = np.zeros(joints)
        self.velocity: Floats = np.zeros(joints)
        self.answering: Bools = np.ones(joints, np.bool_)
        self.returned: Bools = np.zeros(joints, np.bool_)
        self._names = tuple(names)
        self._dt = period_s
        self._grips: Bools = np.broadcast_to(np.asarray(limits.grips, np.bool_), (joints,))
        # ... but always further than what counts as not following, or that could never be seen.
        leash = np.maximum(limits.max_speed * limits.leash_s, 1.2 * limits.follow_error)
        self._leash = np.where(self._grips, np.inf, leash)
        self._trust_ns = round(max(limits.trust_s, 3 * period_s) * 1e9)
        self._last_request: Floats | None = None
        self._measured: Floats | None = None
        self._since: dict[str, NDArray[np.int64]] = {}
        self._checked_ns: int | None = None
        self._answered_ns: NDArray[np.int64] = np.zeros(joints, np.int64)
        self._lost_s: Floats = np.zeros(joints)

    def rest_at(self, position: Floats, joints: Bools | None = None) -> None:
        """The arm (or only the joints marked) is at rest at `position` [J]: the next goals start from there."""
        where = np.ones(len(self._names), np.bool_) if joints is None else joints
        self.goal = np.where(where, position, self.goal)
        self.velocity = np.where(where, 0.0, self.velocity)
        self._last_request = None

    def limit(self, requested: Floats | None) -> Floats:
        """The goal [J] to send in this tick, towards `requested` [J]; None decelerates as fast as allowed and holds.

        A request within all limits passes unchanged. One that is not is chased at the limits, in a way that always
        leaves room to stop at the target and at the position limits. Only a goal that reaches the end of its leash
        stops at once: its joint is not following, so nothing brakes harder for it.
        """
        limits, dt = self.limits, self._dt
        self.interventions = Intervention.NONE
        wanted = self._wanted(requested)
        speed = np.clip(wanted, -limits.max_speed, limits.max_speed)
        change = limits.max_acceleration * dt
        velocity = np.clip(speed, self.velocity - change, self.velocity + change)
        self._note(Intervention.SPEED, speed != wanted)
        self._note(Intervention.ACCELERATION, np.abs(velocity - speed) > 1e-9 * limits.max_speed)
        velocity = self._stoppable(velocity)
        goal = self.goal + velocity * dt
        # The room to stop was kept, so this clip moves nothing but rounding (or an arm that rests outside its limits).
        goal = np.clip(goal, np.minimum(limits.position_min, self.goal), np.maximum(limits.position_max, self.goal))
        goal = self._leashed(goal)
        self.velocity = (goal - self.goal) / dt
        self.goal = goal
        return goal

    def _wanted(self, requested: Floats | None) -> Floats:
        """The velocity [J] that the request asks for; 0 where there is no usable request or not every servo answers."""
        if not self.answering.all():
            self.interventions |= Intervention.SILENT
        elif requested is None:
            self.interventions |= Intervention.STALE
        elif not np.isfinite(requested).all():
            self.interventions |= Intervention.NOT_FINITE
        else:
            return self._chase(requested)
        self._last_request = None
        return np.zeros_like(self.velocity)

    def _leashed(self, goal: Floats) -> Floats:
        """Keep a goal from running away from a joint that does not follow; it may always come nearer."""
        if self._measured is None:
            return goal
        room = np.maximum(self._leash, np.abs(self.goal - self._measured))
        leashed = np.clip(goal, self._measured - room, self._measured + room)
        self._note(Intervention.LEASH, leashed != goal)
        return np.asarray(leashed)

    def _note(self, intervention: Intervention, where: NDArray[Any]) -> None:
        if where.any():
            self.interventions |= intervention

    def _chase(self, requested: Floats) -> Floats:
        """Velocity [J] that reaches the request now, or, when it is far, approaches it so that it can still stop there.

        Relative to the request's own motion: a smooth trajectory is followed without lag.
        """
        limits, dt = self.limits, self._dt
        # A joint that rests outside its limits may stay there, and may come in; it is not dragged in unasked.
        low, high = np.minimum(limits.position_min, self.goal), np.maximum(limits.position_max, self.goal)
        inside = np.clip(requested, low, high)
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

        Every condition must have lasted: a single reading never stops a cell. Ticks without a reply prove nothing: they
        neither begin a condition nor end it. `load` is a fraction of stall torque.
        """
        limits = self.limits
        answered = np.asarray(valid, dtype=bool)
        self._listen(t_ns, position, answered)
        ignored = np.where(self._grips, OVERLOAD, 0).astype(np.uint8)
        off_voltage = (voltage_v < limits.min_voltage_v) | (voltage_v > limits.max_voltage_v)
        overloaded = ~self._grips & (np.abs(load) > limits.max_load)
        away = self.away(position, limits.follow_error) & torque_on
        if t_ns - int(self._answered_ns.max()) > limits.blackout_s * 1e9:
            return "no servo answers: check the arm's power and the bus"
        joint = _first(self._lost_s >= limits.silent_s - 1e-9)
        kind = "silent"
        for kind_, condition, lasting_s in (
            ("error", error & ~ignored != 0, limits.error_s),
            ("hot", temperature_c > limits.max_temperature_c, limits.error_s),
            ("voltage", off_voltage, limits.error_s),
            ("load", overloaded, limits.load_s),
            ("follow", away, limits.follow_s),
        ):
            lasted = self._lasted(kind_, t_ns, np.asarray(condition, np.bool_), answered, lasting_s)
            if joint is None and lasted is not None:
                kind, joint = kind_, lasted
        if joint is None:
            return None
        return self._sentence(kind, joint, t_ns, position, load, temperature_c, voltage_v, error)

    def away(self, position: Floats, distance: float) -> Bools:
        """The joints [J] that are further from their goal than `distance` (joint units); not those that grip."""
        return np.asarray(~self._grips & (np.abs(position - self.goal) > distance))

    def no_bus(self) -> None:
        """The bus is gone: no servo answers until a `check` says otherwise."""
        self.answering = np.zeros_like(self.answering)
        self._measured = None

    def _listen(self, t_ns: int, position: Floats, answered: Bools) -> None:
        """Who answers: short silences are lived through, long ones take a servo out until it answers again."""
        since_s = 0.0 if self._checked_ns is None else (t_ns - self._checked_ns) / 1e9
        step_s = min(max(since_s, 0.0), _LONGEST_STEP_S)
        if self._checked_ns is None:
            self._answered_ns[:] = t_ns
        self._checked_ns = t_ns
        self._answered_ns[answered] = t_ns
        lost = self._lost_s + np.where(answered, -_FORGIVENESS * step_s, step_s)
        self._lost_s = np.clip(lost, 0.0, self.limits.silent_s)
        silent = t_ns - self._answered_ns > self._trust_ns
        answering = np.where(answered, True, self.answering & ~silent)
        self.returned = answering & ~self.answering
        self.answering = answering
        self._measured = np.array(position, dtype=np.float64)
        if self.returned.any():
            self.rest_at(self._measured, self.returned)

    def _lasted(self, kind: str, t_ns: int, condition: Bools, answered: Bools, lasting_s: float) -> int | None:
        """The first joint whose every reply for lasting_s has shown the condition, or None."""
        since = self._since.setdefault(kind, np.full(len(self._names), -1, np.int64))
        since[answered & ~condition] = -1
        since[answered & condition & (since < 0)] = t_ns
        return _first((since >= 0) & answered & condition & (t_ns - since >= lasting_s * 1e9))

    def _sentence(
        self,
        kind: str,
        joint: int,
        t_ns: int,
        position: Floats,
        load: NDArray[Any],
        temperature_c: NDArray[Any],
        voltage_v: NDArray[Any],
        error: NDArray[np.uint8],
    ) -> str:
        name, limits = self._names[joint], self.limits
        if kind == "silent":
            silent_s = (t_ns - int(self._answered_ns[joint])) / 1e9
            what = f"no answer for {limits.silent_s:g} s" if silent_s > limits.trust_s else "too many lost replies"
            return f"{name}: {what}: check its cable and power"
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


def _first(where: Bools) -> int | None:
    found = np.flatnonzero(where)
    return int(found[0]) if len(found) else None


def _stopping_speed(distance: Floats, acceleration: Floats, dt: float) -> Floats:
    """Largest speed from which braking by `acceleration` in steps of dt covers exactly `distance`.

    Braking from v in n more steps covers (n + 1)*v*dt - a*dt^2 * n*(n + 1)/2; n is the number of whole steps of a*dt
    that the distance has room for.
    """
    step = acceleration * dt
    n = np.floor((np.sqrt(1.0 + 8.0 * distance / (step * dt)) - 1.0) / 2.0)
    return np.asarray(distance / ((n + 1.0) * dt) + step * n / 2.0)
