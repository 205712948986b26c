"""What a person may choose of how a policy samples, on the command line of `export`, `sweep` and `distill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Solver = Literal["ddpm", "ddim", "dpmpp"]
Spacing = Literal["leading", "trailing"]
Chaining = Literal["sigma", "bins"]


@dataclass(frozen=True)
class Sampling:
    """None everywhere means: as the checkpoint's own configuration says."""

    solver: Solver | None = None
    steps: int | None = None
    spacing: Spacing | None = None
    chaining: Chaining | None = None  # Consistency Policy: how its chaining times are read
    chain: int | None = None  # Consistency Policy: steps of chained sampling, 1 for a single one
    force: bool = False  # fewer than MIN_STEPS steps of a policy that was not distilled

    @property
    def chosen(self) -> bool:
        return self != Sampling(force=self.force)


FAST = Sampling(solver="ddim", steps=10, spacing="leading")
MIN_STEPS = 4  # with fewer, an undistilled policy answers between its modes
