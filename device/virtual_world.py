"""The physics of the virtual cell: an SO-101 arm, a table, a cube and a tray, in MuJoCo.

The virtual cell couples this world with the emulated servo firmware: the firmware hands over one set point a joint
and whether its torque is on, the world answers with positions, speeds and efforts. Camera processes hold a world of
their own, which they set to a published state and render; so a process that only steps never opens a display.
The arm is drawn from our own capsules and boxes; its kinematics, masses and servo constants are those of the
SO-ARM100 project's "new calibration" model. Everything that is random comes from the seed given to `reset`: the
same seed and the same set points give the same states, bit for bit.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from device.mujoco_headless import mujoco

FloatArray = NDArray[np.float64]

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = ("front", "wrist")
JOINT_RANGE_RAD: FloatArray = np.array(
    [
        [-1.9199, 1.9199],
        [-1.7453, 1.7453],
        [-1.6900, 1.6900],
        [-1.6581, 1.6581],
        [-2.7438, 2.8412],
        [-0.1745, 1.7453],
    ]
)
GRIPPER = JOINTS.index("gripper")
STALL_TORQUE_N_M = 2.94  # STS3215 at 7.4 V

# A stiff servo that follows goals which arrive in steps drives and brakes in turn within each step. A load sampled in
# time with those steps would always see the braking; averaged over a few of them it is the work that the joint does.
EFFORT_TIME_S = 0.05

# The gripper's servo is held to a quarter of its stall torque: eleven newtons at the fingertips carry the cube a
# hundred times over, and a real STS3215 may hold that for ever without its overload protection (25 %) acting.
GRIPPER_TORQUE_N_M = 0.72

CUBE_SIDE_M = 0.028
CUBE_REGION_M: FloatArray = np.array([[0.15, 0.27], [-0.08, 0.08]])  # where its centre may start, x and y
CUBE_YAW_RAD = 0.26
TRAY_CENTRE_M: FloatArray = np.array([0.17, -0.19])
TRAY_HALF_M = 0.05

# Home: the hand above the near edge of the table, jaws half open, looking down.
HOME_RAD: FloatArray = np.radians([0.0, -35.0, 20.0, 85.0, 0.0, 10.0])

_MJCF = """
<mujoco model="understudy virtual cell">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{timestep}" integrator="implicitfast" cone="elliptic" impratio="10" noslip_iterations="2"/>
  <visual>
    <global offwidth="640" offheight="480"/>
    <quality shadowsize="1024" offsamples="4"/>
    <headlight ambient="0.38 0.38 0.38" diffuse="0.30 0.30 0.30" specular="0.1 0.1 0.1"/>
    <map znear="0.02" zfar="10"/>
  </visual>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.55 0.60 0.66" rgb2="0.55 0.60 0.66" width="8" height="8"/>
  </asset>
  <default>
    <default class="arm">
      <joint axis="0 0 1" damping="0.60" frictionloss="0.052" armature="0.028"/>
      <geom contype="2" conaffinity="0" mass="0" rgba="0.93 0.62 0.16 1"/>
      <position kp="998.22" kv="2.731" forcerange="-{stall} {stall}"/>
    </default>
    <default class="servo"><geom contype="2" conaffinity="0" mass="0" rgba="0.13 0.13 0.14 1"/></default>
    <default class="finger">
      <geom type="box" contype="3" conaffinity="1" condim="4" friction="1.3 0.02 0.001" mass="0"
            solref="0.006 1" solimp="0.95 0.99 0.001" rgba="0.93 0.62 0.16 1"/>
    </default>
    <default class="scenery"><geom type="box" contype="1" conaffinity="3" friction="0.6 0.005 0.0001"/></default>
  </default>
  <worldbody>
    <light name="sun" pos="0.25 0.25 1.2" dir="-0.05 -0.25 -1" directional="true" castshadow="false"
           diffuse="0.55 0.55 0.55" specular="0.1 0.1 0.1"/>
    <geom name="table" class="scenery" pos="0.2 0 -0.02" size="0.45 0.5 0.02" rgba="0.78 0.80 0.78 1"/>
    <camera name="front" pos="{front_pos}" xyaxes="{front_axes}" fovy="{front_fovy}"/>
    <body name="tray" pos="{tray_x} {tray_y} 0">
      <geom class="scenery" pos="0 0 0.002" size="{th} {th} 0.002" rgba="0.16 0.33 0.72 1"/>
      <geom class="scenery" pos=" {tw} 0 0.011" size="0.003 {to} 0.011" rgba="0.12 0.25 0.58 1"/>
      <geom class="scenery" pos="-{tw} 0 0.011" size="0.003 {to} 0.011" rgba="0.12 0.25 0.58 1"/>
      <geom class="scenery" pos="0  {tw} 0.011" size="{to} 0.003 0.011" rgba="0.12 0.25 0.58 1"/>
      <geom class="scenery" pos="0 -{tw} 0.011" size="{to} 0.003 0.011" rgba="0.12 0.25 0.58 1"/>
    </body>
    <body name="cube" pos="0.2 0 {ch}">
      <freejoint name="cube"/>
      <geom name="cube" type="box" size="{ch} {ch} {ch}" mass="0.020" contype="1" conaffinity="1" condim="4"
            friction="0.8 0.01 0.0001" solref="0.006 1" solimp="0.95 0.99 0.001" rgba="0.85 0.10 0.12 1"/>
    </body>
    <body name="base" childclass="arm">
      <geom type="box" pos="0.0 0 0.03" size="0.045 0.035 0.03" class="servo"/>
      <geom type="cylinder" pos="0.0388 0 0.03" size="0.032 0.03"/>
      <body name="shoulder" pos="0.0388353 0 0.0624" quat="0 0 -1 0">
        <inertial pos="-0.02 0 -0.03" mass="0.100" diaginertia="8e-5 8e-5 8e-5"/>
        <joint name="shoulder_pan" range="-1.9199 1.9199"/>
        <geom type="capsule" fromto="0 0 0 -0.0304 0 -0.0542" size="0.024"/>
        <geom type="cylinder" fromto="-0.0304 -0.03 -0.0542 -0.0304 0.03 -0.0542" size="0.020" class="servo"/>
        <body name="upper_arm" pos="-0.0303992 -0.0182778 -0.0542" quat="0.5 -0.5 -0.5 -0.5">
          <inertial pos="-0.07 -0.01 0.018" mass="0.103" diaginertia="4e-5 1.5e-4 1.5e-4"/>
          <joint name="shoulder_lift" range="-1.7453 1.7453"/>
          <geom type="capsule" fromto="0 0 0.018 -0.1126 -0.028 0.018" size="0.017"/>
          <geom type="cylinder" fromto="-0.1126 -0.028 -0.008 -0.1126 -0.028 0.044" size="0.019" class="servo"/>
          <body name="lower_arm" pos="-0.11257 -0.028 0" quat="0.7071068 0 0 0.7071068">
            <inertial pos="-0.08 0 0.018" mass="0.104" diaginertia="4e-5 1.7e-4 1.7e-4"/>
            <joint name="elbow_flex" range="-1.69 1.69"/>
            <geom type="capsule" fromto="0 0 0.018 -0.1349 0.0052 0.018" size="0.015"/>
            <geom type="cylinder" fromto="-0.1349 0.0052 -0.006 -0.1349 0.0052 0.042" size="0.017" class="servo"/>
            <body name="wrist" pos="-0.1349 0.0052 0" quat="0.7071068 0 0 -0.7071068">
              <inertial pos="0 -0.035 0.018" mass="0.079" diaginertia="4e-5 3e-5 4e-5"/>
              <joint name="wrist_flex" range="-1.6581 1.6581"/>
              <geom type="capsule" fromto="0 0 0.018 0 -0.045 0.018" size="0.014"/>
              <body name="gripper" pos="0 -0.0611 0.0181" quat="0.0172091 -0.0172091 0.706897 0.706897">
                <inertial pos="0 0 -0.04" mass="0.087" diaginertia="5e-5 5e-5 3e-5"/>
                <joint name="wrist_roll" range="-2.7438 2.8412"/>
                <geom type="cylinder" fromto="0 0 0.012 0 0 -0.010" size="0.016" class="servo"/>
                <geom type="box" pos="0.002 0 -0.018" size="0.026 0.013 0.012" class="servo"/>
                <geom class="finger" name="fixed_finger" pos="-0.0165 0 -0.068" size="0.0045 0.010 0.040"/>
                <site name="grasp" pos="0.002 0 -0.098" size="0.003" rgba="0 0 0 0"/>
                <geom type="box" pos="0 {wrist_y} -0.006" size="0.012 0.008 0.008" class="servo"/>
                <camera name="wrist" pos="{wrist_pos}" xyaxes="{wrist_axes}" fovy="{wrist_fovy}"/>
                <body name="moving_jaw" pos="0.0202 0.0188 -0.0234" quat="0.7071068 0.7071068 0 0">
                  <inertial pos="0 -0.04 0.0188" mass="0.012" diaginertia="1e-5 1e-5 1e-5"/>
                  <joint name="gripper" range="-0.1745 1.7453"/>
                  <geom class="finger" type="cylinder" fromto="0 0 0.006 0 0 0.032" size="0.010" contype="0"
                        rgba="0.13 0.13 0.14 1"/>
                  <body name="moving_finger" pos="0 0 0.0188" euler="0 0 -{parallel}">
                    <inertial pos="0 0 0" mass="0.001" diaginertia="1e-7 1e-7 1e-7"/>
                    <geom class="finger" name="moving_finger" pos="0.0003 -0.0446 0" size="0.0045 0.040 0.010"/>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>{actuators}</actuator>
</mujoco>
"""

# The gripper angle at which the two fingers are parallel: a cube's side apart (see `moving_finger` above).
_PARALLEL_RAD = 0.21


class Progress(str, enum.Enum):
    """How far the task has come; each stage is judged from the state alone."""

    REACH = "reach"
    GRASPED = "grasped"
    LIFTED = "lifted"
    OVER_TRAY = "over_tray"
    DONE = "done"


def _look(position: ArrayLike, target: ArrayLike, up: ArrayLike) -> tuple[str, str]:
    """Position and `xyaxes` of a camera at `position` that looks at `target`, as MJCF text."""
    eye, aim = np.asarray(position, float), np.asarray(target, float)
    back = (eye - aim) / np.linalg.norm(eye - aim)
    right = np.cross(np.asarray(up, float), back)
    right /= np.linalg.norm(right)
    axes = np.concatenate([right, np.cross(back, right)])
    return " ".join(f"{v:.6g}" for v in eye), " ".join(f"{v:.6g}" for v in axes)


def build_model(timestep_s: float = 0.002) -> mujoco.MjModel:
    """The compiled MuJoCo model of the cell."""
    front_pos, front_axes = _look([0.44, -0.07, 0.44], [0.165, -0.07, 0.0], [0, 0, 1])
    wrist_pos, wrist_axes = _look([0.006, 0.062, -0.012], [0.006, 0.010, -0.105], [0, 0, 1])
    actuators = "".join(
        f'<position class="arm" name="{name}" joint="{name}" group="{i}" ctrlrange="{lo} {hi}"'
        + (f' forcerange="-{GRIPPER_TORQUE_N_M} {GRIPPER_TORQUE_N_M}"' if i == GRIPPER else "")
        + "/>"
        for i, (name, (lo, hi)) in enumerate(zip(JOINTS, JOINT_RANGE_RAD, strict=True))
    )
    wall = TRAY_HALF_M + 0.003
    return mujoco.MjModel.from_xml_string(
        _MJCF.format(
            timestep=timestep_s, stall=STALL_TORQUE_N_M, ch=CUBE_SIDE_M / 2, parallel=_PARALLEL_RAD,
            tray_x=TRAY_CENTRE_M[0], tray_y=TRAY_CENTRE_M[1], th=TRAY_HALF_M, tw=wall, to=wall + 0.003,
            front_pos=front_pos, front_axes=front_axes, front_fovy=43, wrist_y=0.055,
            wrist_pos=wrist_pos, wrist_axes=wrist_axes, wrist_fovy=75, actuators=actuators,
        )
    )  # fmt: skip


def units_from_rad(position_rad: ArrayLike) -> FloatArray:
    """Radians of the model to goal units: degrees, and 0 (closed) to 100 (open) for the gripper. Shape [..., 6]."""
    rad = np.asarray(position_rad, dtype=np.float64)
    units = np.degrees(rad)
    low, high = JOINT_RANGE_RAD[GRIPPER]
    units[..., GRIPPER] = 100.0 * (rad[..., GRIPPER] - low) / (high - low)
    return units


def rad_from_units(position_units: ArrayLike) -> FloatArray:
    """The inverse of `units_from_rad`."""
    units = np.asarray(position_units, dtype=np.float64)
    rad = np.radians(units)
    low, high = JOINT_RANGE_RAD[GRIPPER]
    rad[..., GRIPPER] = low + units[..., GRIPPER] / 100.0 * (high - low)
    return rad


class VirtualWorld:
    """One arm, one cube, one tray. `step` advances by `timestep_s`; `render` draws what a camera sees now."""

    JOINTS = JOINTS
    CAMERAS = CAMERAS

    def __init__(self, timestep_s: float = 0.002, image_hw: tuple[int, int] = (96, 96)) -> None:
        self.timestep_s = timestep_s
        self.image_hw = image_hw
        self.model = build_model(timestep_s)
        self.data = mujoco.MjData(self.model)
        self._qpos = np.array([self.model.joint(name).qposadr[0] for name in JOINTS])
        self._qvel = np.array([self.model.joint(name).dofadr[0] for name in JOINTS])
        self._cube_q = int(self.model.joint("cube").qposadr[0])
        self._cube_v = int(self.model.joint("cube").dofadr[0])
        self._cube_geom = self.model.geom("cube").id
        self._fingers = (self.model.geom("fixed_finger").id, self.model.geom("moving_finger").id)
        self._effort = np.zeros(len(JOINTS))
        self._renderer: Any = None
        self._scratch: Any = None
        self.reset(0)

    def reset(self, seed: int, home_rad: ArrayLike | None = None) -> None:
        """Put the arm at home (or at `home_rad`) and the cube at the place that `seed` stands for."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self._qpos] = HOME_RAD if home_rad is None else home_rad
        self.data.ctrl[:] = self.data.qpos[self._qpos]
        self.scatter(seed)
        self.model.opt.disableactuator = 0
        mujoco.mj_forward(self.model, self.data)

    def scatter(self, seed: int) -> None:
        """Put the cube at the place that `seed` stands for; the arm stays where it is."""
        rng = np.random.default_rng(seed)
        place = rng.uniform(CUBE_REGION_M[:, 0], CUBE_REGION_M[:, 1])
        self.place_cube(place, rng.uniform(-CUBE_YAW_RAD, CUBE_YAW_RAD))

    def place_cube(self, centre_m: ArrayLike, yaw_rad: float) -> None:
        """Put the cube on the table, at rest, with its centre above `centre_m` (x, y)."""
        place = [*np.asarray(centre_m, float), CUBE_SIDE_M / 2]
        self.data.qpos[self._cube_q : self._cube_q + 7] = [*place, np.cos(yaw_rad / 2), 0, 0, np.sin(yaw_rad / 2)]
        self.data.qvel[self._cube_v : self._cube_v + 6] = 0

    def step(self, setpoint_rad: ArrayLike, torque_on: ArrayLike) -> None:
        """One physics step; a joint whose torque is off moves freely under load and friction."""
        off = ~np.asarray(torque_on, dtype=bool)
        self.model.opt.disableactuator = int(sum(1 << i for i in np.flatnonzero(off)))
        self.data.ctrl[:] = setpoint_rad
        mujoco.mj_step(self.model, self.data)
        self._effort += self.timestep_s / EFFORT_TIME_S * (self.data.actuator_force / STALL_TORQUE_N_M - self._effort)

    @property
    def time_s(self) -> float:
        return float(self.data.time)

    @property
    def position_rad(self) -> FloatArray:
        return np.array(self.data.qpos[self._qpos])

    @property
    def velocity_rad_s(self) -> FloatArray:
        return np.array(self.data.qvel[self._qvel])

    @property
    def effort(self) -> FloatArray:
        """Motor torque over stall torque, averaged as a servo reports it: -1..1, in the order of JOINTS."""
        return np.array(self._effort)

    @property
    def cube_position_m(self) -> FloatArray:
        return np.array(self.data.qpos[self._cube_q : self._cube_q + 3])

    @property
    def grasp_point_m(self) -> FloatArray:
        """The middle of a held cube, between the fingertips."""
        return np.array(self.data.site("grasp").xpos)

    @property
    def cube_yaw_rad(self) -> float:
        w, x, y, z = self.data.qpos[self._cube_q + 3 : self._cube_q + 7]
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    def state(self) -> FloatArray:
        """Everything that a picture or a continuation needs: time, positions, speeds."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def set_state(self, state: ArrayLike) -> None:
        """Become the world whose `state()` this is (of the same model)."""
        vector = np.asarray(state, dtype=np.float64)
        nq = self.model.nq
        if vector.shape != (1 + nq + self.model.nv,):
            raise ValueError(f"a state of this world has {1 + nq + self.model.nv} numbers, not {vector.shape}")
        self.data.time = vector[0]
        self.data.qpos[:] = vector[1 : 1 + nq]
        self.data.qvel[:] = vector[1 + nq :]
        mujoco.mj_forward(self.model, self.data)

    def touching(self) -> tuple[bool, bool]:
        """Whether the cube touches the fixed finger and the moving finger."""
        contacts = self.data.contact
        pairs = {frozenset(map(int, pair)) for pair in contacts.geom[: self.data.ncon]}
        fixed, moving = (frozenset((self._cube_geom, finger)) in pairs for finger in self._fingers)
        return fixed, moving

    def progress(self) -> Progress:
        """The stage of the task, from the state alone."""
        x, y, z = self.cube_position_m
        inside = bool(np.all(np.abs([x, y] - TRAY_CENTRE_M) < TRAY_HALF_M))
        touches = self.touching()
        speed = float(np.linalg.norm(self.data.qvel[self._cube_v : self._cube_v + 6]))
        if inside and z < CUBE_SIDE_M and not any(touches) and speed < 0.05:
            return Progress.DONE
        if not all(touches):
            return Progress.REACH
        if inside:
            return Progress.OVER_TRAY
        return Progress.LIFTED if z > CUBE_SIDE_M / 2 + 0.02 else Progress.GRASPED

    @property
    def done(self) -> bool:
        """The cube lies at rest in the tray and the hand has let go of it."""
        return self.progress() is Progress.DONE

    def render(self, camera: str) -> NDArray[np.uint8]:
        """What `camera` sees now: RGB, uint8 [H, W, 3]. The first call opens the renderer (EGL or another back end)."""
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self.model, *self.image_hw)
            self._scratch = mujoco.MjData(self.model)
        # Drawn from the positions alone, so that a picture of a live world equals one of its published state:
        # mj_step leaves the geometry one step behind the positions.
        self._scratch.qpos[:] = self.data.qpos
        mujoco.mj_kinematics(self.model, self._scratch)
        mujoco.mj_comPos(self.model, self._scratch)
        mujoco.mj_camlight(self.model, self._scratch)
        self._renderer.update_scene(self._scratch, camera=camera)
        return np.array(self._renderer.render(), dtype=np.uint8)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
