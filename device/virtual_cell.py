"""The `world` role of the virtual cell: MuJoCo's physics under emulated servo firmware behind a real pty.

One process, one loop: advance firmware and physics to now in steps of 2 ms, answer what the bus asked, publish the
state for the cameras. The roles above notice no difference to an arm: they open a serial port and find servos that
were calibrated, homing offsets and limits in their EEPROM. Requests on `world.sock` put the cube somewhere else and
inject faults. `LockstepCell` is the same coupling without pty and without a clock, for stepping faster than real time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device import realtime
from device.config import LoadedCell, WorldConfig
from device.log import event
from device.messages import TOPICS, world_dtype
from device.request_socket import RequestSocket
from device.topic import TopicWriter, topic_path
from device.virtual_world import VirtualWorld
from firmware_bridge.servo_faults import parse_faults
from firmware_bridge.servo_model import ServoBank
from firmware_bridge.virtual_servos import VirtualServos

logger = logging.getLogger("world")

TIMESTEP_S = 0.002
_PUBLISH_EVERY = 2  # steps: the cameras see states at most 4 ms old
_PROGRESS_EVERY = 10  # steps
_LONGEST_CATCH_UP_S = 0.1
EMULATED_HARDWARE_PRIORITY = 40

Floats = NDArray[np.float64]


class WorldPlant:
    """What the servo horns are attached to: the joints of a VirtualWorld."""

    def __init__(self, world: VirtualWorld) -> None:
        self._world = world
        self.position_rad: Floats = world.position_rad
        self.velocity_rad_s: Floats = world.velocity_rad_s
        self.effort: Floats = np.zeros(len(world.JOINTS))

    def step(self, dt_s: float, setpoint_rad: Floats, torque_on: NDArray[np.bool_]) -> None:
        for _ in range(round(dt_s / self._world.timestep_s)):
            self._world.step(setpoint_rad, torque_on)
        self.position_rad = self._world.position_rad
        self.velocity_rad_s = self._world.velocity_rad_s
        self.effort = self._world.effort


class LockstepCell:
    """World and calibrated servos, advanced by `step`: deterministic by seed, as fast as the processor allows."""

    def __init__(self, cell: LoadedCell, seed: int) -> None:
        self.world = VirtualWorld(TIMESTEP_S)
        self.world.reset(seed)
        offsets = [joint.homing_offset for joint in cell.calibration]
        self.bank = ServoBank(cell.servo_ids, WorldPlant(self.world), encoder_offset_raw=offsets)
        for servo, joint in zip(cell.servo_ids, cell.calibration, strict=True):
            calibrate(self.bank, servo, joint.homing_offset, joint.range_min, joint.range_max)
            self.bank.write_register(servo, "Torque_Enable", 1)  # an arm that was left holding

    def step(self) -> None:
        """Advance by TIMESTEP_S."""
        self.bank.step(TIMESTEP_S)


def calibrate(bank: ServoBank, servo: int, homing_offset: int, range_min: int, range_max: int) -> None:
    """Write a calibration into a servo's EEPROM, as the set-up of a real arm leaves it."""
    bank.write_register(servo, "Lock", 0)
    bank.write_register(servo, "Return_Delay_Time", 0)
    bank.write_register(servo, "Homing_Offset", homing_offset)
    bank.write_register(servo, "Min_Position_Limit", range_min)
    bank.write_register(servo, "Max_Position_Limit", range_max)
    bank.write_register(servo, "Lock", 1)


class WorldRole:
    """The loop's state."""

    def __init__(self, cell: LoadedCell, runtime: Path) -> None:
        settings = cell.cell.world or WorldConfig()
        self._lockstep = LockstepCell(cell, settings.seed)
        self._world = self._lockstep.world
        self._servos = VirtualServos(self._lockstep.bank)
        self._port = runtime / "servos"
        state_size = len(self._world.state())
        self._topic = TopicWriter(topic_path(runtime, "world"), world_dtype(state_size), TOPICS["world"].slots)
        self._requests = RequestSocket(runtime, "world", self._on_request)
        self._seed = settings.seed
        self._episode = 0
        self._t_start_ns = time.monotonic_ns()
        self._t_done_ns = 0
        self._progress = self._world.progress().value
        self._steps = 0
        self.skipped_s = 0.0

    def run(self, stop: Callable[[], bool]) -> None:
        # Emulated hardware does not wait for a core, where the system allows that; it stays below the control loop.
        for refusal in realtime.prepare(EMULATED_HARDWARE_PRIORITY, None):
            event(logger, "realtime.refused", reason=refusal)
        self._servos.link(self._port)  # from here on the bus answers
        event(logger, "world.ready", servos=self._servos.path, seed=self._seed)
        step_ns = round(TIMESTEP_S * 1e9)
        due_ns = time.monotonic_ns()
        while not stop():
            now_ns = time.monotonic_ns()
            if now_ns - due_ns > _LONGEST_CATCH_UP_S * 1e9:
                self.skipped_s += (now_ns - due_ns) / 1e9  # the machine stood still; the world stood still with it
                due_ns = now_ns
            while due_ns <= now_ns:
                self._step(due_ns)
                due_ns += step_ns
            self._servos.serve_once(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
            self._requests.poll()

    def close(self) -> None:
        self._requests.close()
        self._servos.stop()
        self._topic.close()

    def _step(self, t_ns: int) -> None:
        self._lockstep.step()
        self._steps += 1
        if self._steps % _PROGRESS_EVERY == 0:
            self._progress = self._world.progress().value
            if self._progress == "done" and not self._t_done_ns:
                self._t_done_ns = t_ns
                event(logger, "task.done", episode=self._episode, after_s=(t_ns - self._t_start_ns) / 1e9)
        if self._steps % _PUBLISH_EVERY == 0:
            self._topic.publish(
                t_ns=t_ns,
                episode=self._episode,
                seed=self._seed,
                t_start_ns=self._t_start_ns,
                t_done_ns=self._t_done_ns,
                progress=self._progress.encode(),
                state=self._world.state(),
            )

    def _on_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """`episode` with a seed puts the cube where that seed says; `faults` scripts faults into the servos."""
        if request["verb"] == "episode":
            self._seed = int(request["seed"])
            self._world.scatter(self._seed)
            self._episode += 1
            self._t_start_ns = time.monotonic_ns()
            self._t_done_ns = 0
            return {"ok": True, "episode": self._episode}
        if request["verb"] == "faults":
            for fault in parse_faults(request["faults"]):
                self._servos.add_fault(fault)
            return {"ok": True}
        return {"ok": False, "why": f"{request['verb']!r} is not a request; known are episode, faults"}


def run(cell: LoadedCell, runtime: Path, stop: Callable[[], bool]) -> None:
    """Run the role until `stop()`."""
    role = WorldRole(cell, runtime)
    try:
        role.run(stop)
    finally:
        role.close()
