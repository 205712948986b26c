"""Answers of a teacher and of a student to many observations at once, in PyTorch, for the gate.

A bundle's engine answers one observation; the gate asks for hundreds of answers of a network that may exist in no
bundle yet. The table of steps is the one that export would write (`export.diffusion.sampler`), so what is judged is
what will run. Noise comes from a seed: the same seed gives the same answers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from export.diffusion.sampler import COLUMNS, SamplerTable

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, H, A], timesteps int64 [B], condition [B, G]) to the network's output [B, H, A]."""
BATCH = 256


@torch.no_grad()
def answers(denoise: Denoise, table: SamplerTable, conditions: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """One sample for each of `conditions` [N, G]: normalised actions float32 [N, H, A], `shape` being (H, A)."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same on every machine

    def draw(count: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator).to(conditions.device)

    parts = [_run(denoise, table, part, draw) for part in torch.split(conditions, BATCH)]
    return torch.cat(parts)


def repeated(
    denoise: Denoise, table: SamplerTable, conditions: Tensor, count: int, shape: tuple[int, int], seed: int
) -> np.ndarray[tuple[int, int, int, int], np.dtype[np.float32]]:
    """`count` samples for each of `conditions` [N, G], every one from noise of its own: float32 [N, K, H, A]."""
    found = answers(denoise, table, conditions.repeat_interleave(count, dim=0), shape, seed)
    result: np.ndarray[tuple[int, int, int, int], np.dtype[np.float32]] = found.reshape(-1, count, *shape).cpu().numpy()
    return result


def _run(denoise: Denoise, table: SamplerTable, condition: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """As `export.diffusion.sampler.run`, for a batch."""
    count = len(condition)
    x = draw(count) * table.initial_scale
    previous = torch.zeros_like(x)
    for time, row in zip(table.times, table.coefficients.tolist(), strict=True):
        k = dict(zip(COLUMNS, row, strict=True))
        m = denoise(k["c_in"] * x, torch.full((count,), int(time), device=x.device), condition)
        denoised = (k["p_x"] * x + k["p_m"] * m).clamp(-k["clip"], k["clip"])
        x = k["k_denoised"] * denoised + k["k_x"] * x + k["k_m"] * m + k["k_previous"] * previous
        if k["k_noise"]:
            x = x + k["k_noise"] * draw(count)
        previous = denoised
    return x
