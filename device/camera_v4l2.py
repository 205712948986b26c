"""A V4L2 camera as a `Source`: negotiation, the driver's buffers, and sentences for what is wrong.

`capture` opens one by the path in cell.toml. linuxpy does the ioctls; its `VideoCapture` iterator is not used, because
it waits without a timeout, copies every frame before it hands it out, and keeps two buffers. Here the frame is a view
of the driver's own buffer, which goes back to the driver at the next call (a raw picture's before it is encoded), and
six buffers cover a capture process that is not scheduled for 150 ms. A camera that cannot do what the cell asks is a
ConfigError that names what it can do; one that is not there is a DeviceUnavailableError.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linuxpy.video import device as v4l2

from device.camera import Frame, YuyvEncoder
from device.config import CameraConfig
from device.errors import ConfigError, DeviceUnavailableError

BUFFERS = 6
_CAPTURE = v4l2.BufferType.VIDEO_CAPTURE
_MMAP = v4l2.Memory.MMAP
# Drivers round the rate to what their clock divides to: 29.97 is 30.
_RATE_TOLERANCE = 0.01
# A stamp further off than this is of another clock. No camera buffers so long.
_LARGEST_AGE_NS = 10_000_000_000
_BY_ID = Path("/dev/v4l/by-id")
# Answers of a driver that has no such ioctl; a camera without a settable rate has the one it has.
_UNSUPPORTED = (errno.ENOTTY, errno.EINVAL)


class V4l2Source:
    """One open and streaming camera."""

    has_noise = True

    def __init__(self, name: str, config: CameraConfig) -> None:
        """Open and start. Raises DeviceUnavailableError (not there, busy, gone while opening) or ConfigError."""
        self._who = f"cameras.{name}: {config.device}"
        self._config = config
        self._device = v4l2.Device(config.device)
        self._buffers: list[mmap.mmap] = []
        self._held: Any = None  # the dequeued buffer whose data the caller is looking at
        self._view: memoryview | None = None
        self._encoder: YuyvEncoder | None = None
        self._stamps_checked = False
        try:
            self._open()
        except OSError as error:
            self.close()
            if isinstance(error, DeviceUnavailableError):
                raise
            raise DeviceUnavailableError(error.errno, self._unavailable(error)) from error
        except ConfigError:
            self.close()
            raise

    @property
    def description(self) -> str:
        return f"{self._card} {self._config.format} {self._config.width}x{self._config.height} at {self._config.fps:g}"

    def next(self, timeout_s: float) -> Frame | None:
        """The next frame; see `Source`. Buffers that the driver has marked as damaged come with `error` set."""
        self._give_back()
        if not self._poll.poll(timeout_s * 1000):
            return None
        try:
            buffer = v4l2.dequeue_buffer(self._device, _CAPTURE, _MMAP)
        except BlockingIOError:
            # poll() reports an error of the stream as readable, and would do so again at once, for ever.
            raise OSError(errno.EIO, f"{self._who} has stopped streaming") from None
        self._held = buffer
        t_ns = buffer.timestamp.secs * 1_000_000_000 + buffer.timestamp.usecs * 1_000
        error = bool(buffer.flags & v4l2.BufferFlag.ERROR)
        if not error and not self._stamps_checked:
            self._check_stamp(buffer.flags, t_ns)
        data = b"" if error else self._jpeg(buffer)
        return Frame(data, t_ns, buffer.sequence, self._config.width, self._config.height, error or not data)

    def close(self) -> None:
        """Stop and give all back; see `Source`."""
        if self._view is not None:
            self._view.release()
        if not self._device.closed:
            with contextlib.suppress(OSError):
                v4l2.stream_off(self._device, _CAPTURE)
        for buffer in self._buffers:
            with contextlib.suppress(BufferError):  # someone still looks at a frame; unmapped when they let go
                buffer.close()
        self._buffers = []
        with contextlib.suppress(OSError):
            self._device.close()

    def _open(self) -> None:
        self._device.open()
        self._check_capabilities()
        picture = self._set_format()
        self._set_rate()
        if self._config.format == "YUYV":
            self._encoder = YuyvEncoder(picture.width, picture.height, picture.bytesperline)
        granted = v4l2.request_buffers(self._device, _CAPTURE, _MMAP, BUFFERS).count
        for index in range(granted):
            buffer = v4l2.query_buffer(self._device, _CAPTURE, _MMAP, index)
            self._buffers.append(v4l2.mmap_from_buffer(self._device, buffer))
            v4l2.enqueue_buffer(self._device, _CAPTURE, _MMAP, 0, index)
        self._poll = select.poll()
        self._poll.register(self._device.fileno(), select.POLLIN)
        v4l2.stream_on(self._device, _CAPTURE)

    def _check_capabilities(self) -> None:
        try:
            capabilities = v4l2.read_capabilities(self._device)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            raise ConfigError(f"{self._who} is no video device; {connected_cameras()}") from None
        self._card = capabilities.card.decode(errors="replace")
        offered = v4l2.Capability(capabilities.device_caps)
        if v4l2.Capability.VIDEO_CAPTURE not in offered or v4l2.Capability.STREAMING not in offered:
            raise ConfigError(
                f"{self._who} ({self._card}) does not stream video; a camera's first node does (...-video-index0). "
                f"{connected_cameras()}"
            )

    def _set_format(self) -> Any:
        config = self._config
        picture = v4l2.set_format(self._device, _CAPTURE, config.width, config.height, config.format).fmt.pix
        given = (picture.width, picture.height, v4l2.human_pixel_format(picture.pixelformat))
        if given != (config.width, config.height, config.format):
            raise self._refusal(f"{config.format} {config.width}x{config.height}")
        return picture

    def _set_rate(self) -> None:
        try:
            interval = v4l2.set_fps(self._device, _CAPTURE, self._config.fps).parm.capture.timeperframe
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return
            raise
        if interval.numerator == 0:
            return  # the driver does not say
        fps = interval.denominator / interval.numerator
        if abs(fps - self._config.fps) > _RATE_TOLERANCE * self._config.fps:
            config = self._config
            raise self._refusal(f"{config.format} {config.width}x{config.height} at {config.fps:g} frames/s")

    def _refusal(self, asked: str) -> ConfigError:
        return ConfigError(f"{self._who} ({self._card}) cannot give {asked}; it offers {', '.join(self._offers())}")

    def _offers(self) -> Iterator[str]:
        """What the camera can do in the formats that we can use: `MJPG 640x480 at 30 15`."""
        offered = False
        for format_ in v4l2.iter_read_formats(self._device, _CAPTURE):
            if format_.pixel_format.human_str() not in ("MJPG", "YUYV"):
                continue
            for size in v4l2.iter_read_frame_sizes(self._device, format_.pixel_format):
                offered = True
                yield f"{format_.pixel_format.human_str()} {self._size_and_rates(format_.pixel_format, size)}"
        if not offered:
            yield "neither MJPG nor YUYV"

    def _size_and_rates(self, pixel_format: int, size: Any) -> str:
        if size.type != v4l2.FrameSizeType.DISCRETE:
            info = size.info
            return f"{info.min_width}x{info.min_height} to {info.max_width}x{info.max_height}"
        width, height = size.info.width, size.info.height
        rates = []
        for interval in v4l2.iter_read_frame_intervals(self._device, pixel_format, width, height):
            low, high = float(interval.min_fps), float(interval.max_fps)
            rates.append(f"{high:g}" if low == high else f"{min(low, high):g}..{max(low, high):g}")
        return f"{width}x{height} at {' '.join(rates)}"

    def _jpeg(self, buffer: Any) -> memoryview | bytes:
        """The frame's JPEG: a view of the driver's buffer, or a raw picture encoded; empty if that is too short."""
        self._view = memoryview(self._buffers[buffer.index])[: buffer.bytesused]
        if self._encoder is None:
            return self._view
        try:
            self._encoder.take(self._view)
        except ValueError:
            return b""
        finally:
            self._give_back()
        return self._encoder.encode()

    def _give_back(self) -> None:
        """Return the held buffer to the driver."""
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._held is not None:
            index, self._held = self._held.index, None
            v4l2.enqueue_buffer(self._device, _CAPTURE, _MMAP, 0, index)

    def _check_stamp(self, flags: int, t_ns: int) -> None:
        """Refuse a driver whose time stamps are not of the clock that all times of the cell are in.

        The flag alone is not enough: uvcvideo sets it whatever clock it has been told to stamp with.
        """
        kind = flags & v4l2.BufferFlag.TIMESTAMP_MASK
        if kind != v4l2.BufferFlag.TIMESTAMP_MONOTONIC or abs(time.monotonic_ns() - t_ns) > _LARGEST_AGE_NS:
            raise ConfigError(
                f"{self._who} ({self._card}) does not stamp its frames with CLOCK_MONOTONIC, so that they cannot be "
                "put in time with the joints; if it is a USB camera, load uvcvideo with clock=CLOCK_MONOTONIC"
            )
        self._stamps_checked = True

    def _unavailable(self, error: OSError) -> str:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return f"{self._who} does not exist; {connected_cameras()}"
        if error.errno == errno.EBUSY:
            return f"{self._who} is in use by another program; find it with: fuser -v {self._config.device}"
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"{self._who} may not be opened by this user; add the user to the group that owns it (video)"
        if error.errno == errno.ENOSPC:
            return (
                f"{self._who} does not get the USB bandwidth that it asks for; use MJPG, a lower rate or size, or plug "
                "one of the cameras into a port of another USB controller"
            )
        return f"{self._who} cannot be started: {os.strerror(error.errno or 0)}"


def connected_cameras() -> str:
    """`connected cameras are PATH (CARD), ...`, by the names that survive replugging where they have one."""
    paths = sorted(_BY_ID.glob("*")) if _BY_ID.exists() else []
    named = {path.resolve() for path in paths}
    paths += [node for node in sorted(Path("/dev").glob("video*")) if node.resolve() not in named]
    found = [f"{path} ({card})" for path in paths if (card := _card_of_camera(path))]
    return f"connected cameras are {', '.join(found)}" if found else "no camera is connected"


def _card_of_camera(path: Path) -> str | None:
    """The card's name if the node captures video; None for other nodes and for what cannot be asked."""
    try:
        with v4l2.IO.open(str(path)) as node:
            capabilities = v4l2.read_capabilities(node)
    except OSError:
        return None
    if v4l2.Capability.VIDEO_CAPTURE not in v4l2.Capability(capabilities.device_caps):
        return None
    return str(capabilities.card.decode(errors="replace"))
