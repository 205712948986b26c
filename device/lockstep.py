"""The virtual cell in simulated time: the same controller, ensemble, guard, servo firmware and engine, no clock.

`understudy demo --lockstep` and the tests run episodes in it: deterministic by seed whatever else the machine does, and
as fast as physics, rendering and inference allow. What is simulated besides the world is time itself: a frame is taken
every 33 ms, its chunk becomes known after an inference time that is given, not measured.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from device.arm import decode
from device.bundle import STATE, Bundle
from device.config import LoadedCell
from device.controller import Controller
from device.engine import Engine, open_engine
from device.ensemble import ChunkEnsemble
from device.execute import ensemble_for
from device.messages import goals_dtype, joints_dtype
from device.predict import advance_ns
from device.sampling import draw_noise
from device.virtual_camera import JPEG_QUALITY
from device.virtual_cell import TIMESTEP_S, LockstepCell
from firmware_bridge.bus import ServoState

Floats = NDArray[np.float64]

_STEP_NS = round(TIMESTEP_S * 1e9)
# What an observation goes through before its chunk is there, without the inference itself: exposure to topic, decoding.
CAPTURE_NS = 12_000_000
NOMINAL_INFERENCE_MS = 25.0
LINGER_S = 0.5


@dataclass(frozen=True)
class LockstepEpisode:
    """How an episode went. `seconds` of simulated time until the task was done, None where it was not."""

    seed: int
    seconds: float | None
    progress: str
    goals: NDArray[Any]  # goals_dtype, one a tick
    holds: int
    fault: str | None


@dataclass(frozen=True)
class _Look:
    """What all cameras saw, and where the joints were."""

    t_ns: int
    jpegs: dict[str, bytes]  # by the policy's inputs
    position: Floats


class LockstepPolicy:
    """A bundle's engine, with the time that an inference is made to take. `jitter`: its spread, by seed."""

    def __init__(self, bundle: Bundle, inference_ns: int, threads: int = 1, jitter: float = 0.3) -> None:
        self.bundle = bundle
        self.engine: Engine = open_engine(bundle, threads)
        self._inference_ns = inference_ns
        self._jitter = jitter
        self._period_ns = round(1e9 / bundle.manifest.action_rate_hz)
        self._episodes = 0
        self._looks: deque[_Look] = deque()  # oldest first
        self._noise = np.random.default_rng()

    def begin(self, seed: int) -> None:
        """Forget what was seen; from here on `seed` alone decides what a policy that samples draws."""
        self._episodes += 1
        self._looks.clear()
        self._noise = np.random.default_rng([seed, 11])

    def look(self, t_ns: int, world: Any, position: Floats) -> None:
        """Take a frame with every camera, as JPEG as in the real cell, with the joints' positions at that time."""
        jpegs = {
            camera.input: simplejpeg.encode_jpeg(world.render(camera.name), quality=JPEG_QUALITY, colorspace="RGB")
            for camera in self.bundle.manifest.cameras
        }
        self._looks.append(_Look(t_ns, jpegs, np.array(position)))
        while self._looks[0].t_ns < t_ns - self.bundle.manifest.observation_steps * self._period_ns:
            self._looks.popleft()

    def chunk(self) -> tuple[int, NDArray[np.float32]] | None:
        """Infer on the newest look and those of the steps before it, as `predict` chooses them.

        Returns its time and a copy of the actions, [K, J]; None while there are no looks from that long ago.
        """
        steps = self._steps()
        if steps is None:
            return None
        keys = [(self._episodes, look.t_ns) for look in steps]
        for key, look in zip(keys, steps, strict=True):
            if not self.engine.knows(key):
                for name, jpeg in look.jpegs.items():
                    simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=self.engine.inputs[name])
                self.engine.inputs[STATE][...] = look.position
                self.engine.observe(key)
        noise = draw_noise(self.bundle.manifest, self._noise)
        return steps[-1].t_ns, np.array(self.engine.infer(keys, **noise), np.float32)

    def _steps(self) -> list[_Look] | None:
        newest, steps = self._looks[-1], []
        for back in range(self.bundle.manifest.observation_steps - 1, -1, -1):
            then_ns = newest.t_ns - back * self._period_ns
            nearest = min(self._looks, key=lambda look: abs(look.t_ns - then_ns))
            if 2 * abs(nearest.t_ns - then_ns) > self._period_ns:
                return None
            steps.append(nearest)
        return steps

    def takes_ns(self, rng: np.random.Generator) -> int:
        return round(self._inference_ns * (1.0 + self._jitter * rng.uniform(-1.0, 1.0)))


def run_episode(cell: LoadedCell, policy: LockstepPolicy, seed: int, time_limit_s: float) -> LockstepEpisode:
    """One cube, from home, in policy mode until it is in the tray or the time is up."""
    return _Episode(cell, policy, seed).run(time_limit_s)


class _Episode:
    def __init__(self, cell: LoadedCell, policy: LockstepPolicy, seed: int) -> None:
        self._cell = cell
        self._policy = policy
        self._seed = seed
        self._lockstep = LockstepCell(cell, seed)
        policy.begin(seed)
        self._rng = np.random.default_rng([seed, 7])
        self._ensemble: ChunkEnsemble = ensemble_for(cell, policy.bundle)
        self._controller = Controller(cell, self._ensemble)
        self._state = ServoState(len(cell.servo_ids))
        self._reading = np.zeros((), joints_dtype(len(cell.servo_ids)))
        self._goals: list[Any] = []
        self._pending: deque[tuple[int, int, NDArray[np.float32]]] = deque()  # known at, observed at, actions
        self._engine_free_ns = 0
        self._due_ns = 0
        manifest = policy.bundle.manifest
        self._dt_ns = round(1e9 / manifest.action_rate_hz)
        self._advance_ns = advance_ns(manifest, cell.cell.policy.advance)
        fps = min((cell.cell.cameras[camera.name].fps for camera in manifest.cameras), default=30.0)
        self._frame_ns = round(1e9 / fps)
        self._next_frame_ns = 0
        # A frame that nobody will look at need not be drawn; a policy of several steps looks at them later.
        self._looks_back = manifest.observation_steps > 1
        self._unused = False  # a look that no inference has begun with

    def run(self, time_limit_s: float) -> LockstepEpisode:
        period_ns = round(1e9 / self._cell.cell.control.rate_hz)
        self._read(0)
        self._controller.guard.rest_at(self._reading["position"])
        self._controller.request({"verb": "mode", "mode": "policy"}, 0)
        done_ns, t_ns = 0, 0
        while t_ns < time_limit_s * 1e9 and (not done_ns or t_ns < done_ns + LINGER_S * 1e9):
            self._physics_until(t_ns)
            self._tick(t_ns)
            if not done_ns and self._lockstep.world.done:
                done_ns = t_ns
            t_ns += period_ns
        progress = self._lockstep.world.progress().value
        done = bool(done_ns) and progress == "done"
        self._lockstep.world.close()
        goals = np.array([goal[()] for goal in self._goals], dtype=self._goals[0].dtype)
        return LockstepEpisode(
            self._seed,
            round(done_ns / 1e9, 2) if done else None,
            progress,
            goals,
            self._controller.holds,
            self._controller.fault,
        )

    def _physics_until(self, t_ns: int) -> None:
        """Advance the world to t_ns; looks where a frame falls due, and lets a finished inference be known."""
        bank = self._lockstep.bank
        while round(bank.time_s * 1e9) + _STEP_NS <= t_ns:
            self._lockstep.step()
            now_ns = round(bank.time_s * 1e9)
            free = now_ns >= max(self._engine_free_ns, self._due_ns)
            if now_ns >= self._next_frame_ns and (free or self._looks_back):
                self._read(now_ns)
                self._policy.look(now_ns, self._lockstep.world, self._reading["position"])
                self._next_frame_ns = (now_ns // self._frame_ns + 1) * self._frame_ns
                self._unused = True
            if free and self._unused:
                self._infer(now_ns)

    def _infer(self, now_ns: int) -> None:
        self._unused = False
        chunk = self._policy.chunk()
        if chunk is not None:
            observed_ns, actions = chunk
            self._due_ns = observed_ns + self._advance_ns
            self._engine_free_ns = now_ns + self._policy.takes_ns(self._rng)
            self._pending.append((self._engine_free_ns + CAPTURE_NS, observed_ns, actions))

    def _tick(self, t_ns: int) -> None:
        self._read(t_ns)
        self._controller.observe(t_ns, self._reading)
        while self._pending and self._pending[0][0] <= t_ns:
            _, observed_ns, actions = self._pending.popleft()
            self._ensemble.add(t_ns, observed_ns, self._dt_ns, actions)
        decision = self._controller.step(t_ns)
        self._send(self._cell.units.to_raw(decision.goal), decision.to)
        self._record(t_ns, decision)

    def _read(self, t_ns: int) -> None:
        bank, state = self._lockstep.bank, self._state
        state.t_ns = t_ns
        state.valid[:] = True
        for index, servo in enumerate(self._cell.servo_ids):
            state.position_raw[index] = bank.read_register(servo, "Present_Position")
            state.velocity_raw[index] = bank.read_register(servo, "Present_Velocity")
            state.load_raw[index] = bank.read_register(servo, "Present_Load")
            state.voltage_raw[index] = bank.read_register(servo, "Present_Voltage")
            state.temperature_raw[index] = bank.read_register(servo, "Present_Temperature")
            state.error[index] = bank.error(index)
        decode(state, self._cell.units, self._reading, 0)

    def _send(self, goal_raw: NDArray[np.int32], to: NDArray[np.bool_]) -> None:
        for servo, goal, there in zip(self._cell.servo_ids, goal_raw, to, strict=True):
            if there:
                self._lockstep.bank.write_register(servo, "Goal_Position", int(goal))

    def _record(self, t_ns: int, decision: Any) -> None:
        record = np.zeros((), goals_dtype(len(self._cell.servo_ids)))
        choice = decision.choice
        record["t_ns"], record["tick"] = t_ns, len(self._goals)
        record["requested"], record["goal"] = decision.requested, decision.goal
        record["mode"], record["holding"] = self._controller.mode, decision.holding
        record["chunk_age_ns"] = -1 if choice is None else choice.age_ns
        record["boundary"] = 0 if choice is None else choice.changed
        self._goals.append(record)
