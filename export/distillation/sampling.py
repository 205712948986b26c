"""Answers of a teacher and of a student to many observations at once, in PyTorch, for the gate.

A bundle's engine answers one observation; the gate asks for hundreds of answers of a network that may exist in no
bundle yet. The table of steps is the one that export would write (`export.diffusion.sampler`), so what is judged is
what will run. Noise comes from a seed: the same seed gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.diffusion.sampler import COLUMNS, SamplerTable
from export.distillation.workers import workers

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, H, A], timesteps int64 [B], condition [B, G]) to the network's output [B, H, A]."""
Samples = NDArray[np.float32]
BATCH = 64


def repeated(
    denoise: Denoise,
    table: SamplerTable,
    conditions: Tensor,
    count: int,
    shape: tuple[int, int],
    seed: int,
    threads: int,
) -> Samples:
    """`count` samples for each of `conditions` [N, G], every one from noise of its own: normalised actions float32
    [N, K, H, A], `shape` being (H, A). `threads` change nothing but the time it takes."""
    parts = list(enumerate(torch.split(conditions.repeat_interleave(count, dim=0), BATCH)))
    with workers(threads) as pool:
        found = list(pool.map(lambda part: _run(denoise, table, part[1], shape, [seed, part[0]]), parts))
    return np.concatenate(found).reshape(-1, count, *shape)


@torch.no_grad()
def _run(denoise: Denoise, table: SamplerTable, condition: Tensor, shape: tuple[int, int], seed: list[int]) -> Samples:
    """As `export.diffusion.sampler.run`, for a batch: float32 [B, H, A]."""
    rng, size = np.random.default_rng(seed), (len(condition), *shape)

    def draw() -> Tensor:
        return torch.from_numpy(rng.standard_normal(size, np.float32)).to(condition.device)

    x = draw() * table.initial_scale
    previous = torch.zeros_like(x)
    for time, row in zip(table.times, table.coefficients.tolist(), strict=True):
        k = dict(zip(COLUMNS, row, strict=True))
        m = denoise(k["c_in"] * x, torch.full(size[:1], int(time), device=x.device), condition)
        denoised = (k["p_x"] * x + k["p_m"] * m).clamp(-k["clip"], k["clip"])
        x = k["k_denoised"] * denoised + k["k_x"] * x + k["k_m"] * m + k["k_previous"] * previous
        if k["k_noise"]:
            x = x + k["k_noise"] * draw()
        previous = denoised
    found: Samples = x.cpu().numpy()
    return found
