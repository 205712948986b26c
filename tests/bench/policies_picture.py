"""Draws docs/pictures/policies.png: how long a chunk takes, ours and LeRobot's, from the benchmarks' figures.

`python -m tests.bench act diffusion --json figures.json; python -m tests.bench.policies_picture figures.json`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "policies.png"
OURS, THEIRS = "#2a78b5", "#b0b0b0"
# bench -> case -> title, and its ways with what they are called, slowest first
PANELS: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "act",
        "2 x 640x480, LeRobot's default sizes",
        "ACT, two cameras 640x480",
        {"lerobot": "LeRobot", "engine": "fp32", "int8": "int8"},
    ),
    (
        "diffusion",
        "the virtual cell's sizes (5 M parameters)",
        "Diffusion, 5 M parameters, two cameras 96x96",
        {"lerobot": "LeRobot, DDPM-100", "ddpm100": "DDPM-100", "ddim10": "DDIM-10", "student": "distilled, 2 steps"},
    ),
    (
        "diffusion",
        "LeRobot's default sizes (266 M parameters)",
        "Diffusion, 266 M parameters, two cameras 96x96",
        {"lerobot": "LeRobot, DDPM-100", "ddpm100": "DDPM-100", "ddim10": "DDIM-10", "student": "distilled, 2 steps"},
    ),
]


def draw(figures: dict[str, Any], path: Path) -> None:
    """Bars of the median time of a chunk; our bars say how many times faster than LeRobot they are."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 2.9), layout="constrained")
    for axis, (bench, case, title, ways) in zip(axes, PANELS, strict=True):
        rows = figures[bench][case]
        rows = rows.get("ways", rows)
        shown = [way for way in ways if way in rows]
        times = [rows[way]["median_ms"] for way in shown]
        axis.barh([ways[way] for way in shown], times, color=[THEIRS if way == "lerobot" else OURS for way in shown])
        for place, (way, milliseconds) in enumerate(zip(shown, times, strict=True)):
            faster = f", {times[0] / milliseconds:.3g}x" if way != "lerobot" and shown[0] == "lerobot" else ""
            shown_ms = f"{milliseconds:,.0f}" if milliseconds >= 20 else f"{milliseconds:.1f}"
            axis.text(milliseconds * 1.08, place, f"{shown_ms} ms{faster}", va="center", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlim(min(times) / 2, max(times) * 12)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.supxlabel(f"median of a chunk, ms (CPU, {figures['diffusion']['threads']} threads)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), PICTURE)
