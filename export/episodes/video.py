"""Single frames out of videos, at the time asked for: seek to the key frame before, decode forward to the frame.

The LeRobotDataset reader asks by time, since that is how LeRobot ties frames to rows. Ascending times in one file cost
one pass or less: a frame is decoded only where no key frame lies between the last one and the next. Files stay open, a
few at a time. What comes out is the frame whose time is asked for or an error, never a neighbour.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from export.episodes.episode import Pixels
from export.episodes.images import rgb
from export.errors import ExportError

OPEN_FILES = 8


class Video:
    """One open file. Not for use by several threads."""

    def __init__(self, path: Path) -> None:
        """Raises ExportError where there is no file, no video in it, or nothing that decodes it."""
        self.path = path
        if not path.is_file():
            raise ExportError(f"{path} is missing")
        try:
            self._container = av.open(str(path))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ExportError(
                f"{path} is damaged or no video, as after a recording that was cut off: {error}"
            ) from error
        if not self._container.streams.video:
            raise ExportError(f"{path} holds no video")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            raise ExportError(f"{path}: its video codec is unknown to FFmpeg here; convert it to H.264 or AV1")
        base = self._stream.time_base
        if base is None:
            raise ExportError(f"{path} gives its frames no time")
        self._time_base = float(base)
        self._key_times = _key_times(self._stream)
        self._coming: Iterator[VideoFrame] = iter(())
        self._latest: VideoFrame | None = None

    def frames(self, times_s: Sequence[float], tolerance_s: float) -> Iterator[Pixels]:
        """The frame within `tolerance_s` of each of `times_s`, uint8 [H, W, 3] RGB; ascending times are fastest.
        Raises ExportError where there is none."""
        tolerance = tolerance_s / self._time_base
        for time_s in times_s:
            yield rgb(self._frame(time_s / self._time_base, tolerance))

    def close(self) -> None:
        self._container.close()

    def _frame(self, time: float, tolerance: float) -> VideoFrame:
        """`time` and `tolerance` in the stream's time base."""
        frame = self._latest
        if frame is None or _time(frame) > time + tolerance or self._key_between(_time(frame), time + tolerance):
            frame = self._seek(time, tolerance)
        while frame is not None and _time(frame) < time - tolerance:
            frame = self._next()
        if frame is None or _time(frame) > time + tolerance:
            found = "it ends before" if frame is None else f"the next is at {_time(frame) * self._time_base:.4f} s"
            missing = f"{self.path} has no frame at {time * self._time_base:.4f} s, {found}"
            raise ExportError(f"{missing}; the video does not belong to these rows")
        return frame

    def _key_between(self, begin: float, end: float) -> bool:
        return bisect.bisect_right(self._key_times, begin) < bisect.bisect_right(self._key_times, end)

    def _seek(self, time: float, tolerance: float) -> VideoFrame | None:
        """The key frame at or before `time`, or what is first in a file whose index leads elsewhere."""
        frame = None
        for start in (max(int(time + tolerance), 0), 0):
            try:
                self._container.seek(start, stream=self._stream)
            except av.FFmpegError as error:
                raise ExportError(f"{self.path} is damaged: {error}") from error
            self._coming = self._container.decode(self._stream)
            frame = self._next()
            if frame is not None and _time(frame) <= time + tolerance:
                return frame
        return frame

    def _next(self) -> VideoFrame | None:
        try:
            self._latest = next(self._coming, None)
        except (av.FFmpegError, ValueError) as error:
            raise ExportError(f"{self.path} is damaged: {error}") from error
        if self._latest is not None and (self._latest.is_corrupt or self._latest.pts is None):
            raise ExportError(f"{self.path} is damaged: a frame does not decode")
        return self._latest


class Videos:
    """Open files by path; those used longest ago are closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Video] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, path: Path) -> Video:
        if path not in self._open:
            self._open[path] = Video(path)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]


def _key_times(stream: VideoStream) -> list[int]:
    """When key frames are shown, by the file's index; empty where it has none.

    The index holds times of decoding, which with B-frames run ahead of those of display by as much as the first does.
    """
    times = sorted(entry.timestamp for entry in stream.index_entries if entry.is_keyframe)
    return [time - times[0] + (stream.start_time or 0) for time in times]


def _time(frame: VideoFrame) -> int:
    return frame.pts if frame.pts is not None else 0  # _next has refused frames without
