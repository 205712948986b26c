"""Measure a checkpoint's success in closed loop: the policy, the virtual world and a late inference, in lockstep.

A person runs this on checkpoints while or after training; time is simulated, so a busy machine changes nothing.
Each episode has its own unseen cube position. A chunk is computed from a frame and the joints at that frame's time,
becomes available only after a delay, and its actions are executed at the times they were meant for: live chunks are
averaged with ACT's weights, exp(-m i) with i = 0 the oldest. An episode succeeds when the cube has lain in the tray,
released, for half a second within the time limit.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
import simplejpeg
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from numpy.typing import NDArray

from device.virtual_world import CAMERAS, JOINT_RANGE_RAD, VirtualWorld, rad_from_units, units_from_rad

FloatArray = NDArray[np.float64]

CONTROL_HZ, ACTION_HZ, JPEG_QUALITY = 60, 30, 90
DELAY_S = (0.030, 0.060)
TAPER = 5  # a chunk's weight fades over its last actions


class Policy:
    """A LeRobot checkpoint as a function from raw observations to chunks in goal units."""

    def __init__(self, checkpoint: Path) -> None:
        self.policy = ACTPolicy.from_pretrained(checkpoint, local_files_only=True).eval()
        override = {"device_processor": {"device": "cpu"}}
        self.pre, self.post = make_pre_post_processors(
            self.policy.config, pretrained_path=str(checkpoint), preprocessor_overrides=override
        )

    def chunks(self, images: dict[str, NDArray[np.uint8]], state: FloatArray) -> FloatArray:
        """Images uint8 [B, H, W, 3] by camera and joints [B, 6] to actions [B, K, 6]."""
        batch = {"observation.state": torch.from_numpy(state.astype(np.float32))}
        for name, pictures in images.items():
            batch[f"observation.images.{name}"] = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            return self.post(self.policy.predict_action_chunk(self.pre(batch))).double().numpy()


class Run:
    """One episode in flight."""

    def __init__(self, seed: int, image_hw: tuple[int, int]) -> None:
        self.seed, self.rng = seed, np.random.default_rng([seed, 2])
        self.world = VirtualWorld(image_hw=image_hw)
        self.world.reset(seed)
        self.live: list[tuple[float, float, FloatArray]] = []  # available at, observed at, actions
        self.goal = units_from_rad(self.world.position_rad)
        self.done_since, self.done_at = np.inf, np.inf
        self.stages: set[str] = set()
        self.trace: list[FloatArray] = []

    def observe(self) -> tuple[dict[str, NDArray[np.uint8]], FloatArray]:
        encoded = {c: simplejpeg.encode_jpeg(self.world.render(c), quality=JPEG_QUALITY) for c in CAMERAS}
        return {c: simplejpeg.decode_jpeg(e) for c, e in encoded.items()}, units_from_rad(self.world.position_rad)

    def add(self, observed_s: float, actions: FloatArray) -> None:
        self.live.append((observed_s + self.rng.uniform(*DELAY_S), observed_s, actions))
        self.live = [chunk for chunk in self.live if observed_s - chunk[1] < len(actions) / ACTION_HZ]

    def tick(self, now_s: float, end_s: float, coefficient: float) -> None:
        usable = [(observed, actions) for at, observed, actions in self.live if at <= now_s]
        goals, weights = [], []
        for i, (observed, actions) in enumerate(sorted(usable, key=lambda chunk: chunk[0])):
            place = (now_s - observed) * ACTION_HZ
            k = int(place)
            if k + 1 < len(actions):
                goals.append(actions[k] + (place - k) * (actions[k + 1] - actions[k]))
                weights.append(np.exp(-coefficient * i) * min(1.0, (len(actions) - 1 - place) / TAPER))
        if goals:
            self.goal = np.average(goals, axis=0, weights=weights)
        self.trace.append(self.goal)
        setpoint = np.clip(rad_from_units(self.goal), JOINT_RANGE_RAD[:, 0], JOINT_RANGE_RAD[:, 1])
        while self.world.time_s < end_s - self.world.timestep_s / 2:
            self.world.step(setpoint, np.ones(6, dtype=bool))
        self.stages.add(self.world.progress().value)
        self.done_since = min(self.done_since, end_s) if self.world.done else np.inf
        if end_s - self.done_since > 0.5:
            self.done_at = min(self.done_at, end_s)


def evaluate(policy: Policy, seeds: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All `seeds` side by side, one batch of inferences for all of them."""
    height, width = policy.policy.config.input_features["observation.images.front"].shape[1:]
    runs = [Run(seed, (height, width)) for seed in seeds]
    for tick in range(int(args.limit_s * CONTROL_HZ)):
        now = tick / CONTROL_HZ
        active = [run for run in runs if run.done_at == np.inf]
        if not active:
            break
        if tick % (args.every * CONTROL_HZ // ACTION_HZ) == 0:
            seen = [run.observe() for run in active]
            images = {c: np.stack([pictures[c] for pictures, _ in seen]) for c in CAMERAS}
            for run, actions in zip(active, policy.chunks(images, np.stack([s for _, s in seen])), strict=True):
                run.add(now, actions)
        for run in active:
            run.tick(now, (tick + 1) / CONTROL_HZ, args.coefficient)
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)
        for run in runs:
            np.save(args.traces / f"{run.seed}.npy", np.array(run.trace))
    for run in runs:
        run.world.close()
    return [
        {"seed": run.seed, "success": bool(run.done_at < np.inf), "time_s": round(float(run.done_at), 2),
         "stages": sorted(run.stages), "cube_m": run.world.cube_position_m.round(3).tolist()}
        for run in runs
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint's success in closed loop.")
    parser.add_argument("checkpoint", type=Path, help="a folder with config.json and model.safetensors")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--every", type=int, default=2, help="frames from one inference to the next")
    parser.add_argument("--coefficient", type=float, default=0.01, help="m of the ensemble's weights")
    parser.add_argument("--limit-s", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--traces", type=Path, default=None, help="save each episode's goals here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy, results = Policy(args.checkpoint), []
    for first in range(args.first_seed, args.first_seed + args.episodes, args.batch):
        last = min(first + args.batch, args.first_seed + args.episodes)
        for result in evaluate(policy, list(range(first, last)), args):
            results.append(result)
            print(json.dumps(result), flush=True)
    wins = sum(result["success"] for result in results)
    print(json.dumps({"episodes": len(results), "successes": wins, "rate": round(wins / len(results), 3)}))


if __name__ == "__main__":
    main()
