"""Lockstep: a policy that samples and looks at two steps runs in simulated time, the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")
pytest.importorskip("device.mujoco_headless", reason="the world is MuJoCo's")

from device.config import VIRTUAL_CELL, load_cell
from device.engine_sampling import SamplingEngine
from device.lockstep import LockstepPolicy, run_episode
from fixtures.tiny_diffusion import write_tiny_diffusion

SECONDS = 0.6


@pytest.mark.parametrize("inference_ms", [20, 50])
def test_an_episode_is_the_same_each_time_and_another_for_another_seed(tmp_path: Path, inference_ms: int) -> None:
    cell = load_cell(VIRTUAL_CELL)
    policy = LockstepPolicy(write_tiny_diffusion(tmp_path / "tiny"), inference_ms * 1_000_000)
    first, other, again = (run_episode(cell, policy, seed, SECONDS).goals for seed in (3, 4, 3))
    for field in ("requested", "goal", "chunk_age_ns"):
        np.testing.assert_array_equal(first[field], again[field])
    assert len({tuple(goal) for goal in first["goal"]}) > 5, "the policy moves the arm"
    assert np.abs(first["goal"] - other["goal"]).max() > 0.1


def test_every_frame_is_encoded_once(tmp_path: Path) -> None:
    policy = LockstepPolicy(write_tiny_diffusion(tmp_path / "tiny"), 20_000_000)
    run_episode(load_cell(VIRTUAL_CELL), policy, 3, SECONDS)
    engine = policy.engine
    assert isinstance(engine, SamplingEngine)
    assert 15 <= engine.encoded <= 19  # 0.6 s at 30 frames/s, where two for each inference would be 34


@pytest.mark.parametrize(("advance", "chunks"), [(None, 17), (4, 5)])
def test_a_policy_may_follow_each_chunk_for_a_while(tmp_path: Path, advance: int | None, chunks: int) -> None:
    handoff = {"method": "crossfade", "m": None, "advance": advance}
    policy = LockstepPolicy(write_tiny_diffusion(tmp_path / "tiny", handoff=handoff), 20_000_000)
    goals = run_episode(load_cell(VIRTUAL_CELL), policy, 3, SECONDS).goals
    observed = {int(goal["t_ns"] - goal["chunk_age_ns"]) for goal in goals if goal["chunk_age_ns"] > 0}
    assert abs(len(observed) - chunks) <= 1
