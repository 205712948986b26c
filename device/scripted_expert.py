"""The scripted expert: a person's stand-in that picks the cube up and drops it into the tray.

The virtual cell uses it as its leader arm, and the training recipe records its demonstrations. It looks at the true
state of the world, solves inverse kinematics by damped least squares on the MuJoCo model, and strings a few waypoints
together with minimum-jerk timing (Flash and Hogan 1985). It keeps every joint below 90 deg/s and 500 deg/s^2.
A plan is a function of time alone; when the cube is no longer where the plan thought, or slips out of the hand,
a new plan starts at the present goal, so the goals never jump.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from device.mujoco_headless import mujoco
from device.virtual_world import (
    CUBE_SIDE_M,
    GRIPPER,
    HOME_RAD,
    JOINT_RANGE_RAD,
    TRAY_CENTRE_M,
    VirtualWorld,
    build_model,
    rad_from_units,
    units_from_rad,
)

FloatArray = NDArray[np.float64]

# Of a plan; a little below what the class promises, since goals are taken at the control rate.
MAX_SPEED_DEG_S = 75.0
MAX_ACCELERATION_DEG_S2 = 400.0

OPEN_UNITS = 45.0
CLOSED_UNITS = 12.0  # a few degrees inside the cube: the servo's torque limit sets the force
HOVER_M = 0.055  # of the cube's centre, over its resting height
CARRY_M = 0.065
RELEASE_M = 0.045
STANDOFF_M = 0.012  # the fixed finger comes down this far from the cube's face
SLIPPED_M = 0.012  # the cube has moved more than this from where the plan took it to be
LOST_M = 0.03  # the cube is this far from the grasp point while it should be between the fingers
ARM = slice(0, GRIPPER)
HOME_UNITS = units_from_rad(HOME_RAD)
_UP: FloatArray = np.array([0.0, 0.0, 1.0])
_TRAY_YAW_RAD = float(np.arctan2(TRAY_CENTRE_M[1], TRAY_CENTRE_M[0] - 0.0388))  # away from the shoulder's axis


class Kinematics:
    """Inverse kinematics of the hand's grasp point, by damped least squares (Wampler 1986)."""

    def __init__(self) -> None:
        self.model = build_model()
        self.data = mujoco.MjData(self.model)
        self._site = self.model.site("grasp").id
        self._dofs = [int(self.model.joint(name).dofadr[0]) for name in VirtualWorld.JOINTS]
        self._qpos = [int(self.model.joint(name).qposadr[0]) for name in VirtualWorld.JOINTS]

    def grasp_point_m(self, joints_rad: ArrayLike) -> FloatArray:
        """Where these joint angles [6] put the grasp point."""
        self.data.qpos[self._qpos] = joints_rad
        mujoco.mj_kinematics(self.model, self.data)
        return np.array(self.data.site_xpos[self._site])

    def solve(self, place_m: ArrayLike, yaw_rad: float, seed_rad: ArrayLike) -> FloatArray:
        """Joint angles [5] (rad) that put the grasp point at `place_m`, looking down, the fingers along `yaw_rad`.

        Where the arm cannot both reach the place and look straight down, the place wins and the hand tilts.
        """
        target = np.asarray(place_m, float)
        along = np.array([np.cos(yaw_rad), np.sin(yaw_rad), 0.0])
        q = np.array(seed_rad, dtype=np.float64)[ARM].copy()
        low, high = JOINT_RANGE_RAD[ARM].T
        jac_place, jac_turn = np.zeros((2, 3, self.model.nv))
        # Metres for a radian: so light that a turn never costs a place; a yaw is always within reach, a tilt is not.
        weight = np.diag([1, 1, 1, 0.004, 0.004, 0.02])
        for _ in range(60):
            self.data.qpos[self._qpos[ARM]] = q
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_comPos(self.model, self.data)
            axes = self.data.site_xmat[self._site].reshape(3, 3)
            place_error = target - self.data.site_xpos[self._site]
            turn_error = np.cross(axes[:, 2], [0, 0, 1.0]) + np.array([0, 0, 1.0]) * np.cross(axes[:, 0], along)[2]
            mujoco.mj_jacSite(self.model, self.data, jac_place, jac_turn, self._site)
            error = weight @ np.concatenate([place_error, turn_error])
            jac = weight @ np.concatenate([jac_place, jac_turn])[:, self._dofs[ARM]]
            change = _damped(jac, error)
            # A joint at its limit does not count on going further: the others take its share.
            stuck = ((q <= low) & (change < 0)) | ((q >= high) & (change > 0))
            change = _damped(np.where(stuck, 0.0, jac), error)
            q = np.clip(q + np.clip(change, -0.3, 0.3), low, high)
            if np.abs(change).max() < 1e-5:
                break
        return np.asarray(q)


def _damped(jac: FloatArray, error: FloatArray) -> FloatArray:
    return np.asarray(jac.T @ np.linalg.solve(jac @ jac.T + 1e-7 * np.eye(len(error)), error))


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a plan: from its first knot to its last in `duration_s`, at rest at both ends."""

    name: str
    knots_units: FloatArray  # [N, 6], equally spaced along the path
    duration_s: float

    def at(self, t_s: float) -> FloatArray:
        u = min(max(t_s / self.duration_s, 0.0), 1.0)
        return _along(self.knots_units, u * u * u * (10 - 15 * u + 6 * u * u))


def _along(knots: FloatArray, s: float) -> FloatArray:
    """The point at the fraction `s` of a path: a Catmull-Rom spline through its knots, so that speed has no steps."""
    last = len(knots) - 1
    i = min(int(s * last), last - 1)
    u = s * last - i
    p1, p2 = knots[i], knots[i + 1]
    p0 = knots[i - 1] if i > 0 else 2 * p1 - p2
    p3 = knots[i + 2] if i + 2 <= last else 2 * p2 - p1
    bend = (2 * p0 - 5 * p1 + 4 * p2 - p3) * u * u + (3 * p1 - p0 - 3 * p2 + p3) * u * u * u
    return np.asarray(p1 + 0.5 * ((p2 - p0) * u + bend))


def _timed(name: str, knots_units: FloatArray, least_s: float) -> Segment:
    """The segment over these knots, as fast as the limits allow and no faster than `least_s`."""
    path = np.stack([Segment(name, knots_units, 1.0).at(t) for t in np.linspace(0, 1, 61)])
    speed = np.diff(path, axis=0) * 60
    acceleration = np.diff(speed, axis=0) * 60
    fast = np.abs(speed).max() / MAX_SPEED_DEG_S
    steep = np.sqrt(np.abs(acceleration).max() / MAX_ACCELERATION_DEG_S2)
    return Segment(name, knots_units, float(max(least_s, fast, steep)))


class ScriptedExpert:
    """Goals in units (degrees; gripper 0..100) for the task in a world. Call `goal` with times that go forward."""

    def __init__(self, kinematics: Kinematics | None = None) -> None:
        self.kinematics = kinematics or Kinematics()
        self.segments: list[Segment] = []
        self._start_s = 0.0
        self._grasp_at_m = np.zeros(3)
        self._last_units: FloatArray | None = None

    def reset(self) -> None:
        """Forget the plan; the next goal starts from where the arm is."""
        self.segments = []
        self._last_units = None

    def goal(self, t_s: float, world: VirtualWorld) -> FloatArray:
        """The goal at `t_s`, [6] in units. Plans anew when there is no plan, or when it has come apart."""
        if self._last_units is None:
            self._last_units = units_from_rad(world.position_rad)
        if not self.segments or self._came_apart(t_s, world):
            self.segments = self._plan(world, self._last_units)
            self._start_s = t_s
        self._last_units = self.planned(t_s)
        return self._last_units

    def planned(self, t_s: float) -> FloatArray:
        """What the present plan says for `t_s`, with no look at the world."""
        left = t_s - self._start_s
        for segment in self.segments:
            if left < segment.duration_s:
                return segment.at(left)
            left -= segment.duration_s
        return np.array(self.segments[-1].knots_units[-1])

    def phase(self, t_s: float) -> str:
        left = t_s - self._start_s
        for segment in self.segments:
            if left < segment.duration_s:
                return segment.name
            left -= segment.duration_s
        return "rest"

    def _came_apart(self, t_s: float, world: VirtualWorld) -> bool:
        phase = self.phase(t_s)
        moved = float(np.linalg.norm((world.cube_position_m - self._grasp_at_m)[:2]))
        if phase in ("reach", "down"):
            return moved > SLIPPED_M
        if phase in ("lift", "carry"):
            return float(np.linalg.norm(world.cube_position_m - world.grasp_point_m)) > LOST_M
        return phase == "rest" and not world.done and world.cube_position_m[2] < CUBE_SIDE_M

    def _plan(self, world: VirtualWorld, start_units: FloatArray) -> list[Segment]:
        """The whole task from `start_units`, for the cube where it is now."""
        path = _Path(self.kinematics, start_units)
        if world.done:
            return path.move("retreat", HOME_UNITS, 0.8).segments
        cube, yaw = world.cube_position_m, _jaw_yaw(world.cube_yaw_rad)
        cube[2] = CUBE_SIDE_M / 2  # where it will lie, should it still be falling
        self._grasp_at_m = cube
        before = cube - STANDOFF_M * np.array([np.cos(yaw), np.sin(yaw), 0.0])
        hand = world.grasp_point_m
        if hand[2] < cube[2] + 0.75 * HOVER_M:  # out from between things first
            path.straight("rise", [hand[0], hand[1], HOVER_M + 0.02], yaw, max(start_units[GRIPPER], OPEN_UNITS), 0.4)
        path.move("reach", path.pose(before + HOVER_M * _UP, yaw, OPEN_UNITS), 0.9)
        path.straight("down", before, yaw, OPEN_UNITS, 0.7)
        path.move("close", path.pose(cube, yaw, CLOSED_UNITS), 0.7)
        path.straight("lift", cube + CARRY_M * _UP, yaw, CLOSED_UNITS, 0.7)
        over = path.pose([*TRAY_CENTRE_M, CUBE_SIDE_M / 2 + RELEASE_M], _TRAY_YAW_RAD, CLOSED_UNITS)
        path.move("carry", over, 1.0)
        path.move("open", np.append(over[ARM], OPEN_UNITS), 0.5)
        return path.move("retreat", HOME_UNITS, 0.8).segments


class _Path:
    """A plan in the making: segments that follow one another from a start."""

    def __init__(self, kinematics: Kinematics, start_units: FloatArray) -> None:
        self._kinematics = kinematics
        self._here = start_units
        self.segments: list[Segment] = []

    def pose(self, place_m: ArrayLike, yaw_rad: float, gripper_units: float) -> FloatArray:
        """Goal units for the hand at a place: the solution nearest to the path's end."""
        return self._pose_near(self._here, place_m, yaw_rad, gripper_units)

    def move(self, name: str, end_units: FloatArray, least_s: float) -> _Path:
        """Straight in the joints' space."""
        return self._add(_timed(name, np.stack([self._here, end_units]), least_s))

    def straight(self, name: str, end_m: ArrayLike, yaw_rad: float, gripper_units: float, least_s: float) -> _Path:
        """Along a straight line of the hand, through a few solved knots."""
        start = self._here
        start_m = self._kinematics.grasp_point_m(rad_from_units(start))
        knots = [start]
        for u in np.linspace(0, 1, 9)[1:]:
            gripper = start[GRIPPER] + u * (gripper_units - start[GRIPPER])
            knots.append(self._pose_near(knots[-1], start_m + u * (np.asarray(end_m) - start_m), yaw_rad, gripper))
        return self._add(_timed(name, np.stack(knots), least_s))

    def _pose_near(self, near_units: FloatArray, place_m: ArrayLike, yaw_rad: float, gripper: float) -> FloatArray:
        rad = rad_from_units(near_units)
        rad[ARM] = self._kinematics.solve(place_m, yaw_rad, rad)
        return np.append(units_from_rad(rad)[ARM], gripper)

    def _add(self, segment: Segment) -> _Path:
        self.segments.append(segment)
        self._here = segment.knots_units[-1]
        return self


def _jaw_yaw(cube_yaw_rad: float) -> float:
    """The direction from the fixed to the moving finger: along the cube's face that looks away from the arm."""
    quarter = np.pi / 2
    return float((cube_yaw_rad + quarter / 2) % quarter - quarter / 2)
