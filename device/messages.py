"""Every topic of a cell, as one table: who writes it, how long its history is, and what one record holds, with units.

The roles and the tools that watch them (`status`, the recorder, the demo's report) read this file and nothing else to
know what flows. A record is a numpy structured dtype of fixed size; where the size depends on the cell (number of
joints, largest JPEG, longest chunk), the table holds a function of that size. All times are CLOCK_MONOTONIC
nanoseconds. Positions are in the joint's own unit as cell.toml names it (degrees, range_m100_100 or range_0_100).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Mode(IntEnum):
    """What `execute` is doing; the value on the wire (`goals.mode`, `ticks.mode`)."""

    IDLE = 0
    TELEOP = 1
    POLICY = 2
    LIMP = 3
    FAULT = 4


def frames_dtype(jpeg_capacity: int) -> np.dtype[np.void]:
    """One camera frame, always JPEG: as the camera made it, or encoded once where the camera gives raw pixels."""
    return np.dtype(
        [
            ("t_ns", "<i8"),  # capture time: the driver's buffer timestamp
            ("sequence", "<u8"),  # the driver's frame counter; a gap is a frame lost before us
            ("width", "<u4"),  # px
            ("height", "<u4"),  # px
            ("size", "<u4"),  # bytes of `data` that are the JPEG
            ("data", "u1", (jpeg_capacity,)),
        ],
        align=True,
    )


def joints_dtype(joints: int) -> np.dtype[np.void]:
    """What one sync read of the bus said, once a control tick."""
    return np.dtype(
        [
            ("t_ns", "<i8"),  # when the reply was in
            ("tick", "<u8"),
            ("position", "<f8", (joints,)),  # joint units
            ("velocity", "<f8", (joints,)),  # joint units/s
            ("load", "<f4", (joints,)),  # fraction of stall torque, -1..1
            ("current_a", "<f4", (joints,)),
            ("voltage_v", "<f4", (joints,)),
            ("temperature_c", "<f4", (joints,)),
            ("error", "u1", (joints,)),  # the servo's status byte
            ("valid", "u1", (joints,)),  # 0: this servo was silent in this tick, its values are the last known
        ],
        align=True,
    )


def goals_dtype(joints: int) -> np.dtype[np.void]:
    """What was sent to the bus in a tick, and what was asked for before the guard had its say."""
    return np.dtype(
        [
            ("t_ns", "<i8"),  # the tick's scheduled time: the instant that the goal is meant for
            ("tick", "<u8"),
            ("requested", "<f8", (joints,)),  # joint units; what the mode chose
            ("goal", "<f8", (joints,)),  # joint units; what the guard let through
            ("mode", "u1"),  # Mode
            ("holding", "u1"),  # 1: the mode had nothing fresh to say, the arm decelerates or holds
            ("interventions", "<u4"),  # bit set of firmware_bridge.guard.Intervention
            ("chunk_age_ns", "<i8"),  # now - t_obs of the newest live chunk; -1: none live
            ("live_chunks", "<u4"),  # predictions that had a say in this goal
            ("boundary", "u1"),  # 1: the set of live chunks changed since the last tick
            ("disagreement", "<f4", (joints,)),  # joint units; largest spread between live predictions for this instant
        ],
        align=True,
    )


TICKS = np.dtype(
    [
        ("t_ns", "<i8"),  # scheduled start
        ("tick", "<u8"),
        ("lateness_ns", "<i8"),  # actual start - scheduled start
        ("read_ns", "<i8"),  # duration of the sync read
        ("write_ns", "<i8"),  # duration of the sync write
        ("work_ns", "<i8"),  # duration of the whole tick
        ("missed", "<u8"),  # periods skipped since start
        ("unsent", "<u8"),  # ticks whose goals did not reach the bus, since start
        ("bus_errors", "<u8"),  # timeouts + checksum errors since start
        ("holds", "<u8"),  # times that all sources had gone stale, since start
        ("chunks_refused", "<u8"),  # of another policy, or unusable, since start
        ("mode", "u1"),  # Mode
        ("fault", "S96"),  # why the mode is FAULT, else empty
    ],
    align=True,
)


def chunks_dtype(chunk_size: int, joints: int) -> np.dtype[np.void]:
    """One inference: action i is meant for t_obs_ns + i * dt_ns."""
    return np.dtype(
        [
            ("t_obs_ns", "<i8"),  # capture time of the newest camera frame that the policy saw
            ("t_ns", "<i8"),  # when the chunk was published
            ("dt_ns", "<i8"),
            ("chunk_id", "<u8"),
            ("count", "<u4"),  # actions that are valid
            ("skew_ns", "<i8"),  # newest minus oldest frame among the cameras
            ("inference_ns", "<i8"),
            ("policy", "S64"),  # sha256 of the bundle's manifest, hex
            ("actions", "<f4", (chunk_size, joints)),  # joint units
        ],
        align=True,
    )


EVENTS = np.dtype(
    [
        ("t_ns", "<i8"),
        ("name", "S48"),  # stable, dotted: policy.activated, bus.lost
        ("fields", "S464"),  # JSON object
    ],
    align=True,
)


def world_dtype(state_size: int) -> np.dtype[np.void]:
    """The virtual cell only: the physics state that its cameras draw, and how far the task is."""
    return np.dtype(
        [
            ("t_ns", "<i8"),
            ("episode", "<u4"),
            ("seed", "<u4"),
            ("t_start_ns", "<i8"),  # when this episode's world was set up
            ("t_done_ns", "<i8"),  # when the task was done; 0: not yet
            ("progress", "S16"),
            ("state", "<f8", (state_size,)),
        ],
        align=True,
    )


@dataclass(frozen=True)
class Topic:
    """A row of the table. `name` may end in /* where every instance of the writer has its own (cameras, roles)."""

    name: str
    writer: str  # role
    slots: int  # ring length: frames need at least 4, control topics hold several seconds
    dtype: Callable[..., np.dtype[np.void]] | np.dtype[np.void]


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        # Half a second at 30 frames/s: a policy of several observation steps looks back in it, T - 1 action periods.
        Topic("frames/*", "capture", 16, frames_dtype),
        Topic("joints", "execute", 1024, joints_dtype),
        Topic("goals", "execute", 1024, goals_dtype),
        Topic("ticks", "execute", 1024, TICKS),
        Topic("chunks", "predict", 64, chunks_dtype),
        Topic("events/*", "*", 256, EVENTS),
        Topic("world", "world", 64, world_dtype),
    )
}
