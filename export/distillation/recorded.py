"""Recorded episodes as distillation sees them: for a frame, the condition that the network is given and the actions.

Everything is in memory or mapped from the features' file; a batch is an indexing. Which frames belong together follows
LeRobot's DiffusionPolicy: a horizon of actions begins with the oldest observation step, and what lies before an
episode's first frame or after its last one is that frame again. Frames of the recording are taken for periods of the
policy, as they were in its training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.distillation.features import Features
from export.episodes import Episodes
from export.episodes.episode import Vectors

Frames = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Recorded:
    """Frames of episodes, one after the other. `features` [N, F]; `actions` [N, A] in joint units; `first` and `last`
    [N]: of each frame's episode. `index` [n]: the frames that may be drawn."""

    features: Features
    actions: Vectors
    first: Frames
    last: Frames
    index: Frames
    observation_steps: int
    horizon: int

    @staticmethod
    def of(episodes: Episodes, features: Features, observation_steps: int, horizon: int) -> Recorded:
        lengths = np.array([episode.length for episode in episodes], np.int64)
        ends = np.cumsum(lengths)
        return Recorded(
            features,
            np.concatenate([episode.actions for episode in episodes]),
            np.repeat(ends - lengths, lengths),
            np.repeat(ends - 1, lengths),
            np.arange(ends[-1]),
            observation_steps,
            horizon,
        )

    def of_episodes(self, numbers: Sequence[int]) -> Recorded:
        """The same, to draw from these episodes only."""
        begins = np.unique(self.first)[np.asarray(numbers, np.intp)]
        return dataclasses.replace(self, index=np.flatnonzero(np.isin(self.first, begins)))

    def draw(self, count: int, rng: np.random.Generator) -> Frames:
        """`count` frames at random, repeats included."""
        drawn: Frames = self.index[rng.integers(len(self.index), size=count)]
        return drawn

    def spread(self, count: int, seed: int) -> Frames:
        """`count` frames, one from each of as many equal parts (fewer where there are not as many)."""
        edges = np.linspace(0, len(self.index), min(count, len(self.index)) + 1).astype(np.int64)
        drawn: Frames = self.index[np.random.default_rng(seed).integers(edges[:-1], edges[1:])]
        return drawn

    def conditions(self, index: Frames) -> Tensor:
        """What the network is told at frames [B]: float32 [B, G], observation steps side by side, oldest first."""
        seen = self._around(index, np.arange(1 - self.observation_steps, 1))
        return torch.from_numpy(self.features[seen].reshape(len(index), -1))

    def horizons(self, index: Frames) -> Vectors:
        """The actions [B, H, A] that belong to them, in joint units."""
        begin = 1 - self.observation_steps
        actions: Vectors = self.actions[self._around(index, np.arange(begin, begin + self.horizon))]
        return actions

    def _around(self, index: Frames, offsets: Frames) -> Frames:
        found: Frames = np.clip(index[:, None] + offsets, self.first[index][:, None], self.last[index][:, None])
        return found
