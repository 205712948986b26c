"""Chunks in, one action for one instant out: the hand-over between chunks, with actions living in time, not in queues.

`execute` adds every chunk that `predict` publishes and asks, once a tick, for the action at that tick's time. Action i
of a chunk is meant for t_obs + i*dt, so whatever inference took, the first actions that are already past are never
executed and nothing is spliced by an estimate of latency. Nothing here knows a clock, a file or a socket.

Methods. `ensemble`: temporal ensembling, Algorithm 2 of ACT (Zhao et al. 2023, arXiv:2304.13705): weights exp(-m*i)
with i = 0 for the oldest live prediction. `crossfade`: a linear hand-over from what was going on to the newest chunk.
`latest`: the newest chunk alone. A chunk of one action (behaviour cloning) has no end of its own: it is meant for now,
and holds until it is replaced or stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Handoff = Literal["ensemble", "crossfade", "latest"]
Floats = NDArray[np.float64]

ACT_COEFFICIENT = 0.01  # m in ACT's experiments; for checkpoints that name none

# A hand-over by crossfade takes this part of the time by which the new chunk is ahead of the old one. Overlap
# blending over about a third of the advance took the spike at chunk boundaries from 5 times the inner steps to 1.2.
CROSSFADE_PART = 1 / 3

_OLDEST_NS = 3_600_000_000_000  # an observation from longer ago is nonsense, not late


@dataclass(frozen=True)
class Choice:
    """The action for one instant, and how it came about."""

    action: Floats  # [J], joint units; the ensemble's own buffer, valid until the next call
    age_ns: int  # t - t_obs of the newest live chunk
    live: int  # predictions that had a say
    changed: bool  # the set of live chunks is not that of the last call
    disagreement: Floats  # [J], largest minus smallest live prediction; the ensemble's own buffer


class ChunkEnsemble:
    """The live chunks of one policy.

    Parameters: joints J; chunk_size K, the longest chunk; method; m, ACT's coefficient; staleness_ns, the age of the
    newest observation beyond which nothing is said any more; two_state, the joints (by index) that are never averaged:
    they follow the newest chunk; capacity, chunks kept.
    """

    def __init__(
        self,
        joints: int,
        chunk_size: int,
        *,
        method: Handoff = "ensemble",
        m: float = ACT_COEFFICIENT,
        staleness_ns: int = 300_000_000,
        two_state: tuple[int, ...] = (),
        capacity: int = 128,
    ) -> None:
        self.method = method
        self.m = m
        self.staleness_ns = staleness_ns
        self.rejected = 0
        self._joints = joints
        self._chunk_size = chunk_size
        self._two_state = list(two_state)
        self._actions = np.zeros((capacity, chunk_size, joints))
        self._last = np.zeros(capacity, np.int64)  # index of the last valid action
        self._t_obs = np.zeros(capacity, np.int64)
        self._t_added = np.zeros(capacity, np.int64)
        self._dt = np.ones(capacity, np.int64)
        self._rank_weights = np.exp(-m * np.arange(capacity))
        self._order = np.zeros(0, np.int64)  # slots of the chunks kept, oldest first
        self._added = 0
        self._policy = b""
        self._live_before: bytes = b""
        self._action = np.zeros(joints)
        self._spread = np.zeros(joints)

    def clear(self) -> None:
        """Forget every chunk: what comes next starts afresh (a mode began, a person gave the arm back)."""
        self._order = self._order[:0]
        self._live_before = b""

    def add(self, t_ns: int, t_obs_ns: int, dt_ns: int, actions: NDArray[Any], policy: bytes = b"") -> bool:
        """Take a chunk that became known at t_ns. Returns False, and counts, where it cannot be used.

        `actions` is [k, J] with k <= K, finite, in joint units. A chunk of another policy than the last one clears
        what is live. Chunks must come in the order of their observation; an older one is of no use any more.
        """
        usable = (
            actions.ndim == 2
            and 0 < len(actions) <= self._chunk_size
            and actions.shape[1] == self._joints
            and dt_ns > 0
            and 0 <= t_ns - t_obs_ns <= _OLDEST_NS
            and bool(np.isfinite(actions).all())
        )
        if not usable:
            self.rejected += 1
            return False
        if policy != self._policy:
            self.clear()
            self._policy = policy
        if len(self._order):
            newest = int(self._t_obs[self._order[-1]])
            if t_obs_ns <= newest:
                self.rejected += 1
                return False
            if t_obs_ns - newest > self.staleness_ns:
                self.clear()  # what was seen before an outage has no say after it
        slot = self._free_slot()
        self._actions[slot, : len(actions)] = actions
        self._last[slot] = len(actions) - 1
        self._t_obs[slot] = t_obs_ns
        self._t_added[slot] = t_ns
        self._dt[slot] = dt_ns
        self._order = np.append(self._order, slot)
        return True

    def _free_slot(self) -> int:
        """Slots are taken in turn; the one that comes up can only be the oldest chunk's, which then has to go."""
        slot = self._added % len(self._t_obs)
        self._added += 1
        if len(self._order) and self._order[0] == slot:
            self._order = self._order[1:]
        return slot

    def _live(self, t_ns: int) -> NDArray[np.int64]:
        """Slots of the chunks that have a say at t_ns, oldest first; drops those that never will again."""
        order = self._order
        if not len(order):
            return order
        known = order[self._t_obs[order] <= t_ns]  # a tick that runs late may ask for a time before the newest frame
        if not len(known):
            return known
        age = t_ns - self._t_obs[known]
        ended = age > self._last[known] * self._dt[known]
        if self._last[known[-1]] == 0:
            ended[-1] = False  # a single action is the goal until the next one comes, or nothing for too long
        if ended[-1] or age[-1] > self.staleness_ns:
            return known[:0]
        if self.method == "ensemble":
            known = known[~ended]
        elif self.method == "latest":
            known = known[-1:]
        order = np.concatenate([known, order[self._t_obs[order] > t_ns]]) if known[-1] != order[-1] else known
        self._order = order
        return known

    def at(self, t_ns: int) -> Choice | None:
        """The action meant for t_ns; None when every chunk has ended or the newest observation is too old."""
        order = self._live(t_ns)
        if not len(order):
            self._live_before = b""
            return None
        predictions, remaining = self._predictions(t_ns, order)
        if self.method == "ensemble":
            weights = self._ensemble_weights(t_ns, order, remaining)
        elif self.method == "crossfade":
            weights = self._crossfade_weights(t_ns, order)
        else:
            weights = np.zeros(len(order))
            weights[-1] = 1.0
        np.dot(weights, predictions, out=self._action)
        if self._two_state:
            self._action[self._two_state] = predictions[-1, self._two_state]
        np.subtract(predictions.max(axis=0), predictions.min(axis=0), out=self._spread)
        live = self._t_obs[order[weights > 0]].tobytes()
        changed = live != self._live_before
        self._live_before = live
        return Choice(
            self._action, int(t_ns - self._t_obs[order[-1]]), int(np.count_nonzero(weights)), changed, self._spread
        )

    def _predictions(self, t_ns: int, order: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Every live chunk's action for t_ns [n, J], linear in time between its actions, and its ns to live [n]."""
        age = t_ns - self._t_obs[order]
        dt = self._dt[order]
        last = self._last[order]
        index = np.minimum(age // dt, last)
        part = ((age - index * dt) / dt)[:, None]
        following = np.minimum(index + 1, last)
        before = self._actions[order, index]
        return before + part * (self._actions[order, following] - before), (last * dt - age).astype(float)

    def _ensemble_weights(self, t_ns: int, order: NDArray[np.int64], remaining: Floats) -> Floats:
        """exp(-m*i), oldest i = 0, eased in and out where chunks come more rarely than actions.

        With a fresh chunk for every action the easing has no length and this is Algorithm 2 as published. With
        slower inference few chunks are live, and each arrival or expiry would be a step of 1/n of the disagreement;
        so a chunk's weight grows over the time by which the spacing of chunks exceeds dt, and tapers likewise.
        """
        weights = self._rank_weights[: len(order)].copy()
        if len(order) > 1:
            dt = float(self._dt[order[-1]])
            spacing = float(self._t_obs[order[-1]] - self._t_obs[order[0]]) / (len(order) - 1)
            easing = spacing - dt
            if easing > 1e-3 * dt:
                arriving = (t_ns - self._t_added[order]) / easing
                arriving[0] = 1.0  # somebody must have the say while the others ease in
                weights *= np.clip(arriving, 0.0, 1.0)
                leaving = np.clip(remaining / easing, 0.0, 1.0)
                if (weights * leaving).sum() > 1e-9:
                    weights *= leaving
        return np.asarray(weights / weights.sum())

    def _crossfade_weights(self, t_ns: int, order: NDArray[np.int64]) -> Floats:
        """Each chunk takes over from what went on before it, over a third of its advance: a chain of linear fades.

        A chunk that ended while it was being faded out keeps its last action; what is overtaken is dropped.
        """
        weights = np.zeros(len(order))
        weights[0] = 1.0
        for i in range(1, len(order)):
            advance = CROSSFADE_PART * float(self._t_obs[order[i]] - self._t_obs[order[i - 1]])
            say = min(max(float(t_ns - self._t_added[order[i]]) / advance, 0.0), 1.0)
            weights[:i] *= 1.0 - say
            weights[i] = say
        overtaken = int(np.flatnonzero(weights)[0])
        self._order = self._order[overtaken:]
        return weights
