"""The loss of consistency distillation, and which levels of noise a batch is drawn at.

`training` calls `consistency_loss` for each part of a batch. Song et al. 2023 (arXiv:2303.01469), algorithm 2, with
the teacher's DDIM step over several levels at once (Luo et al. 2023, arXiv:2310.04378, section 4.3), the student itself
as target without a gradient, and pseudo-Huber distances (Song and Dhariwal 2023, arXiv:2310.14189, sections 3.3, 3.2).
Weights and the drawing of levels follow alexander-soare/consistency_policy (MIT). Level n is the schedule's timestep
n - 1, as in `export.diffusion.consistency`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.diffusion.consistency import ConsistencyFunction

# Width of the pseudo-Huber loss, in units of the network's output. With the published 0.00054 (arXiv:2310.14189, eq. 8)
# every error counts by its length alone, and small ones never settle: on a policy of 5 M parameters, 1200 further steps
# left a jerk of 0.021 with it and of 0.014 with this.
HUBER = 0.03
REMEMBERED = 0.99  # of a level's loss from before a batch that had it
UNIFORM_SHARE = 0.1  # of the drawing of levels, so that each keeps being looked at

Network = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], timesteps int64 [B]) to its prediction of the noise [B, H, A], for a condition that it knows."""


@dataclass(frozen=True)
class Levels:
    """`ConsistencyFunction` as float32 tensors [T + 1], and the arithmetic of batches [B, H, A] at levels [B]."""

    signal: Tensor
    noise: Tensor
    x0_x: Tensor
    x0_m: Tensor
    f_x: Tensor
    f_m: Tensor
    clip: float

    @staticmethod
    def of(function: ConsistencyFunction, device: torch.device) -> Levels:
        names = ("signal", "noise", "x0_x", "x0_m", "f_x", "f_m")
        tensors = {name: torch.tensor(getattr(function, name), dtype=torch.float32, device=device) for name in names}
        return Levels(**tensors, clip=function.clip)

    @property
    def last(self) -> int:
        """T, the noisiest level."""
        return len(self.signal) - 1

    def noised(self, actions: Tensor, epsilon: Tensor, n: Tensor) -> Tensor:
        return _at(self.signal, n) * actions + _at(self.noise, n) * epsilon

    def student(self, network: Network, x: Tensor, n: Tensor) -> Tensor:
        """f(x, n), not clipped. f(x, 0) = x."""
        return _at(self.f_x, n) * x + _at(self.f_m, n) * network(x, (n - 1).clamp(min=0))

    def ddim(self, network: Network, x: Tensor, n: Tensor, goal: Tensor) -> Tensor:
        """One step of DDIM from level n to `goal`, clipped as the teacher's own sampler clips (arXiv:2010.02502, eq.
        12 with sigma 0): the noise that is put back is the one predicted."""
        epsilon = network(x, n - 1)
        data = (_at(self.x0_x, n) * x + _at(self.x0_m, n) * epsilon).clamp(-self.clip, self.clip)
        return self.noised(data, epsilon, goal)

    def weight(self, n: Tensor, goal: Tensor) -> Tensor:
        """1 / sqrt(sigma_n^2 + sigma_goal^2), sigma = noise / signal: an error of the network counts the same whatever
        the level, [B]. Equal to the published a_n a_m / sqrt(a_n^2 + a_m^2 - 2 a_n^2 a_m^2)."""
        sigma = self.noise / self.signal
        return (sigma[n].square() + sigma[goal].square()).rsqrt()


def consistency_loss(
    levels: Levels, student: Network, teacher: Network, actions: Tensor, epsilon: Tensor, n: Tensor, skip: int
) -> Tensor:
    """pseudoHuber(w * (f(x_n, n) - f(x_m, m))) [B], m = max(n - skip, 0), with a gradient in f(x_n, n) alone.

    `actions`, `epsilon`: float32 [B, H, A], normalised; `n`: int64 [B], 1 to T.
    """
    goal = (n - skip).clamp(min=0)
    x = levels.noised(actions, epsilon, n)
    with torch.no_grad():
        target = levels.student(student, levels.ddim(teacher, x, n, goal), goal).clamp(-levels.clip, levels.clip)
    apart = (levels.student(student, x, n) - target).square().mean(dim=(1, 2))
    return (levels.weight(n, goal).square() * apart + HUBER**2).sqrt() - HUBER


class LevelDraws:
    """Draws levels in proportion to the loss that each lately had, and says how to weigh them so that the expectation
    stays that of drawing uniformly (importance sampling, as Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3).
    """

    def __init__(self, last: int) -> None:
        self.remembered = np.zeros(last)  # of levels 1 .. T; 0 where none was seen yet

    def shares(self) -> NDArray[np.float64]:
        """The probability of each level, [T]; uniform until every level was seen."""
        uniform = np.full(len(self.remembered), 1 / len(self.remembered))
        if not self.remembered.all():
            return uniform
        drawn: NDArray[np.float64] = self.remembered / self.remembered.sum()
        return UNIFORM_SHARE * uniform + (1 - UNIFORM_SHARE) * drawn

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Levels int64 [B] and the factors of their losses, float32 [B]. One from each of `count` equal parts of the
        distribution, so that no batch lacks a kind of level."""
        shares = self.shares()
        places = (rng.permutation(count) + rng.random(count)) / count
        index = np.minimum(np.searchsorted(np.cumsum(shares), places, side="right"), len(shares) - 1)
        factors = (1 / (len(shares) * shares[index])).astype(np.float32)
        return torch.from_numpy(index + 1), torch.from_numpy(factors)

    def saw(self, n: Tensor, losses: Tensor) -> None:
        """Remember the losses [B], unweighted, of levels [B]."""
        for level in set(n.tolist()):
            loss, i = float(losses[n == level].mean()), level - 1
            known = self.remembered[i]
            self.remembered[i] = REMEMBERED * known + (1 - REMEMBERED) * loss if known else loss


def _at(values: Tensor, n: Tensor) -> Tensor:
    return values[n][:, None, None]
