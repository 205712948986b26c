"""The demo's report: what the cameras saw, what the joints did, how chunks were blended, how late ticks were.

Drawn from the records of the control topics. Four pictures and the figures as JSON, in one folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from device.messages import Mode
from device.topic import TopicReader, topic_path

mpl.use("Agg")
import matplotlib.pyplot as plt

Records = NDArray[Any]
_FILM_EVERY_S = 0.75
_FILM_LENGTH = 12
_STRETCH_S = 2.0


class Film:
    """A frame of every camera now and then, during the first episode."""

    def __init__(self, runtime: Path, cameras: list[str]) -> None:
        self._readers = {name: TopicReader(topic_path(runtime, f"frames/{name}")) for name in cameras}
        self.frames: list[tuple[float, dict[str, NDArray[np.uint8]]]] = []

    def take(self, t_ns: int, last: bool = False) -> None:
        """Keep the newest frames if it is time (or `last`); t_ns counts from the start of the episode."""
        full, early = len(self.frames) >= _FILM_LENGTH, t_ns < len(self.frames) * _FILM_EVERY_S * 1e9
        if (full or early) and not last:
            return
        pictures = {}
        for name, reader in self._readers.items():
            frame = reader.latest()
            if frame is not None:
                pictures[name] = simplejpeg.decode_jpeg(frame["data"][: frame["size"]].tobytes())
        self.frames.append((t_ns / 1e9, pictures))


def write_report(
    folder: Path,
    figures: dict[str, Any],
    names: list[str],
    *,
    goals: Records,
    joints: Records,
    chunks: Records,
    ticks: Records,
    film: Film,
) -> None:
    """Write report.json and the pictures into `folder`, which exists."""
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    moving = goals[goals["mode"] == Mode.POLICY] if len(goals) else goals
    if not len(moving):
        return
    first = _first_run(moving)
    _draw_film(folder / "cameras.png", film)
    _draw_joints(folder / "joints.png", names, first, joints)
    _draw_chunks(folder / "chunks.png", names, first, chunks)
    _draw_lateness(folder / "lateness.png", ticks[ticks["mode"] == Mode.POLICY])


def _first_run(moving: Records) -> Records:
    """The goals of the first episode: up to the first gap between policy ticks."""
    gaps = np.flatnonzero(np.diff(moving["t_ns"]) > 1_000_000_000)
    return moving[: gaps[0] + 1] if len(gaps) else moving


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_film(path: Path, film: Film) -> None:
    if not film.frames:
        return
    names = list(film.frames[0][1])
    figure, axes = plt.subplots(
        len(names), len(film.frames), figsize=(1.35 * len(film.frames), 1.6 * len(names)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, (seconds, pictures) in enumerate(film.frames):
        for row, name in enumerate(names):
            axis = axes[row, column]
            axis.set_axis_off()
            if name in pictures:
                axis.imshow(pictures[name])
            if row == 0:
                axis.set_title(f"{seconds:.1f} s", fontsize=8)
            if column == 0:
                axis.text(-0.06, 0.5, name, fontsize=8, rotation=90, va="center", ha="right", transform=axis.transAxes)
    _save(figure, path)


def _draw_joints(path: Path, names: list[str], goals: Records, joints: Records) -> None:
    t0 = goals["t_ns"][0]
    measured = joints[(joints["t_ns"] >= t0) & (joints["t_ns"] <= goals["t_ns"][-1])]
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 1.5 * len(names)), sharex=True, layout="constrained")
    for index, name in enumerate(names):
        axis = np.atleast_1d(axes)[index]
        axis.plot((goals["t_ns"] - t0) / 1e9, goals["goal"][:, index], label="goal", linewidth=1.2)
        axis.plot((measured["t_ns"] - t0) / 1e9, measured["position"][:, index], label="position", linewidth=1.0)
        axis.set_ylabel(name, fontsize=8)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(loc="upper right", fontsize=8)
    np.atleast_1d(axes)[-1].set_xlabel("s")
    figure.suptitle("Joint goals and positions (degrees; gripper 0 to 100)")
    _save(figure, path)


def _draw_chunks(path: Path, names: list[str], goals: Records, chunks: Records) -> None:
    """The chunks over one stretch of time, with the action that came out of them, for the joint that moves most."""
    if not len(chunks):
        return
    start, joint = _busiest(goals)
    end = start + round(_STRETCH_S * 1e9)
    shown = goals[(goals["t_ns"] >= start) & (goals["t_ns"] <= end)]
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    reach = chunks["t_obs_ns"] + chunks["count"].astype(np.int64) * chunks["dt_ns"]
    live = chunks[(chunks["t_ns"] <= end) & (reach >= start)]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, max(len(live), 1)))
    for chunk, colour in zip(live, colours, strict=True):
        times = chunk["t_obs_ns"] + np.arange(chunk["count"]) * chunk["dt_ns"]
        useful = times >= chunk["t_ns"]  # what was past when the chunk came is never executed
        axis.plot((times[useful] - start) / 1e9, chunk["actions"][: chunk["count"]][useful, joint],
                  color=colour, linewidth=0.6, alpha=0.7)  # fmt: skip
    axis.plot((shown["t_ns"] - start) / 1e9, shown["goal"][:, joint], color="crimson", linewidth=2, label="goal sent")
    inside = (live["t_ns"] >= start) & (live["t_ns"] <= end)
    axis.plot((live["t_ns"][inside] - start) / 1e9, np.full(int(inside.sum()), axis.get_ylim()[0]), "|", color="black",
              label="chunk arrives")  # fmt: skip
    axis.set_xlim(0, _STRETCH_S)
    axis.set_xlabel("s")
    axis.set_ylabel(names[joint])
    axis.set_title("Live chunks (dark: older) and the action sent")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _busiest(goals: Records) -> tuple[int, int]:
    """Start of the stretch with the most motion, and the joint that moves most in it (the gripper aside)."""
    window = max(2, min(len(goals) - 1, int(_STRETCH_S * 60)))
    arm = goals["goal"][:, :-1] if goals["goal"].shape[1] > 1 else goals["goal"]
    travel = np.abs(np.diff(arm, axis=0)).cumsum(axis=0)
    spans = travel[window - 1 :] - np.concatenate([np.zeros((1, travel.shape[1])), travel])[: len(travel) - window + 1]
    at, joint = np.unravel_index(int(spans.argmax()), spans.shape)
    return int(goals["t_ns"][at]), int(joint)


def _draw_lateness(path: Path, ticks: Records) -> None:
    if not len(ticks):
        return
    lateness_us = np.maximum(ticks["lateness_ns"] / 1e3, 1.0)
    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.hist(lateness_us, bins=np.geomspace(1, max(lateness_us.max(), 1000) * 1.05, 80).tolist())
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("start of a tick after its schedule, us")
    axis.set_ylabel("ticks")
    axis.set_title(f"{len(ticks)} ticks: median {np.median(lateness_us):.0f} us, "
                   f"p99.9 {np.percentile(lateness_us, 99.9):.0f} us, largest {lateness_us.max():.0f} us")  # fmt: skip
    axis.grid(alpha=0.3)
    _save(figure, path)
