"""What a policy sees: the newest frames of all its cameras, and those of the observation steps before.

`predict` waits here for frames that have not been used, in sets of one frame a camera that were taken together, and
has those decoded that its engine does not know yet. A set is offered once, never when its newest frame is too old or
its frames are too far apart, and never without the steps before it where the policy looks at several. Why there is
nothing to offer stands in `trouble`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simplejpeg

from device.arrays import Array
from device.bundle import Bundle
from device.config import LoadedCell
from device.topic import TopicReader, topic_path


@dataclass(frozen=True)
class FrameSet:
    """One frame of each camera, taken together: the pictures of one observation step."""

    frames: Mapping[str, Any]  # camera's name -> record of device.messages.frames_dtype
    key: tuple[int, ...]  # capture times, in the order of the policy's cameras

    @property
    def t_ns(self) -> int:
        """Capture time of the newest frame: the time of the observation step."""
        return max(self.key)

    @property
    def skew_ns(self) -> int:
        return max(self.key) - min(self.key)


class Cameras:
    """The frames topics of all of the policy's cameras. `inputs`: the engine's, to be decoded into."""

    def __init__(self, cell: LoadedCell, bundle: Bundle, inputs: Mapping[str, Array], runtime: Path) -> None:
        policy, manifest = cell.cell.policy, bundle.manifest
        self._max_skew_ns = round(policy.max_skew_ms * 1e6)
        self._max_age_ns = round(policy.max_frame_age_ms * 1e6)
        self._steps = manifest.observation_steps
        self._period_ns = round(1e9 / manifest.action_rate_hz)
        self._readers = {
            camera.name: TopicReader(topic_path(runtime, f"frames/{camera.name}")) for camera in manifest.cameras
        }
        self._inputs = {camera.name: inputs[camera.input] for camera in manifest.cameras}
        # Cameras at the same rate are rarely in step: half a period is what waiting for the other one may cost.
        self._pairing_ns = min((round(0.5e9 / cell.cell.cameras[name].fps) for name in self._readers), default=0)
        self._used = dict.fromkeys(self._readers, 0)
        self.trouble: str | None = None  # why the last call gave nothing, where that is worth telling

    def next(self, timeout_s: float) -> list[FrameSet] | None:
        """Wait for a set that has not been offered; it comes last, after those of the steps before, oldest first.

        None where there is none within `timeout_s`, or none that is an observation. Nothing is decoded here.
        """
        frames = self._newest(timeout_s)
        if frames is None:
            return None
        newest = _frame_set(frames)
        self._used = {name: int(frame["t_ns"]) for name, frame in frames.items()}
        self.trouble = self._objection(newest)
        if self.trouble is not None:
            return None
        sets = [self._earlier(newest, back) for back in range(self._steps - 1, 0, -1)]
        whole = [found for found in sets if found is not None]
        return None if len(whole) < len(sets) else [*whole, newest]

    def decode(self, seen: FrameSet) -> bool:
        """Decode a set straight into what the engine reads; False (and `trouble`) where a frame does not fit."""
        for name, frame in seen.frames.items():
            target = self._inputs[name]
            height, width, _ = target.shape
            if (frame["width"], frame["height"]) != (width, height):
                self.trouble = f"{name} gives {frame['width']}x{frame['height']}, the policy takes {width}x{height}"
                return False
            try:
                picture = simplejpeg.decode_jpeg(frame["data"][: frame["size"]], colorspace="RGB", buffer=target)
            except ValueError as error:
                self.trouble = f"{name}: a frame that is no JPEG: {error}"
                return False
            if picture.shape != target.shape:  # a smaller one leaves the rest of the frame before in its place
                found = f"{picture.shape[1]}x{picture.shape[0]}"
                self.trouble = f"{name}: a JPEG of {found} in a frame of {width}x{height}"
                return False
        return True

    def _newest(self, timeout_s: float) -> dict[str, Any] | None:
        """The newest frame of each camera once all are new, or some are and half a frame's time has passed since."""
        deadline = time.monotonic_ns() + round(timeout_s * 1e9)
        some_new = False
        while True:
            now = time.monotonic_ns()
            frames = {name: reader.latest() for name, reader in self._readers.items()}
            old = [name for name, frame in frames.items() if frame is None or int(frame["t_ns"]) <= self._used[name]]
            if not old:
                return frames
            complete = all(frame is not None for frame in frames.values())
            if complete and not some_new and len(old) < len(frames):
                some_new = True
                deadline = min(deadline, now + self._pairing_ns)
            if now >= deadline:
                if complete and some_new:
                    return frames
                self.trouble = f"no new frame from {', '.join(old)}"
                return None
            reader = self._readers[old[0]]
            reader.wait(max((deadline - now) / 1e9, 1e-4), reader.cursor)

    def _objection(self, newest: FrameSet) -> str | None:
        age = time.monotonic_ns() - newest.t_ns
        if age > self._max_age_ns:
            return f"the newest frame is {age / 1e6:.0f} ms old, the bound is {self._max_age_ns / 1e6:.0f} ms"
        if newest.skew_ns > self._max_skew_ns:
            oldest = min(newest.frames, key=lambda name: int(newest.frames[name]["t_ns"]))
            return f"{oldest} is {newest.skew_ns / 1e6:.0f} ms behind, the bound is {self._max_skew_ns / 1e6:.0f} ms"
        return None

    def _earlier(self, newest: FrameSet, back: int) -> FrameSet | None:
        """The set of `back` action periods before the newest, each camera counting from its own newest frame.

        So the cameras keep the phase that they have to each other, and the set is the one that was the newest then,
        whose encoding the engine still has. None where a camera has no frame within half a period of that time.
        """
        frames = {}
        for name, frame in newest.frames.items():
            then_ns = int(frame["t_ns"]) - back * self._period_ns
            found = self._readers[name].nearest(then_ns)
            if found is None or 2 * abs(int(found["t_ns"]) - then_ns) > self._period_ns:
                before_ms = back * self._period_ns / 1e6
                self.trouble = (
                    f"{name} has no frame from {before_ms:.0f} ms before its newest, which the policy looks at"
                )
                return None
            frames[name] = found
        return _frame_set(frames)


def _frame_set(frames: Mapping[str, Any]) -> FrameSet:
    return FrameSet(frames, tuple(int(frame["t_ns"]) for frame in frames.values()))
