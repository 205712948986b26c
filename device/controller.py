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
from firmware_bridge.guard import Guard, GuardLimits

Floats = NDArray[np.float64]

# A minimum-jerk move of distance d in time T peaks at 1.875 d/T and 5.774 d/T^2 (Flash and Hogan 1985). Moves on
# request stay under half of the joint's limits: nobody asked for haste.
_PEAK_SPEED, _PEAK_ACCELERATION, _MOVE_PART = 1.875, 5.774, 0.5


@dataclass(frozen=True)
class Decision:
    """One tick's outcome. `goal` None: send nothing (the arm is limp)."""

    goal: Floats | None
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
    """What one cell's arm does. Attributes: mode; fault (a sentence, or None); holds (times all chunks went stale)."""

    def __init__(self, cell: LoadedCell, ensemble: ChunkEnsemble | None) -> None:
        limits = GuardLimits(
            position_min=cell.joint_array("min"),
            position_max=cell.joint_array("max"),
            max_speed=cell.joint_array("max_speed"),
            max_acceleration=cell.joint_array("max_acceleration"),
            **cell.cell.guard.model_dump(),
        )
        self.guard = Guard(cell.cell.joint_names, limits, 1.0 / cell.cell.control.rate_hz)
        self.ensemble = ensemble
        self.mode = Mode.IDLE
        self.fault: str | None = None
        self.holds = 0
        self._cell = cell
        self._move: Move | None = None
        self._held = False
        self._fault_now: str | None = None

    def observe(self, t_ns: int, joints: Any) -> None:
        """Look at a reading (a record of messages.joints_dtype); enters fault when the guard says so."""
        limp = self.mode is Mode.LIMP
        if limp:
            self.guard.rest_at(joints["position"])
        reason = self.guard.check(
            t_ns,
            joints["position"],
            joints["load"],
            joints["temperature_c"],
            joints["voltage_v"],
            joints["error"],
            joints["valid"],
            torque_on=not limp,
        )
        self._fault_now = reason
        if reason is not None and self.mode is not Mode.FAULT:
            self.enter_fault(reason)
            # An arm that is far from its goal pushes against something: let go of the goal, hold the place.
            if (np.abs(joints["position"] - self.guard.goal) > self.guard.limits.follow_error).any():
                self.guard.rest_at(joints["position"])

    def enter_fault(self, reason: str) -> None:
        """Stop and hold; only a reset leads out of here, and only once the cause is gone."""
        self.mode = Mode.FAULT
        self.fault = self._fault_now = reason
        self._move = None

    def bus_is_back(self, position: Floats) -> None:
        """The bus answers again and the arm rests at `position` [J]; the fault stays until it is reset."""
        self._fault_now = None
        self.guard.rest_at(position)

    def request(self, request: dict[str, Any], t_ns: int) -> dict[str, Any]:
        """Carry out a request (`mode`, `home`, `move`, `status`) or refuse it with a sentence."""
        verb = request["verb"]
        if verb == "mode":
            return self._request_mode(str(request.get("mode")))
        if verb == "home":
            home = {name: joint.home for name, joint in self._cell.cell.arm.joints.items() if joint.home is not None}
            return self._request_move(home, t_ns)
        if verb == "move":
            return self._request_move(request.get("joints"), t_ns)
        if verb == "status":
            return self._answer()
        return {"ok": False, "why": f"{verb!r} is not a request; known are mode, home, move, status"}

    def _answer(self) -> dict[str, Any]:
        return {"ok": True, "mode": self.mode.name.lower(), "fault": self.fault}

    def _request_mode(self, wanted: str) -> dict[str, Any]:
        now = Circumstances(
            has_policy=self.ensemble is not None, has_leader=False, fault_persists=self._fault_now is not None
        )
        mode, refusal = next_mode(self.mode, wanted, now)
        if refusal is not None:
            return {"ok": False, "why": refusal}
        if mode is not self.mode:
            self.fault = None
            self._move = None
            self._held = False
            if mode is Mode.POLICY and self.ensemble is not None:
                self.ensemble.clear()
        self.mode = mode
        return self._answer()

    def _request_move(self, joints: Any, t_ns: int) -> dict[str, Any]:
        if self.mode is not Mode.IDLE:
            return {"ok": False, "why": f"moves need mode idle, the mode is {self.mode.name.lower()}"}
        target = self.guard.goal.copy()
        names = self._cell.cell.joint_names
        for name, value in joints.items() if isinstance(joints, dict) else ():
            if name not in names or not isinstance(value, int | float) or not np.isfinite(value):
                return {
                    "ok": False,
                    "why": f"{name}={value!r} is not a joint's position; joints are {', '.join(names)}",
                }
            target[names.index(name)] = value
        target = np.clip(target, self.guard.limits.position_min, self.guard.limits.position_max)
        duration_s = self._move_duration_s(np.abs(target - self.guard.goal))
        self._move = Move(self.guard.goal, target, t_ns, duration_s)
        return {**self._answer(), "seconds": duration_s}

    def _move_duration_s(self, distance: Floats) -> float:
        limits = self.guard.limits
        by_speed = _PEAK_SPEED * distance / (_MOVE_PART * limits.max_speed)
        by_acceleration = np.sqrt(_PEAK_ACCELERATION * distance / (_MOVE_PART * limits.max_acceleration))
        return float(np.maximum(by_speed, by_acceleration).max())

    def step(self, t_ns: int) -> Decision:
        """Decide the goal for the instant t_ns. To be called once a period."""
        requested: Floats | None = None
        choice: Choice | None = None
        if self.mode is Mode.POLICY and self.ensemble is not None:
            choice = self.ensemble.at(t_ns)
            requested = None if choice is None else choice.action
            if choice is None and self._held is False:
                self.holds += 1
            self._held = choice is None
        elif self.mode is Mode.IDLE and self._move is not None:
            requested = self._move.at(t_ns)
            if t_ns >= self._move.end_ns + 500_000_000:
                self._move = None
        nothing = np.full_like(self.guard.goal, np.nan)
        if self.mode is Mode.LIMP:
            return Decision(None, nothing, holding=True, choice=None)
        goal = self.guard.limit(requested)
        return Decision(goal, nothing if requested is None else requested, requested is None, choice)
