"""The `capture` role: one process a camera, which publishes its frames into the topic `frames/<camera>`.

It does not care who looks. Every frame goes from the driver's buffer into the topic's slot in one copy, with the
driver's capture time and counter; nothing is resampled. A camera may be missing at start, be unplugged, stall or show
the same picture for ever at any moment: capture says so once, waits or reopens, and says once that it is back. Damaged
frames are dropped and counted. Frames of a frozen camera are withheld, because their fresh times would be a lie;
readers see a topic that has stopped, as they do for a camera that is gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device.camera import Frame, FreezeWatch, Source, jpeg_size
from device.config import VIRTUAL, CameraConfig, LoadedCell
from device.log import event
from device.messages import TOPICS, frames_dtype
from device.topic import TopicWriter, topic_path

logger = logging.getLogger("capture")

# How often a missing camera is looked for, by its name; and the first pause after a camera that is there has failed,
# doubled up to the longest while it keeps failing.
LOOK_S = 0.25
LONGEST_PAUSE_S = 2.0
# Longest sleep in the driver: how soon `stop` and a freeze are noticed.
WAIT_S = 0.1
# A camera that is there and silent for so long is closed and opened again, which revives most of them.
REOPEN_AFTER_SILENCE_S = 5.0
# Damage is over when no damaged frame has come for so long.
CLEAN_AFTER_S = 5.0


def run(cell: LoadedCell, camera: str, runtime: Path, stop: Callable[[], bool]) -> None:
    """Publish the frames of one camera of the cell until `stop()`.

    Raises ConfigError when the camera is there and cannot do what the cell file asks of it.
    """
    config = cell.cell.cameras[camera]
    layout = frames_dtype(config.jpeg_capacity)
    writer = TopicWriter(topic_path(runtime, f"frames/{camera}"), layout, TOPICS["frames/*"].slots)
    present = Path(config.device).exists if config.device != VIRTUAL else lambda: True
    try:
        Capture(config, lambda: open_source(cell, camera, runtime), present, writer).run(stop)
    finally:
        writer.close()


def open_source(cell: LoadedCell, camera: str, runtime: Path) -> Source:
    """The camera as cell.toml names it. Raises DeviceUnavailableError where it is not there, ConfigError as `run`."""
    config = cell.cell.cameras[camera]
    if config.device == VIRTUAL:
        from device.virtual_camera import open_source as open_virtual

        return open_virtual(cell, camera, runtime)
    from device.camera_v4l2 import V4l2Source

    return V4l2Source(camera, config)


@dataclass
class Counters:
    """What has happened since the start; all only ever grow."""

    published: int = 0
    missed: int = 0  # by the driver's own counter: frames lost before us
    flagged: int = 0  # marked as damaged by the driver, or a raw picture that is too short
    truncated: int = 0  # no start or no end of a JPEG
    oversized: int = 0  # larger than the topic's slot
    withheld: int = 0  # of a frozen camera
    lost: int = 0  # times that the camera went away


class Announcer:
    """Turns the camera's condition, told again and again, into one event for each change."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._trouble: str | None = None  # name of the event that is in force
        self._since_ns = 0

    def trouble(self, name: str, reason: str, now_ns: int) -> bool:
        """The camera is lost or frozen; returns whether that is news.

        Frozen never follows lost: a camera that returns first has to deliver.
        """
        if self._trouble in (name, "camera.lost"):
            return False
        if self._trouble is None:
            self._since_ns = now_ns
        self._trouble = name
        event(logger, name, level=logging.WARNING, device=self._device, reason=reason)
        return True

    def delivers(self, description: str, now_ns: int) -> None:
        """A frame has been published."""
        if self._trouble is not None:
            away_s = (now_ns - self._since_ns) / 1e9
            event(logger, "camera.back", device=self._device, camera=description, away_s=away_s)
            self._trouble = None


class Capture:
    """One camera's loop.

    `opener` gives a fresh Source each time that the camera has to be opened; `present` says, at the cost of a stat,
    whether opening is worth while.
    """

    def __init__(
        self, config: CameraConfig, opener: Callable[[], Source], present: Callable[[], bool], writer: TopicWriter
    ) -> None:
        self.counters = Counters()
        self._config = config
        self._opener = opener
        self._present = present
        self._writer = writer
        self._announcer = Announcer(config.device)
        self._next_sequence: int | None = None
        self._damage = 0  # frames dropped since the last camera.damaged
        self._damaged_ns = 0
        self._pause_s = LOOK_S

    def run(self, stop: Callable[[], bool]) -> None:
        """Open, publish, and open again when the camera has gone, until `stop()`."""
        while not stop():
            try:
                source = self._opener()
                try:
                    self._stream(source, stop)
                finally:
                    source.close()
            except OSError as error:
                self._lost(error)
                self._wait(stop)
        event(logger, "camera.stopped", device=self._config.device, **vars(self.counters))

    def _wait(self, stop: Callable[[], bool]) -> None:
        """Pause before the camera is opened again.

        A missing one is awaited by its name: the sentence about it opens all the others, which must not go on for ever.
        """
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        while not self._present() and not stop():
            self._pause_s = LOOK_S
            time.sleep(LOOK_S)

    def _stream(self, source: Source, stop: Callable[[], bool]) -> None:
        """Publish what comes; returns when the camera should be opened afresh."""
        self._next_sequence = None  # drivers count from 0 again
        watch = FreezeWatch(self._config.fps, source.has_noise, time.monotonic_ns())
        while not stop():
            frame = source.next(WAIT_S)
            now_ns = time.monotonic_ns()
            if frame is not None:
                self._take(frame, watch, source, now_ns)
            if reason := watch.frozen(now_ns):
                self._announcer.trouble("camera.frozen", reason, now_ns)
                if watch.silent_s(now_ns) > REOPEN_AFTER_SILENCE_S:
                    return
            self._end_of_damage(now_ns)

    def _take(self, frame: Frame, watch: FreezeWatch, source: Source, now_ns: int) -> None:
        """Publish one frame, unless it is damaged or shows the past."""
        self._count_missed(frame.sequence, now_ns)
        size = 0 if frame.error else jpeg_size(frame.data)
        if fault := self._fault(frame, size):
            self._damaged(fault, now_ns)
            return
        jpeg = frame.data[:size]
        watch.saw(jpeg, now_ns)
        if watch.frozen(now_ns):
            self.counters.withheld += 1
            return
        self._publish(frame, jpeg)
        if self.counters.published == 1:
            event(logger, "camera.started", device=self._config.device, camera=source.description)
        self._announcer.delivers(source.description, now_ns)

    def _fault(self, frame: Frame, size: int) -> str | None:
        """Why a frame of which `size` bytes are a JPEG cannot be published, counted; None for a good one."""
        if frame.error:
            self.counters.flagged += 1
            return "damaged on the way from the camera"
        if size == 0:
            self.counters.truncated += 1
            return "truncated JPEG"
        if size > self._config.jpeg_capacity:
            self.counters.oversized += 1
            return "JPEG larger than a slot of the topic"
        return None

    def _publish(self, frame: Frame, jpeg: memoryview | bytes) -> None:
        with self._writer.slot() as record:
            record["t_ns"] = frame.t_ns
            record["sequence"] = frame.sequence
            record["width"] = frame.width
            record["height"] = frame.height
            record["size"] = len(jpeg)
            record["data"][: len(jpeg)] = np.frombuffer(jpeg, np.uint8)
        self.counters.published += 1
        self._pause_s = LOOK_S

    def _count_missed(self, sequence: int, now_ns: int) -> None:
        missed = 0 if self._next_sequence is None else sequence - self._next_sequence
        self._next_sequence = sequence + 1
        if missed > 0:
            self.counters.missed += missed
            self._damaged("lost before they reached us", now_ns, missed)

    def _damaged(self, reason: str, now_ns: int, frames: int = 1) -> None:
        """One event when damage begins; `_end_of_damage` says how much it was."""
        if self._damage == 0:
            event(logger, "camera.damaged", level=logging.WARNING, device=self._config.device, reason=reason)
        self._damage += frames
        self._damaged_ns = now_ns

    def _end_of_damage(self, now_ns: int) -> None:
        if self._damage and now_ns - self._damaged_ns > CLEAN_AFTER_S * 1e9:
            event(logger, "camera.clean", device=self._config.device, dropped=self._damage)
            self._damage = 0

    def _lost(self, error: OSError) -> None:
        # A sentence where the source has one, else the system's own words (No such device, Input/output error).
        reason = error.strerror or str(error)
        if self._announcer.trouble("camera.lost", reason, time.monotonic_ns()):
            self.counters.lost += 1
