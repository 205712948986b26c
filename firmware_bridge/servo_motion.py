"""How an emulated servo moves: its motion profile, and what its horn is attached to.

`ServoBank` (servo_model) steps a `MotionProfile` for all its servos at once and hands the resulting
setpoints to a `Plant`. The virtual cell's plant is a MuJoCo world; `FreePlant` here is bare horns on a
table, for tests and for driver interop. Everything is arrays over the J servos, in radians for the
plant and in ticks for the servo. Deterministic: no clock, no randomness.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

ARRIVED_RAW = 0.05  # nearer than this, and slow enough to stop, the profile is at its goal

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# STS3215 at 7.4 V turns 50 rpm without load (product sheet), about 300 degrees a second.
NO_LOAD_SPEED_RAD_S = 50 * 2 * np.pi / 60


class Plant(Protocol):
    """What the horns are attached to.

    A plant that has an attribute `torque_limit` (float64 [J], part of stall torque, 0..1) finds in it,
    before each step, how much torque each servo may use now (Torque_Limit and overload protection).
    """

    @property
    def position_rad(self) -> FloatArray: ...  # [J] angle of each horn, unwrapped

    @property
    def velocity_rad_s(self) -> FloatArray: ...  # [J]

    @property
    def effort(self) -> FloatArray: ...  # [J] torque the motor gives now, -1..1 of stall torque

    def step(self, dt_s: float, setpoint_rad: FloatArray, torque_on: BoolArray) -> None:
        """Advance by `dt_s`. A servo with torque on pulls its horn towards `setpoint_rad` [J]."""


class FreePlant:
    """Unloaded horns that follow their setpoint with a small lag and stay where they are when limp.

    A test may turn a limp horn by hand (`position_rad[i] = ...`), clamp one (`blocked[i] = True`), or
    hang a weight on it (`load[i]`, part of stall torque; lifts without moving what holds).
    """

    def __init__(self, count: int, lag_s: float = 0.015, stiffness_per_rad: float = 5.0) -> None:
        self.position_rad: FloatArray = np.zeros(count)
        self.velocity_rad_s: FloatArray = np.zeros(count)
        self.effort: FloatArray = np.zeros(count)
        self.torque_limit: FloatArray = np.ones(count)
        self.load: FloatArray = np.zeros(count)
        self.blocked: BoolArray = np.zeros(count, np.bool_)
        self._lag_s = lag_s
        self._stiffness_per_rad = stiffness_per_rad

    def step(self, dt_s: float, setpoint_rad: FloatArray, torque_on: BoolArray) -> None:
        distance = setpoint_rad - self.position_rad
        velocity = np.clip(distance / max(self._lag_s, dt_s), -NO_LOAD_SPEED_RAD_S, NO_LOAD_SPEED_RAD_S)
        self.velocity_rad_s = np.where(torque_on & ~self.blocked, velocity, 0.0)
        self.position_rad += self.velocity_rad_s * dt_s
        wanted = self.load + distance * self._stiffness_per_rad
        self.effort = np.where(torque_on, np.clip(wanted, -self.torque_limit, self.torque_limit), 0.0)


class MotionProfile:
    """The servo's own trajectory towards its goal: trapezoidal in speed, in ticks."""

    # Acceleration 0 means "as fast as it can"; this reaches full speed within one step.
    UNLIMITED_ACCELERATION = 1e7

    def __init__(self, count: int) -> None:
        self.position: FloatArray = np.zeros(count)  # ticks, [J]
        self.velocity: FloatArray = np.zeros(count)  # ticks a second, [J]

    def reset(self, position: FloatArray, which: BoolArray) -> None:
        """Start from rest at `position`, for the servos in `which`."""
        np.copyto(self.position, position, where=which)
        np.copyto(self.velocity, 0.0, where=which)

    def step_to(
        self, dt_s: float, goal: FloatArray, speed: FloatArray, acceleration: FloatArray, which: BoolArray
    ) -> None:
        """Advance the servos in `which` towards `goal`; all [J], ticks, ticks a second, ticks a second squared."""
        distance = goal - self.position
        remaining = np.abs(distance)
        # The fastest speed from which it still stops at the goal in steps of dt.
        half_step = acceleration * (dt_s / 2)
        stopping = np.sqrt(half_step * half_step + 2 * acceleration * remaining) - half_step
        wanted = np.copysign(np.minimum(np.minimum(speed, stopping), remaining / dt_s), distance)
        self._advance(dt_s, wanted, acceleration, which)
        arrived = which & (np.abs(goal - self.position) < ARRIVED_RAW) & (np.abs(self.velocity) <= 2 * half_step)
        np.copyto(self.position, goal, where=arrived)
        np.copyto(self.velocity, 0.0, where=arrived)

    def step_at(self, dt_s: float, velocity: FloatArray, acceleration: FloatArray, which: BoolArray) -> None:
        """Advance the servos in `which` at a constant speed (velocity mode)."""
        self._advance(dt_s, velocity, acceleration, which)

    def _advance(self, dt_s: float, wanted: FloatArray, acceleration: FloatArray, which: BoolArray) -> None:
        largest = acceleration * dt_s
        change = np.minimum(np.maximum(wanted - self.velocity, -largest), largest)
        np.add(self.velocity, change, out=self.velocity, where=which)
        np.add(self.position, self.velocity * dt_s, out=self.position, where=which)
