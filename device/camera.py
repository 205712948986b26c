"""What `capture` needs of a camera, and the rules it judges frames by; no driver in here.

`Source` is the seam: device/camera_v4l2.py implements it for real cameras, device/virtual_camera.py for the virtual
cell's rendered ones, and tests stand their own there. The rest are rules without clock or file: where a JPEG ends (a
truncated one has no end), how a raw picture becomes a JPEG, when a camera counts as frozen, and which changes of a
camera's state are worth an event.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import simplejpeg

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
# UVC cameras may pad a frame behind its end marker up to their packet size, at most 3 KB (USB 2, isochronous).
_LONGEST_PADDING = 4096

# High enough that encoding a raw picture once costs the policy nothing: 4:2:2 at 90 is what MJPEG cameras give at best.
YUYV_JPEG_QUALITY = 90

_NS = 1_000_000_000


@dataclass(frozen=True)
class Frame:
    """One frame as a source delivers it. `data` is valid until the next call of the source that gave it."""

    data: memoryview | bytes  # a JPEG, perhaps padded or truncated
    t_ns: int  # capture time, CLOCK_MONOTONIC
    sequence: int  # the driver's frame counter
    width: int  # px
    height: int  # px
    error: bool = False  # the driver says that the data are damaged, or a raw picture is too short


class Source(Protocol):
    """An open camera that delivers frames."""

    @property
    def description(self) -> str:
        """What an operator recognises the camera by: card, format, size and rate."""

    @property
    def has_noise(self) -> bool:
        """True for a sensor, of which no two pictures are the same byte for byte; False for a rendered picture."""

    def next(self, timeout_s: float) -> Frame | None:
        """The next frame, or None after `timeout_s` without one. Raises OSError when the camera is gone."""

    def close(self) -> None:
        """Give the camera back. Never raises: it may be gone."""


def jpeg_size(data: memoryview | bytes) -> int:
    """Bytes of the JPEG at the start of `data` without padding behind it; 0 if it is no JPEG or has no end.

    Inside the entropy-coded data a 0xFF is always followed by a stuffed zero or a restart marker (ITU T.81, B.1.1.5),
    so that the last end marker is the JPEG's own.
    """
    if bytes(data[:2]) != _START_OF_IMAGE:
        return 0
    start = max(2, len(data) - _LONGEST_PADDING)
    end = bytes(data[start:]).rfind(_END_OF_IMAGE)
    return 0 if end < 0 else start + end + 2


class YuyvEncoder:
    """Turns packed YUYV 4:2:2 pictures of one size into JPEG 4:2:2, without a detour through RGB.

    Split in two so that the driver gets its buffer back before the encoder works: `take` copies the picture's planes
    out of the buffer, `encode` makes a JPEG of the last picture taken.
    """

    def __init__(self, width: int, height: int, bytes_per_line: int, quality: int = YUYV_JPEG_QUALITY) -> None:
        self._height = height
        self._bytes_per_line = bytes_per_line
        self._used = 2 * width  # bytes of a line that are pixels
        self._quality = quality
        # simplejpeg wants every plane's rows contiguous; in YUYV a row's luma bytes lie two apart.
        self._y = np.empty((height, width), np.uint8)
        self._u = np.empty((height, width // 2), np.uint8)
        self._v = np.empty((height, width // 2), np.uint8)

    @property
    def picture_bytes(self) -> int:
        """What a whole picture takes in the driver's buffer; the last line may lack its padding."""
        return self._bytes_per_line * (self._height - 1) + self._used

    def take(self, data: memoryview | bytes) -> None:
        """Copy the planes of one picture. Raises ValueError if it is shorter than `picture_bytes`."""
        if len(data) < self.picture_bytes:
            raise ValueError(f"a YUYV picture of {len(data)} bytes, expected {self.picture_bytes}")
        flat = np.frombuffer(data, np.uint8)
        lines = np.lib.stride_tricks.as_strided(
            flat, (self._height, self._used), (self._bytes_per_line, 1), writeable=False
        )
        self._y[:] = lines[:, 0::2]
        self._u[:] = lines[:, 1::4]
        self._v[:] = lines[:, 3::4]

    def encode(self) -> bytes:
        jpeg: Any = simplejpeg.encode_jpeg_yuv_planes(self._y, self._u, self._v, quality=self._quality)
        return bytes(jpeg)


class FreezeWatch:
    """Says when a camera that is there does not show the present: no frames, or the same picture again and again."""

    SILENT_PERIODS = 10
    SILENT_AT_LEAST_NS = _NS  # a busy machine is not a broken camera
    # Cameras set exposure and USB bandwidth up before their first frame; 3 s covers the slow ones.
    FIRST_FRAME_NS = 3 * _NS
    SAME_PICTURE_NS = 2 * _NS

    def __init__(self, fps: float, has_noise: bool, now_ns: int) -> None:
        self._silent_ns = max(int(self.SILENT_PERIODS * _NS / fps), self.SILENT_AT_LEAST_NS)
        self._has_noise = has_noise
        self._deadline_ns = now_ns + self.FIRST_FRAME_NS
        self._last_ns = now_ns
        self._last_size = -1
        self._last_checksum: int | None = None
        self._same_since_ns: int | None = None

    def saw(self, jpeg: memoryview | bytes, now_ns: int) -> None:
        """A whole frame has come."""
        self._last_ns = now_ns
        self._deadline_ns = now_ns + self._silent_ns
        if not self._has_noise:
            return
        # Sizes of live frames hardly ever agree, so that the checksum is rarely computed.
        checksum = zlib.crc32(jpeg) if len(jpeg) == self._last_size else None
        if checksum is None or checksum != self._last_checksum:
            self._same_since_ns = None
        elif self._same_since_ns is None:
            self._same_since_ns = now_ns
        self._last_size, self._last_checksum = len(jpeg), checksum

    def silent_s(self, now_ns: int) -> float:
        """Seconds since the last whole frame, or since the camera was opened."""
        return (now_ns - self._last_ns) / _NS

    def frozen(self, now_ns: int) -> str | None:
        """Why the camera counts as frozen, or None."""
        if now_ns > self._deadline_ns:
            return "no frames"
        if self._same_since_ns is not None and now_ns - self._same_since_ns > self.SAME_PICTURE_NS:
            return "the same picture again and again"
        return None
