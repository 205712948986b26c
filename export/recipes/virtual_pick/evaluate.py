"""Measure a diffusion checkpoint's success in closed loop, in LeRobot itself and in simulated time.

A person runs this while or after `train_diffusion.py` trains, with the same Python. It answers before any export how
good the policy is, and what fewer denoising steps cost; `understudy demo --lockstep` measures bundles. Episodes run
side by side, one batch of inferences for all, each with a cube place of its own that no demonstration has. A chunk is
sampled from the last observations, becomes known after a delay, is executed at the times that it was meant for, and
hands over to the next one by crossfade, as on the device. An episode succeeds when the cube lies in the tray, released,
and still does half a second later.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
import simplejpeg
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import OBS_IMAGES
from numpy.typing import NDArray

from device.ensemble import ChunkEnsemble
from device.virtual_world import CAMERAS, JOINT_RANGE_RAD, VirtualWorld, rad_from_units, units_from_rad
from export.recipes.virtual_pick.demonstrations import JOINT_COUNT, image_key

FloatArray = NDArray[np.float64]

CONTROL_HZ, FRAME_HZ, JPEG_QUALITY = 60, 30, 90
TICKS_PER_FRAME = CONTROL_HZ // FRAME_HZ
DELAY_S = (0.030, 0.060)  # from the newest picture until its chunk is known
LINGER_S = 0.5
TORQUE = np.ones(JOINT_COUNT, dtype=bool)


class Policy:
    """A LeRobot checkpoint as a function from the last raw observations to a chunk in goal units."""

    def __init__(self, checkpoint: Path, solver: str | None, steps: int | None) -> None:
        self.config = PreTrainedConfig.from_pretrained(checkpoint, local_files_only=True)
        if self.config.type != "diffusion":
            raise SystemExit(
                f"{checkpoint}: type: {self.config.type}; this evaluates diffusion (others: demo --lockstep)"
            )
        self.config.noise_scheduler_type = solver or self.config.noise_scheduler_type
        self.config.num_inference_steps = steps or self.config.num_inference_steps
        self.policy = DiffusionPolicy.from_pretrained(
            checkpoint, config=self.config, local_files_only=True, strict=True
        )
        self.pre, self.post = make_pre_post_processors(self.config, pretrained_path=str(checkpoint))

    def chunks(self, seen: list[list[Observation]]) -> FloatArray:
        """Actions [B, K, 6] for B robots' last observations."""
        batch = {"observation.state": torch.tensor(np.array([[o.state for o in last] for last in seen])).float()}
        for camera in CAMERAS:
            pictures = torch.from_numpy(np.array([[o.pictures[camera] for o in last] for last in seen]))
            batch[image_key(camera)] = pictures.movedim(-1, -3).float() / 255
        with torch.inference_mode():
            batch = self.pre(batch)
            batch[OBS_IMAGES] = torch.stack([batch[key] for key in self.config.image_features], dim=-4)
            actions = self.policy.diffusion.generate_actions(batch)
            return np.asarray(self.post(actions).double().numpy())


class Observation:
    """What the cameras see now, through JPEG as in the cell, and the joints."""

    def __init__(self, world: VirtualWorld) -> None:
        jpegs = {c: simplejpeg.encode_jpeg(world.render(c), quality=JPEG_QUALITY) for c in CAMERAS}
        self.pictures = {c: simplejpeg.decode_jpeg(jpeg) for c, jpeg in jpegs.items()}
        self.state = units_from_rad(world.position_rad)


class Run:
    """One episode in flight."""

    def __init__(self, seed: int, policy: Policy) -> None:
        config = policy.config
        self.seed, self.rng = seed, np.random.default_rng([seed, 2])
        height, width = config.input_features[image_key(CAMERAS[0])].shape[1:]
        self.world = VirtualWorld(image_hw=(height, width))
        self.world.reset(seed)
        self.seen: deque[Observation] = deque([Observation(self.world)] * config.n_obs_steps, config.n_obs_steps)
        self.dt_ns = round(1e9 / FRAME_HZ)
        staleness_ns = config.n_action_steps * self.dt_ns
        self.ensemble = ChunkEnsemble(JOINT_COUNT, config.n_action_steps, method="crossfade", staleness_ns=staleness_ns)
        self.pending: deque[tuple[int, int, FloatArray]] = deque()  # known at, observed at, actions
        self.goal = units_from_rad(self.world.position_rad)
        self.done_s: float | None = None
        self.over = False

    def expect(self, now_s: float, actions: FloatArray) -> None:
        """A chunk was sampled from what is seen now; it will be known in a moment."""
        self.pending.append((round((now_s + self.rng.uniform(*DELAY_S)) * 1e9), round(now_s * 1e9), actions))

    def tick(self, now_s: float, end_s: float) -> None:
        """Control from now_s on, and physics until end_s."""
        now_ns = round(now_s * 1e9)
        while self.pending and self.pending[0][0] <= now_ns:
            _, observed_ns, actions = self.pending.popleft()
            self.ensemble.add(now_ns, observed_ns, self.dt_ns, actions)
        choice = self.ensemble.at(now_ns)
        if choice is not None:
            self.goal = choice.action.copy()
        setpoint = np.clip(rad_from_units(self.goal), JOINT_RANGE_RAD[:, 0], JOINT_RANGE_RAD[:, 1])
        while self.world.time_s < end_s - self.world.timestep_s / 2:
            self.world.step(setpoint, TORQUE)
        if self.done_s is None and self.world.done:
            self.done_s = end_s
        self.over = self.done_s is not None and end_s >= self.done_s + LINGER_S

    def result(self) -> dict[str, Any]:
        """The verdict; closes the world."""
        progress = self.world.progress().value
        self.world.close()
        seconds = round(self.done_s, 2) if self.done_s is not None and progress == "done" else None
        return {"seed": self.seed, "seconds": seconds, "progress": progress}


def evaluate(policy: Policy, seeds: list[int], every: int, limit_s: float) -> list[dict[str, Any]]:
    """All `seeds` side by side; a chunk every `every` frames."""
    runs = [Run(seed, policy) for seed in seeds]
    for tick in range(int(limit_s * CONTROL_HZ)):
        now_s = tick / CONTROL_HZ
        active = [run for run in runs if not run.over]
        if not active:
            break
        frame, between = divmod(tick, TICKS_PER_FRAME)
        if between == 0 and -frame % every < policy.config.n_obs_steps:  # pictures that nobody uses are not drawn
            for run in active:
                run.seen.append(Observation(run.world))
            if frame % every == 0:
                for run, actions in zip(active, policy.chunks([list(run.seen) for run in active]), strict=True):
                    run.expect(now_s, actions)
        for run in active:
            run.tick(now_s, (tick + 1) / CONTROL_HZ)
    return [run.result() for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a diffusion checkpoint's success in closed loop.")
    parser.add_argument("checkpoint", type=Path, help="a folder with config.json and model.safetensors")
    parser.add_argument("--solver", choices=("DDPM", "DDIM"), help="instead of the checkpoint's own")
    parser.add_argument("--steps", type=int, help="denoising steps, instead of the checkpoint's own")
    parser.add_argument("--every", type=int, default=8, help="frames from one chunk to the next")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1000, help="of the first cube place")
    parser.add_argument("--batch", type=int, default=10, help="episodes side by side")
    parser.add_argument("--time-limit-s", type=float, default=25.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    policy, results = Policy(args.checkpoint, args.solver, args.steps), []
    seeds = range(args.seed, args.seed + args.episodes)
    for first in range(0, len(seeds), args.batch):
        for result in evaluate(policy, list(seeds[first : first + args.batch]), args.every, args.time_limit_s):
            results.append(result)
            print(json.dumps(result), flush=True)
    successes = sum(result["seconds"] is not None for result in results)
    print(json.dumps({"episodes": len(results), "successes": successes}), flush=True)


if __name__ == "__main__":
    main()
