"""The ensemble: equal to ACT's Algorithm 2 where that is defined, aligned in time everywhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.ensemble import ChunkEnsemble
from real_lerobot import ask_lerobot

DT = 33_333_333
MS = 1_000_000


def algorithm_2(chunks: list[np.ndarray], tick: int, m: float) -> np.ndarray:
    """ACT's Algorithm 2, written down from the paper: all predictions for `tick`, oldest first, weights exp(-m*i)."""
    predictions = [chunk[tick - t] for t, chunk in enumerate(chunks) if 0 <= tick - t < len(chunk)]
    weights = np.exp(-m * np.arange(len(predictions)))
    return np.asarray((weights[:, None] * np.array(predictions)).sum(axis=0) / weights.sum())


def trajectory(t_ns: float | np.ndarray, joints: int = 3) -> np.ndarray:
    """A smooth function of time to align against."""
    t = np.asarray(t_ns, float)[..., None] / 1e9
    return np.asarray(np.sin(2 * t + np.arange(joints)) * (10 + np.arange(joints)))


def chunk_of_trajectory(t_obs: int, count: int) -> np.ndarray:
    return trajectory(t_obs + DT * np.arange(count))


@pytest.mark.parametrize("m", [0.01, 0.1, -0.05, 0.0])
def test_with_a_fresh_chunk_every_tick_it_equals_algorithm_2(m: float) -> None:
    rng = np.random.default_rng(1)
    chunks = [rng.normal(0, 20, (12, 6)) for _ in range(60)]
    ensemble = ChunkEnsemble(6, 12, m=m, staleness_ns=10**12)
    for tick, chunk in enumerate(chunks):
        t = tick * DT
        assert ensemble.add(t, t, DT, chunk)
        choice = ensemble.at(t)
        assert choice is not None
        np.testing.assert_allclose(choice.action, algorithm_2(chunks[: tick + 1], tick, m), atol=1e-9)
        assert choice.live == min(tick + 1, 12)


@settings(max_examples=60, deadline=None)
@given(
    delays=st.lists(st.integers(20, 400), min_size=5, max_size=25),
    method=st.sampled_from(["ensemble", "crossfade", "latest"]),
    rate=st.sampled_from([60, 100, 143]),
)
def test_late_and_jittery_chunks_stay_aligned_in_time(delays: list[int], method: str, rate: int) -> None:
    """Chunks cut from one trajectory give that trajectory back, whatever the delays: nothing is shifted by latency."""
    ensemble = ChunkEnsemble(3, 30, method=method, staleness_ns=10**9)
    arrivals, t_obs = [], 0
    for delay in delays:
        arrivals.append((t_obs + delay * MS, t_obs))
        t_obs += delay * MS
    t, period = 0, 10**9 // rate
    while t < t_obs:
        while arrivals and arrivals[0][0] <= t:
            known, observed = arrivals.pop(0)
            assert ensemble.add(known, observed, DT, chunk_of_trajectory(observed, 30))
        choice = ensemble.at(t)
        if choice is not None:
            # 30 Hz actions interpolated linearly: the curvature of the sine leaves at most a few hundredths.
            np.testing.assert_allclose(choice.action, trajectory(t), atol=0.01)
        t += period


@pytest.mark.parametrize("method", ["ensemble", "crossfade"])
def test_chunks_that_disagree_hand_over_without_a_step(method: str) -> None:
    """Chunks 10 units apart, a new one every 200 ms: no tick may carry a noticeable part of the difference."""
    ensemble = ChunkEnsemble(1, 30, method=method, staleness_ns=10**9)
    previous, largest, period = None, 0.0, 10**9 // 60
    next_chunk, level = 0, 0.0
    for tick in range(400):
        t = tick * period
        if t >= next_chunk:
            ensemble.add(t, t - 50 * MS, DT, np.full((30, 1), level))
            level = 10.0 - level
            next_chunk += 200 * MS
        choice = ensemble.at(t)
        assert choice is not None
        if previous is not None:
            largest = max(largest, abs(float(choice.action[0]) - previous))
        previous = float(choice.action[0])
    fade_ticks = 200 / 3 / (1000 / 60)
    assert largest <= 10.0 / fade_ticks + 1e-6


def test_latest_follows_the_newest_chunk_alone() -> None:
    ensemble = ChunkEnsemble(1, 10, method="latest")
    ensemble.add(0, 0, DT, np.zeros((10, 1)))
    ensemble.add(DT, DT, DT, np.ones((10, 1)))
    choice = ensemble.at(DT)
    assert choice is not None
    assert choice.action[0] == 1.0
    assert choice.live == 1


def test_past_actions_of_a_late_chunk_are_never_executed() -> None:
    ensemble = ChunkEnsemble(1, 10, staleness_ns=10**9)
    ensemble.add(5 * DT, 0, DT, np.arange(10.0)[:, None])
    choice = ensemble.at(5 * DT)
    assert choice is not None
    assert choice.action[0] == pytest.approx(5.0)
    assert choice.age_ns == 5 * DT


def test_without_a_fresh_chunk_it_says_nothing() -> None:
    ensemble = ChunkEnsemble(1, 30, staleness_ns=300 * MS)
    assert ensemble.at(0) is None
    ensemble.add(0, 0, DT, np.zeros((30, 1)))
    assert ensemble.at(300 * MS) is not None
    assert ensemble.at(300 * MS + 1) is None
    assert ensemble.at(10 * MS) is not None, "an earlier time is still covered"


def test_a_chunk_ends_with_its_last_action() -> None:
    ensemble = ChunkEnsemble(1, 5, staleness_ns=10**9)
    ensemble.add(0, 0, DT, np.arange(5.0)[:, None])
    choice = ensemble.at(4 * DT)
    assert choice is not None and choice.action[0] == 4.0
    assert ensemble.at(4 * DT + 1) is None


def test_two_state_joints_follow_the_newest_chunk() -> None:
    ensemble = ChunkEnsemble(2, 10, two_state=(1,))
    ensemble.add(0, 0, DT, np.zeros((10, 2)))
    ensemble.add(DT, DT, DT, np.full((10, 2), 8.0))
    choice = ensemble.at(2 * DT)
    assert choice is not None
    assert choice.action[1] == 8.0
    assert 0.0 < choice.action[0] < 8.0


def test_disagreement_is_the_spread_of_the_live_predictions() -> None:
    ensemble = ChunkEnsemble(2, 10)
    ensemble.add(0, 0, DT, np.array([[1.0, 5.0]] * 10))
    ensemble.add(DT, DT, DT, np.array([[4.0, 5.0]] * 10))
    choice = ensemble.at(2 * DT)
    assert choice is not None
    np.testing.assert_allclose(choice.disagreement, [3.0, 0.0])


@pytest.mark.parametrize(
    ("what", "t_obs", "dt", "actions"),
    [
        ("NaN", 0, DT, np.full((3, 2), np.nan)),
        ("infinity", 0, DT, np.full((3, 2), np.inf)),
        ("another number of joints", 0, DT, np.zeros((3, 3))),
        ("nothing", 0, DT, np.zeros((0, 2))),
        ("longer than a chunk", 0, DT, np.zeros((9, 2))),
        ("from the future", 10**12, DT, np.zeros((3, 2))),
        ("no time between actions", 0, 0, np.zeros((3, 2))),
        ("from before time", -(2**63), DT, np.zeros((3, 2))),
    ],
)
def test_unusable_chunks_are_refused_and_counted(what: str, t_obs: int, dt: int, actions: np.ndarray) -> None:
    ensemble = ChunkEnsemble(2, 8)
    assert not ensemble.add(0, t_obs, dt, actions), what
    assert ensemble.rejected == 1
    assert ensemble.at(0) is None


def test_an_older_observation_than_the_newest_is_refused() -> None:
    ensemble = ChunkEnsemble(1, 8)
    assert ensemble.add(DT, DT, DT, np.zeros((8, 1)))
    assert not ensemble.add(DT, DT, DT, np.ones((8, 1)))
    assert not ensemble.add(DT, 0, DT, np.ones((8, 1)))
    assert ensemble.rejected == 2


@pytest.mark.parametrize("method", ["ensemble", "crossfade"])
def test_what_was_seen_before_an_outage_has_no_say_after_it(method: str) -> None:
    ensemble = ChunkEnsemble(1, 300, method=method, staleness_ns=300 * MS)
    for i in range(5):
        ensemble.add(i * DT, i * DT, DT, np.full((300, 1), 80.0))
    back = 2_000 * MS
    assert ensemble.at(back) is None
    ensemble.add(back, back, DT, np.zeros((300, 1)))
    for t in (back, back + 100 * MS, back + 200 * MS):
        choice = ensemble.at(t)
        assert choice is not None and choice.action[0] == 0.0


def test_a_tick_that_asks_for_a_time_before_the_newest_frame_still_has_the_older_chunks() -> None:
    ensemble = ChunkEnsemble(1, 30)
    ensemble.add(0, 0, DT, np.full((30, 1), 5.0))
    ensemble.add(3 * DT, 2 * DT, DT, np.full((30, 1), 9.0))
    choice = ensemble.at(DT)
    assert choice is not None and choice.action[0] == 5.0
    choice = ensemble.at(4 * DT)
    assert choice is not None and 5.0 < choice.action[0] < 9.0


def test_another_policy_starts_afresh() -> None:
    ensemble = ChunkEnsemble(1, 8)
    ensemble.add(0, 0, DT, np.zeros((8, 1)), b"old")
    ensemble.add(DT, DT, DT, np.full((8, 1), 9.0), b"new")
    choice = ensemble.at(2 * DT)
    assert choice is not None
    assert choice.action[0] == 9.0


def test_more_chunks_than_there_is_room_for_drop_the_oldest() -> None:
    ensemble = ChunkEnsemble(1, 100, capacity=4, staleness_ns=10**12)
    for i in range(10):
        ensemble.add(i * DT, i * DT, DT, np.full((100, 1), float(i)))
    choice = ensemble.at(10 * DT)
    assert choice is not None
    assert choice.live == 4
    assert choice.action[0] > 6.0


def test_changed_tells_when_the_set_of_live_chunks_is_another() -> None:
    ensemble = ChunkEnsemble(1, 30)
    ensemble.add(0, 0, DT, np.zeros((30, 1)))
    first, second = ensemble.at(0), ensemble.at(DT // 2)
    ensemble.add(DT, DT, DT, np.zeros((30, 1)))
    third = ensemble.at(DT)
    assert first is not None and second is not None and third is not None
    assert (first.changed, second.changed, third.changed) == (True, False, True)


LEROBOT = """
import json, sys
import torch
from lerobot.policies.act.modeling_act import ACTTemporalEnsembler
question = json.load(sys.stdin)
ensembler = ACTTemporalEnsembler(question["m"], len(question["chunks"][0]))
chunks = torch.tensor(question["chunks"], dtype=torch.float64)
print(json.dumps([ensembler.update(chunk[None])[0].tolist() for chunk in chunks]))
"""


@pytest.mark.parametrize("m", [0.01, 0.2])
def test_with_a_fresh_chunk_every_tick_it_equals_lerobots_ensembler(m: float) -> None:
    chunks = np.random.default_rng(5).normal(0, 20, (40, 12, 6))
    theirs = ask_lerobot(LEROBOT, {"m": m, "chunks": chunks.tolist()})
    ensemble = ChunkEnsemble(6, 12, m=m, staleness_ns=10**12)
    for tick, chunk in enumerate(chunks):
        ensemble.add(tick * DT, tick * DT, DT, chunk)
        choice = ensemble.at(tick * DT)
        assert choice is not None
        # LeRobot's weights are float32, whatever its chunks are.
        np.testing.assert_allclose(choice.action, theirs[tick], atol=1e-6)


@pytest.mark.parametrize("method", ["ensemble", "crossfade", "latest"])
def test_a_chunk_of_one_action_holds_until_the_next_one_or_until_it_is_stale(method: str) -> None:
    """Behaviour cloning: inference takes longer than an action lasts, and the arm still has a goal at every tick."""
    ensemble = ChunkEnsemble(1, 1, method=method, staleness_ns=300 * MS)
    assert ensemble.add(60 * MS, 0, 20 * MS, np.array([[5.0]]))
    for t in (60 * MS, 150 * MS, 300 * MS):
        choice = ensemble.at(t)
        assert choice is not None
        assert choice.action[0] == 5.0
    assert ensemble.at(301 * MS) is None
    assert ensemble.add(310 * MS, 250 * MS, 20 * MS, np.array([[9.0]]))
    after = ensemble.at(400 * MS)
    assert after is not None
    assert after.action[0] == 9.0, "only the newest has a say once it has taken over"


def test_fresh_chunks_of_one_action_are_not_averaged() -> None:
    """Algorithm 2 for chunks of one: the prediction of this tick alone."""
    ensemble = ChunkEnsemble(1, 1, staleness_ns=10**12)
    for tick in range(5):
        assert ensemble.add(tick * DT, tick * DT, DT, np.array([[float(tick)]]))
        choice = ensemble.at(tick * DT)
        assert choice is not None
        assert choice.action[0] == tick


@settings(max_examples=80, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(5, 700), st.integers(0, 250), st.floats(-90, 90)), min_size=1, max_size=12),
    method=st.sampled_from(["ensemble", "crossfade", "latest"]),
    staleness_ms=st.sampled_from([100, 300, 500]),
)
def test_single_actions_lead_only_where_they_point_and_for_as_long_as_they_are_fresh(
    chunks: list[tuple[int, int, float]], method: str, staleness_ms: int
) -> None:
    """Whatever the spacing and the latency: a goal between those that were given, and none once the newest is stale."""
    ensemble = ChunkEnsemble(1, 1, method=method, staleness_ns=staleness_ms * MS)
    arrivals, t_obs = [], 0
    for spacing, latency, goal in chunks:
        arrivals.append((max(t_obs + latency, arrivals[-1][0] if arrivals else 0), t_obs, goal))
        t_obs += spacing
    given: list[tuple[int, float]] = []
    for t in range(0, arrivals[-1][0] + 2 * staleness_ms, 7):
        while arrivals and arrivals[0][0] <= t:
            known, observed, goal = arrivals.pop(0)
            assert ensemble.add(known * MS, observed * MS, DT, np.array([[goal]]))
            given.append((observed, goal))
        choice = ensemble.at(t * MS)
        fresh = [goal for observed, goal in given if observed <= t]
        age = t - given[-1][0] if fresh else staleness_ms + 1
        assert (choice is None) == (age > staleness_ms)
        if choice is not None:
            goal = float(choice.action[0])
            assert min(fresh) - 1e-9 <= goal <= max(fresh) + 1e-9
            assert choice.age_ns == age * MS
            if method != "crossfade":
                assert goal == fresh[-1]
    assert ensemble.at((t + staleness_ms) * MS) is None, "chunks stopped, and so does the arm"
