"""What the arm shall do in this tick: modes, moves, the ensemble and the guard put together, without any I/O.

`execute` feeds it what the bus said, what `predict` published and what people asked for, and sends the goal that comes
out. So every decision about motion can be tested with plain values and injected times. Entering fault, and leaving it,
happens only in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.config import LoadedCell
from device.ensemble import Choice, ChunkEnsemble
from device.messages import Mode
from device.modes import Circumstances, next_mode
from firmware_bridge.guard import OVERLOAD, Guard, GuardLimits

Floats = NDArray[np.float64]

# A minimum-jerk move of distance d in time T peaks at 1.875 d/T and 5.774 d/T^2 (Flash and Hogan 1985). Moves on
# request stay under half of the joint's limits: nobody asked for haste.
_PEAK_SPEED, _PEAK_ACCELERATION, _MOVE_PART = 1.875, 5.774, 0.5
# In fault, a joint this part of follow_error away from its goal pushes, or has been let go.
_PUSHING_PART = 0.25
_MOVE_SETTLES_NS = 500_000_000  # the guard may lag behind a move that it had to slow down


@dataclass(frozen=True)
class Decision:
    """One tick's outcome. `to` marks the joints that are sent their goal: none of a limp arm, no silent servo."""

    goal: Floats
    to: NDArray[np.bool_]
    requested: Floats  # [J]; NaN where the mode had nothing to say
    holding: bool
    choice: Choice | None  # what the ensemble said, in policy mode


class Move:
    """A guarded joint-space move with a minimum-jerk profile."""

    def __init__(self, start: Floats, target: Floats, t_ns: int, duration_s: float) -> None:
        self._start = start.copy()
        self._target = target.copy()
        self._t_ns = t_ns
        self._duration_ns = max(round(duration_s * 1e9), 1)
        self.end_ns = t_ns + self._duration_ns

    def at(self, t_ns: int) -> Floats:
        s = min(max((t_ns - self._t_ns) / self._duration_ns, 0.0), 1.0)
        return np.asarray(self._start + (self._target - self._start) * (s * s * s * (10.0 + s * (6.0 * s - 15.0))))


class Controller:
    """What one cell's arm does.

    Attributes: mode; torque_on (wanted: the arm holds, it is not limp); fault (a sentence, or None); holds (times that
    all chunks went stale while the policy ran).
    """

    def __init__(self, cell: LoadedCell, ensemble: ChunkEnsemble | None) -> None:
        limits = GuardLimits(
            position_min=cell.joint_array("min"),
            position_max=cell.joint_array("max"),
            max_speed=cell.joint_array("max_speed"),
            max_acceleration=cell.joint_array("max_acceleration"),
            grips=cell.joint_array("grips").astype(bool),
            **cell.cell.guard.model_dump(),
        )
        self.guard = Guard(cell.cell.joint_names, limits, 1.0 / cell.cell.control.rate_hz)
        self.ensemble = ensemble
        self.mode = Mode.IDLE
        self.torque_on = True
        self.fault: str | None = None
        self.holds = 0
        self._cell = cell
        self._move: Move | None = None
        self._holding = True  # a policy that has not begun is not one that has stopped
        self._fault_now: str | None = None
        self._released = np.zeros(len(cell.cell.joint_names), np.bool_)
        self._position: Floats = np.zeros(len(cell.cell.joint_names))

    def observe(self, t_ns: int, joints: Any) -> None:
        """Look at a reading (a record of messages.joints_dtype); enters fault when the guard says so."""
        self._position = np.array(joints["position"])
        if not self.torque_on:
            self.guard.rest_at(self._position)
        elif self.mode is Mode.FAULT:
            self.guard.rest_at(self._position, self._released)
        self._fault_now = self.guard.check(
            t_ns,
            self._position,
            joints["load"],
            joints["temperature_c"],
            joints["voltage_v"],
            joints["error"],
            joints["valid"],
            torque_on=self.torque_on,
        )
        pushing = self.guard.away(self._position, _PUSHING_PART * self.guard.limits.follow_error)
        if self._fault_now is not None and self.mode is not Mode.FAULT:
            self.enter_fault(self._fault_now)
            # A joint that is away from its goal pushes against something: let go of the goal, hold the place.
            self.guard.rest_at(self._position, pushing)
        elif self.mode is Mode.FAULT:
            # Power that comes back (an emergency stop released), or a servo that gave up by itself, must stiffen and
            # move nothing before somebody has looked: no goals for it until the reset.
            gave_up = (joints["error"] & ~np.uint8(OVERLOAD)) != 0
            self._released |= ~self.guard.answering | gave_up | pushing

    def enter_fault(self, reason: str) -> None:
        """Stop and hold, or stay limp; only a reset leads out of here, and only once the cause is gone."""
        self.mode = Mode.FAULT
        self.fault = self._fault_now = reason
        self._move = None

    def bus_is_gone(self) -> None:
        """No servo can be reached."""
        self.guard.no_bus()
        self._released[:] = True
        self.enter_fault("the servo bus is gone")

    def stop(self) -> None:
        """Brake and hold, whatever the arm was doing; a limp arm and a fault stay what they are."""
        self._move = None
        if self.mode in (Mode.POLICY, Mode.TELEOP):
            self.mode = Mode.IDLE

    @property
    def at_rest(self) -> bool:
        return not self.guard.velocity.any()

    def request(self, request: dict[str, Any], t_ns: int) -> dict[str, Any]:
        """Carry out a request (`mode`, `stop`, `home`, `move`, `status`) or refuse it with a sentence."""
        verb = request["verb"]
        if verb == "mode":
            return self._request_mode(str(request.get("mode")))
        if verb == "stop":
            self.stop()
            return self._answer()
        if verb == "home":
            home = {name: joint.home for name, joint in self._cell.cell.arm.joints.items() if joint.home is not None}
            return self._request_move(home, t_ns)
        if verb == "move":
            return self._request_move(request.get("joints"), t_ns)
        if verb == "status":
            return self._answer()
        return {"ok": False, "why": f"{verb!r} is not a request; known are mode, stop, home, move, status"}

    def _answer(self) -> dict[str, Any]:
        return {"ok": True, "mode": self.mode.name.lower(), "fault": self.fault}

    def _request_mode(self, wanted: str) -> dict[str, Any]:
        now = Circumstances(
            has_policy=self.ensemble is not None,
            has_leader=False,
            fault_persists=self._fault_now is not None,
            all_answer=bool(self.guard.answering.all()),
        )
        mode, refusal = next_mode(self.mode, wanted, now)
        if refusal is not None:
            return {"ok": False, "why": refusal}
        self._move = None
        if mode is not self.mode:
            self._enter(mode)
        return self._answer()

    def _enter(self, mode: Mode) -> None:
        if mode is Mode.IDLE and (self.mode is Mode.FAULT or not self.torque_on):
            stiffened = np.ones_like(self._released) if not self.torque_on else self._released
            self.guard.rest_at(self._position, stiffened)
            self._released[:] = False
        if mode is Mode.POLICY and self.ensemble is not None:
            self.ensemble.clear()
            self._holding = True
        self.torque_on = mode is not Mode.LIMP
        self.fault = None
        self.mode = mode

    def _request_move(self, joints: Any, t_ns: int) -> dict[str, Any]:
        if self.mode is not Mode.IDLE:
            return {"ok": False, "why": f"moves need mode idle, the mode is {self.mode.name.lower()}"}
        names = self._cell.cell.joint_names
        if not isinstance(joints, dict) or not joints:
            return {"ok": False, "why": 'a move names joints and positions, such as {"gripper": 50}'}
        target = self.guard.goal.copy()
        for name, value in joints.items():
            position = _number(value)
            if name not in names or position is None:
                return {
                    "ok": False,
                    "why": f"{name}={value!r} is not a joint's position; joints are {', '.join(names)}",
                }
            joint = names.index(name)
            target[joint] = np.clip(
                position, self.guard.limits.position_min[joint], self.guard.limits.position_max[joint]
            )
        duration_s = self._move_duration_s(np.abs(target - self.guard.goal))
        self._move = Move(self.guard.goal, target, t_ns, duration_s)
        return {**self._answer(), "seconds": duration_s}

    def _move_duration_s(self, distance: Floats) -> float:
        limits = self.guard.limits
        by_speed = _PEAK_SPEED * distance / (_MOVE_PART * limits.max_speed)
        by_acceleration = np.sqrt(_PEAK_ACCELERATION * distance / (_MOVE_PART * limits.max_acceleration))
        return float(np.maximum(by_speed, by_acceleration).max())

    def step(self, t_ns: int) -> Decision:
        """Decide the goals for the instant t_ns. To be called once a period."""
        requested: Floats | None = None
        choice: Choice | None = None
        if self.mode is Mode.POLICY and self.ensemble is not None:
            choice = self.ensemble.at(t_ns)
            requested = None if choice is None else choice.action
            if choice is None and not self._holding:
                self.holds += 1
            self._holding = choice is None
        elif self.mode is Mode.IDLE and self._move is not None:
            requested = self._move.at(t_ns)
            if t_ns >= self._move.end_ns + _MOVE_SETTLES_NS:
                self._move = None
        goal = self.guard.limit(requested if self.torque_on else None)
        to = self.guard.answering & ~self._released if self.torque_on else np.zeros_like(self._released)
        said = np.full_like(goal, np.nan) if requested is None else requested
        return Decision(goal, to, said, requested is None, choice)


def _number(value: Any) -> float | None:
    """A finite number out of JSON, or None: neither true nor a number too large for a float is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if np.isfinite(number) else None
