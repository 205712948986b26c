"""Observations out of recorded episodes, as the policy would have had them, with what the demonstrator did next.

The sweep, the gate of a distillation, the precision checks and int8 calibration draw from here, so that they all look
at the same frames for the same seed. Draws are spread evenly over the episodes, and within one over its length: neither
long episodes nor their resting ends outweigh the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.episodes.episode import ENVIRONMENT, STATE, Episode, Episodes, Vectors
from export.errors import ExportError


class Place(NamedTuple):
    """A frame of a recording: the episode's number in it, and the frame's in the episode."""

    episode: int
    frame: int


@dataclass(frozen=True)
class Sample:
    """`observation`: raw arrays by LeRobot's names, with a leading axis for several observation steps (oldest first).
    `actions` [horizon, A]: what was demonstrated from `frame` on, of which the first `recorded` exist; the rest repeat
    the episode's last."""

    episode: str
    frame: int
    observation: dict[str, NDArray[Any]]
    actions: Vectors
    recorded: int


def sample_observations(
    episodes: Episodes,
    count: int,
    seed: int,
    *,
    horizon: int,
    observation_steps: int = 1,
    rate_hz: float | None = None,
    inputs: Collection[str] | None = None,
) -> list[Sample]:
    """`count` samples, in the order of the recording; `sample_at` says what one is, `draw_places` which they are."""
    return [
        sample_at(episodes, place, horizon=horizon, observation_steps=observation_steps, rate_hz=rate_hz, inputs=inputs)
        for place in draw_places(episodes, count, seed)
    ]


def draw_places(episodes: Episodes, count: int, seed: int) -> list[Place]:
    """`count` different frames, ascending; fewer where episodes are shorter than their share of them.

    As many from every episode (with too few to go round, from episodes drawn by `seed`), and one from each of as many
    equal parts of it.
    """
    if count < 1:
        raise ExportError(f"at least one observation has to be drawn, asked for {count}")
    rng = np.random.default_rng(seed)
    shares = np.full(len(episodes), count // len(episodes))
    shares[rng.permutation(len(episodes))[: count % len(episodes)]] += 1
    places = []
    for number, episode in enumerate(episodes):
        edges = np.linspace(0, episode.length, min(int(shares[number]), episode.length) + 1).astype(int)
        places += [Place(number, int(rng.integers(a, b))) for a, b in pairwise(edges)]
    return places


def sample_at(
    episodes: Episodes,
    place: Place,
    *,
    horizon: int,
    observation_steps: int = 1,
    rate_hz: float | None = None,
    inputs: Collection[str] | None = None,
) -> Sample:
    """What a policy at `rate_hz` (the recording's where None) sees at `place`, and the `horizon` actions from there on.

    Observation steps and actions lie a period of the policy apart, at the nearest recorded frames. Before the episode's
    first observation there is that one again, as LeRobot fills its queues (`policies/utils.py`, populate_queues).
    `inputs`: which to read, all where None. Raises ExportError where the policy is faster than the recording.
    """
    stride = _stride(episodes, rate_hz)
    episode, frame = episodes[place.episode], place.frame
    seen_before = int(frame / stride + 1e-9)  # how often the policy has looked since the episode began
    back = np.minimum(np.arange(observation_steps)[::-1], seen_before)
    ahead = np.floor(frame + np.arange(horizon) * stride + 0.5).astype(int)
    return Sample(
        episode=episode.name,
        frame=frame,
        observation=_observation(episode, np.floor(frame - back * stride + 0.5).astype(int), inputs),
        actions=episode.actions[np.minimum(ahead, episode.length - 1)],
        recorded=int((ahead < episode.length).sum()),
    )


def split(episodes: Episodes, share: float, seed: int) -> tuple[Episodes, Episodes]:
    """(to work with, held out): whole episodes, about `share` of them held out, at least one on either side.

    Raises ExportError for a recording of one episode and for a share outside 0..1.
    """
    if not 0 < share < 1:
        raise ExportError(f"the share of episodes that is held out should lie between 0 and 1, found {share:g}")
    if len(episodes) < 2:
        raise ExportError(f"{episodes.path} holds one episode; at least two are needed to hold one out")
    held = min(max(round(share * len(episodes)), 1), len(episodes) - 1)
    order = np.random.default_rng(seed).permutation(len(episodes)).tolist()
    return episodes.select(sorted(order[held:])), episodes.select(sorted(order[:held]))


def _stride(episodes: Episodes, rate_hz: float | None) -> float:
    """Recorded frames a period of the policy."""
    stride = 1.0 if rate_hz is None else episodes.rate_hz / rate_hz
    if stride < 1 - 1e-6:
        raise ExportError(
            f"the policy acts {rate_hz:g} times a second; {episodes.path} has {episodes.rate_hz:g} frames"
        )
    return stride


def _observation(episode: Episode, frames: NDArray[np.intp], inputs: Collection[str] | None) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {STATE: episode.states[frames]}
    if episode.environment is not None:
        found[ENVIRONMENT] = episode.environment[frames]
    for camera in episode.cameras:
        if inputs is None or camera in inputs:
            found[camera] = episode.frames(camera, frames)
    steps = {name: values for name, values in found.items() if inputs is None or name in inputs}
    return steps if len(frames) > 1 else {name: values[0] for name, values in steps.items()}
