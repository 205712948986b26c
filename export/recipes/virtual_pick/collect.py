"""Collect demonstrations of the scripted expert in the virtual world, stepped faster than real time.

A person runs this before `train.py`; it writes shards (`.npz`, 20 episodes each) that the training reads whole.
A frame is what the policy will see: a picture of each camera after a JPEG round trip, the joint state at the time of
the picture, and the goal that the expert commands at that time. The goals that reach the arm are disturbed while the
labels stay clean (DART, Laskey et al. 2017), and the arm starts from many poses, so that the policy learns to come
back. Episodes that do not end with the cube in the tray are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from device.scripted_expert import Kinematics, ScriptedExpert
from device.virtual_world import (
    CAMERAS,
    CUBE_REGION_M,
    GRIPPER,
    HOME_RAD,
    JOINT_RANGE_RAD,
    VirtualWorld,
    rad_from_units,
    units_from_rad,
)

FloatArray = NDArray[np.float64]

FRAME_HZ = 30
CONTROL_HZ = 60
JPEG_QUALITY = 90
LONGEST_S = 16.0
REST_S = 0.8  # recorded after the plan has ended: the policy has to learn to stay

# Disturbance of the commanded goals: an Ornstein-Uhlenbeck process, deviation in units (deg; gripper 0..100).
NOISE_UNITS: FloatArray = np.array([4.0, 3.5, 3.5, 4.0, 5.0, 3.0])
NOISE_TIME_S = 0.5
NOISE_NEAR_CUBE = 0.45  # of that, while the hand is down at the cube


@dataclasses.dataclass
class Episode:
    """One demonstration: per frame a JPEG of each camera, the joints and the expert's goal in units."""

    jpegs: list[bytes]  # [frame][camera], flattened
    state: list[FloatArray]
    action: list[FloatArray]


class Disturbance:
    """What is added to the commanded goals of one episode, drawn from its seed."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._scale = 0.0 if rng.random() < 0.25 else rng.uniform(0.3, 1.2)
        self._value = np.zeros(len(NOISE_UNITS))
        self._drop_at_s = rng.uniform(2.5, 4.5) if rng.random() < 0.08 else np.inf

    def next(self, t_s: float, near_cube: bool) -> FloatArray:
        keep = np.exp(-1 / (CONTROL_HZ * NOISE_TIME_S))
        scale = self._scale * (NOISE_NEAR_CUBE if near_cube else 1.0)
        kick = self._rng.normal(size=len(NOISE_UNITS)) * NOISE_UNITS * scale
        self._value = keep * self._value + np.sqrt(1 - keep**2) * kick
        out: FloatArray = np.array(self._value)
        if self._drop_at_s < t_s < self._drop_at_s + 0.35:  # the hand opens for a moment, and the cube may fall
            out[GRIPPER] += 25.0
        return out


def start_pose(rng: np.random.Generator, kinematics: Kinematics) -> FloatArray:
    """Where the arm starts (rad): around home mostly, else anywhere above the table."""
    pose = HOME_RAD + np.radians(rng.normal(size=6) * [6, 5, 5, 4, 6, 0])
    if rng.random() < 0.35:
        low, high = CUBE_REGION_M.T
        place = rng.uniform(low - 0.02, high + 0.02)
        pose[:GRIPPER] = kinematics.solve([*place, rng.uniform(0.06, 0.12)], rng.uniform(-0.5, 0.5), pose)
    pose[GRIPPER] = np.radians(rng.uniform(-8, 55))
    return np.clip(pose, JOINT_RANGE_RAD[:, 0] + 0.01, JOINT_RANGE_RAD[:, 1] - 0.01)


def record(world: VirtualWorld, kinematics: Kinematics, seed: int) -> Episode | None:
    """One demonstration, or None where the task was not done."""
    rng = np.random.default_rng([seed, 1])
    world.reset(seed, home_rad=start_pose(rng, kinematics))
    expert, disturbance = ScriptedExpert(kinematics), Disturbance(rng)
    delay_s = rng.uniform(0.0, 0.03)
    episode = Episode([], [], [])
    applied = rad_from_units(units_from_rad(world.position_rad))
    waiting: list[tuple[float, FloatArray]] = []
    torque = np.ones(6, dtype=bool)
    tick, rested_since = 0, np.inf
    while world.time_s < LONGEST_S:
        now = tick / CONTROL_HZ
        goal = expert.goal(now, world)
        if tick % (CONTROL_HZ // FRAME_HZ) == 0:
            for camera in CAMERAS:
                episode.jpegs.append(simplejpeg.encode_jpeg(world.render(camera), quality=JPEG_QUALITY))
            episode.state.append(units_from_rad(world.position_rad))
            episode.action.append(goal)
        phase = expert.phase(now)
        disturbed = goal + disturbance.next(now, phase in ("down", "close"))
        disturbed[GRIPPER] = np.clip(disturbed[GRIPPER], 0, 100)
        waiting.append((now + delay_s, rad_from_units(disturbed)))
        tick += 1
        while world.time_s < tick / CONTROL_HZ - world.timestep_s / 2:
            while waiting and waiting[0][0] <= world.time_s:
                applied = waiting.pop(0)[1]
            world.step(np.clip(applied, JOINT_RANGE_RAD[:, 0], JOINT_RANGE_RAD[:, 1]), torque)
        rested_since = min(rested_since, now) if phase == "rest" else np.inf
        if now - rested_since > REST_S:
            break
    return episode if world.done else None


def write_shard(path: Path, episodes: list[Episode], seeds: list[int], image_hw: tuple[int, int]) -> None:
    """One shard, complete or not there at all."""
    jpegs = [jpeg for episode in episodes for jpeg in episode.jpegs]
    ends = np.cumsum([len(jpeg) for jpeg in jpegs])
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        jpeg=np.frombuffer(b"".join(jpegs), dtype=np.uint8),
        jpeg_end=ends.reshape(-1, len(CAMERAS)),
        state=np.concatenate([episode.state for episode in episodes]).astype(np.float32),
        action=np.concatenate([episode.action for episode in episodes]).astype(np.float32),
        episode_end=np.cumsum([len(episode.state) for episode in episodes]),
        seed=np.array(seeds),
        image_hw=np.array(image_hw),
    )
    temporary.rename(path)


def collect_shard(job: tuple[Path, int, int, tuple[int, int]]) -> str:
    """`count` successful episodes from `first_seed` on, into one shard."""
    path, first_seed, count, image_hw = job
    if path.exists():
        return f"{path.name} is there already"
    began = time.monotonic()
    world, kinematics = VirtualWorld(image_hw=image_hw), Kinematics()
    episodes: list[Episode] = []
    seeds: list[int] = []
    tried = 0
    for seed in range(first_seed, first_seed + count):
        tried += 1
        episode = record(world, kinematics, seed)
        if episode is not None:
            episodes.append(episode)
            seeds.append(seed)
    world.close()
    write_shard(path, episodes, seeds, image_hw)
    frames = sum(len(episode.state) for episode in episodes)
    return f"{path.name}: {len(episodes)} of {tried} episodes, {frames} frames, {time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/virtual_pick/data"))
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--first-seed", type=int, default=100_000, help="evaluation uses the seeds below 100000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--image", type=int, nargs=2, default=(96, 96), metavar=("H", "W"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = 20
    jobs = [
        (args.out / f"shard_{seed}.npz", seed, size, tuple(args.image))
        for seed in range(args.first_seed, args.first_seed + args.episodes, size)
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for line in pool.imap_unordered(collect_shard, jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
