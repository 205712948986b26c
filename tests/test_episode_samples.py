"""Observations drawn from recorded episodes: which frames, what the policy would have had there, which policy fits."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.episodes import (
    Episode,
    Episodes,
    check_episodes,
    draw_places,
    open_episodes,
    sample_at,
    sample_observations,
    split,
)
from export.episodes.sampling import Place
from export.errors import ExportError
from fixtures.recordings import (
    ACTION,
    ENVIRONMENT,
    FRONT,
    HEIGHT,
    STATE,
    WIDTH,
    WRIST,
    joints,
    picture,
    pictures,
    write_arrays,
)

LENGTH = 40


class NoPictures:
    def read(self, camera: str, rows: Sequence[int]) -> list[Any]:
        raise AssertionError("there is no camera")


def recording(*lengths: int, rate_hz: float = 30.0) -> Episodes:
    """Episodes in memory; an action's first value is its frame's number in the episode."""
    episodes = []
    for i, length in enumerate(lengths):
        numbers = joints(range(length))
        episodes.append(Episode(f"episode {i}", numbers, numbers, None, {}, NoPictures()))
    return Episodes(Path("memory"), "made for a test", rate_hz, {}, tuple(episodes))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    """Three episodes of one camera; picture and joints of a frame say which it is."""
    return open_episodes(write_arrays(tmp_path_factory.mktemp("recording")))


# What a sample is


def test_an_observation_has_the_policys_inputs_as_the_robot_gives_them(filmed: Episodes) -> None:
    sample = sample_at(filmed, Place(1, 4), horizon=3)
    assert {name: (array.dtype.name, array.shape) for name, array in sample.observation.items()} == {
        STATE: ("float32", (6,)),
        FRONT: ("uint8", (HEIGHT, WIDTH, 3)),
    }
    np.testing.assert_array_equal(sample.observation[FRONT], picture(5 + 4))
    np.testing.assert_array_equal(sample.actions, joints(range(9, 12)) + 1)
    assert (sample.episode, sample.frame, sample.recorded) == ("0001", 4, 3)


def test_several_observation_steps_have_an_axis_of_their_own_oldest_first(filmed: Episodes) -> None:
    sample = sample_at(filmed, Place(1, 4), horizon=1, observation_steps=3)
    np.testing.assert_array_equal(sample.observation[STATE], joints([7, 8, 9]))
    np.testing.assert_array_equal(sample.observation[FRONT], pictures([7, 8, 9]))


def test_only_the_inputs_asked_for_are_read(filmed: Episodes) -> None:
    assert set(sample_at(filmed, Place(0, 0), horizon=1, inputs=[STATE]).observation) == {STATE}


def test_after_the_end_of_an_episode_its_last_action_is_repeated(filmed: Episodes) -> None:
    sample = sample_at(filmed, Place(0, 3), horizon=4)
    assert sample.recorded == 2
    np.testing.assert_array_equal(sample.actions, joints([3, 4, 4, 4]) + 1)


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_observations_are_those_in_lerobots_queue_at_that_time(period: int, steps: int) -> None:
    """The queue is filled with the first observation and then takes one at every tick, `period` frames apart."""
    episodes = recording(LENGTH)
    for begin in range(period):
        queue: deque[int] = deque(maxlen=steps)
        for frame in range(begin, LENGTH, period):
            queue.extend([frame] if queue else [frame] * steps)
            sample = sample_at(
                episodes, Place(0, frame), horizon=1, observation_steps=steps, rate_hz=30 / period, inputs=[STATE]
            )
            assert np.atleast_2d(sample.observation[STATE])[:, 0].tolist() == list(queue)


def test_a_slower_policys_actions_lie_its_own_period_apart() -> None:
    sample = sample_at(recording(LENGTH), Place(0, 30), horizon=5, rate_hz=10)
    assert sample.actions[:, 0].tolist() == [30, 33, 36, 39, 39]
    assert sample.recorded == 4
    halves = sample_at(recording(LENGTH), Place(0, 10), horizon=4, observation_steps=3, rate_hz=20)
    assert halves.actions[:, 0].tolist() == [10, 12, 13, 15]  # 10, 11.5, 13, 14.5: the nearest that was recorded
    assert halves.observation[STATE][:, 0].tolist() == [7, 9, 10]


def test_a_policy_faster_than_the_recording_is_refused() -> None:
    with pytest.raises(ExportError, match="the policy acts 50 times a second; memory has 30 frames"):
        sample_at(recording(LENGTH), Place(0, 0), horizon=1, rate_hz=50)


# Which samples are drawn


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), count=st.integers(1, 120), seed=st.integers(0, 9))
def test_draws_are_different_frames_spread_evenly(lengths: list[int], count: int, seed: int) -> None:
    places = draw_places(recording(*lengths), count, seed)
    assert places == sorted(set(places)) == draw_places(recording(*lengths), count, seed)
    assert all(0 <= place.frame < lengths[place.episode] for place in places)
    drawn = Counter(place.episode for place in places)
    for number, length in enumerate(lengths):
        share = count / len(lengths)
        assert min(length, int(share)) <= drawn[number] <= min(length, int(np.ceil(share)))
        frames = [place.frame for place in places if place.episode == number]
        parts = [int(np.floor((frame + 1) * len(frames) / length - 1e-9)) for frame in frames]
        assert all(abs(part - i) <= 1 for i, part in enumerate(parts))


def test_another_seed_draws_other_frames() -> None:
    assert draw_places(recording(50, 50), 10, 0) != draw_places(recording(50, 50), 10, 1)


def test_samples_are_the_drawn_frames(filmed: Episodes) -> None:
    places = draw_places(filmed, 6, 0)
    samples = sample_observations(filmed, 6, 0, horizon=2)
    assert [(sample.episode, sample.frame) for sample in samples] == [(f"{e:04}", frame) for e, frame in places]
    assert len(samples) == 6


def test_drawing_nothing_is_refused() -> None:
    with pytest.raises(ExportError, match="at least one observation has to be drawn, asked for 0"):
        draw_places(recording(5), 0, 0)


@given(count=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_a_split_puts_every_episode_on_one_side(count: int, share: float, seed: int) -> None:
    episodes = recording(*[3] * count)
    kept, held = split(episodes, share, seed)
    assert sorted([*kept, *held], key=lambda e: int(e.name.split()[1])) == list(episodes)
    assert len(held) >= 1 and len(kept) >= 1
    assert abs(len(held) - share * count) <= 1
    assert list(split(episodes, share, seed)[1]) == list(held)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ExportError, match="holds one episode; at least two"):
        split(recording(5), 0.5, 0)
    with pytest.raises(ExportError, match="should lie between 0 and 1, found 1"):
        split(recording(5, 5), 1.0, 0)


# For which policy

INPUTS = {STATE: (6,), FRONT: (HEIGHT, WIDTH, 3)}


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH, 3), (3, HEIGHT, WIDTH)])
def test_a_recording_fits_a_policy_of_its_inputs(filmed: Episodes, shape: tuple[int, ...]) -> None:
    check_episodes(filmed, INPUTS | {FRONT: shape}, 6)
    check_episodes(filmed, {STATE: (6,)}, 6)


@pytest.mark.parametrize(
    ("inputs", "action_size", "why"),
    [
        ({WRIST: (HEIGHT, WIDTH, 3)}, 6, f"the policy looks at {WRIST}; the episodes' cameras are {FRONT}"),
        ({FRONT: (480, 640, 3)}, 6, f"{FRONT}: the policy takes 480x640 .*, the episodes hold 64x96"),
        ({STATE: (7,)}, 6, f"{STATE}: the policy takes 7 values, the episodes hold 6"),
        ({ENVIRONMENT: (2,)}, 6, f"the policy takes {ENVIRONMENT}; the episodes hold {STATE}, {FRONT}"),
        ({"observation.effort": (6,)}, 6, "the policy takes observation.effort; the episodes hold"),
        ({}, 7, f"{ACTION}: the policy gives 7 values, the episodes hold 6; was it recorded on another robot"),
    ],
)
def test_a_recording_of_something_else_is_refused_by_name(
    filmed: Episodes, inputs: dict[str, tuple[int, ...]], action_size: int, why: str
) -> None:
    with pytest.raises(ExportError, match=why):
        check_episodes(filmed, INPUTS | inputs, action_size)
