"""Which timesteps a student is sampled at: a few candidates, tried on recorded observations.

The first step need not be at the very last timestep: what the network is told there is nearly pure noise anyway, and
its errors count less a little further down. `command` calls `choose_timesteps` once the student has learnt; a person
who knows better says so with --timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from export.distillation.gate import Verdict

FIRST = (1.0, 0.95, 0.9, 0.85)  # of the schedule's length
BENDS = (1.0, 1.5, 2.0, 3.0)  # the larger, the sooner the later steps come to where there is little noise


def candidates(steps: int, trained: int) -> list[tuple[int, ...]]:
    """Timesteps to try, each descending, for a schedule of `trained` timesteps; without repeats."""
    found: dict[tuple[int, ...], None] = {}
    for share in FIRST:
        first = round(share * trained) - 1
        for bend in BENDS:
            times = tuple(round(first * (1 - step / steps) ** bend) for step in range(steps))
            if len(set(times)) == steps:
                found[times] = None
    return list(found)


def choose_timesteps(
    choices: Sequence[tuple[int, ...]], judged: Callable[[tuple[int, ...]], Verdict]
) -> tuple[tuple[int, ...], dict[str, float]]:
    """Those that stay furthest from the gate's limits, and how close each candidate came to them."""
    strains = {times: judged(times).strain for times in choices}
    best = min(strains, key=lambda times: strains[times])
    return best, {" ".join(map(str, times)): strain for times, strain in strains.items()}
