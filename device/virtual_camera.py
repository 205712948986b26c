"""The virtual cell's cameras: pictures of the published world, rendered at the camera's rate, as a webcam gives them.

`capture` opens one where a camera's device is "virtual". Each camera process has a MuJoCo model of its own, sets it to
the newest record of the `world` topic and renders that; so a slow renderer costs frames, never physics or the bus. The
capture time of a frame is the time of the state that it shows. All cameras of a rate expose on the same grid of
CLOCK_MONOTONIC, like cameras on one trigger.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

import numpy as np
import simplejpeg

from device.camera import Frame
from device.config import LoadedCell
from device.errors import ConfigError, DeviceUnavailableError
from device.realtime import sleep_until
from device.topic import TopicReader, topic_path
from device.virtual_world import CAMERAS, VirtualWorld

JPEG_QUALITY = 90
_WORLD_IS_GONE_NS = 500_000_000
_START_S = 10.0


def open_source(cell: LoadedCell, camera: str, runtime: Path) -> VirtualCamera:
    """The camera of that name. Raises ConfigError for a name that the world does not have."""
    if camera not in CAMERAS:
        raise ConfigError(f"{cell.path}: cameras.{camera}: the virtual world has cameras {', '.join(CAMERAS)}")
    config = cell.cell.cameras[camera]
    return VirtualCamera(camera, (config.height, config.width), config.fps, runtime)


class VirtualCamera:
    """A Source (device/camera.py) that renders."""

    has_noise = False

    def __init__(self, name: str, image_hw: tuple[int, int], fps: float, runtime: Path) -> None:
        self.description = f"virtual camera {name}, {image_hw[1]}x{image_hw[0]} at {fps:g} Hz"
        self._name = name
        self._hw = image_hw
        self._period_ns = round(1e9 / fps)
        self._topic = TopicReader(topic_path(runtime, "world"))
        self._sequence = 0
        self._topic.wait(_START_S, 0)  # the world and its cameras are started together
        self._newest_record()
        self._world = VirtualWorld(image_hw=image_hw)
        self._world.render(name)  # the first picture compiles shaders

    def next(self, timeout_s: float) -> Frame | None:
        """The picture of the next instant of the grid. Raises OSError when the world has stopped."""
        now = time.monotonic_ns()
        due = (now // self._period_ns + 1) * self._period_ns
        if due - now > timeout_s * 1e9:
            sleep_until(now + round(timeout_s * 1e9))
            return None
        sleep_until(due)
        record = self._newest_record()
        self._world.set_state(record["state"])
        picture = self._world.render(self._name)
        jpeg: bytes = simplejpeg.encode_jpeg(picture, quality=JPEG_QUALITY, colorspace="RGB")
        self._sequence = due // self._period_ns
        return Frame(jpeg, int(record["t_ns"]), self._sequence, self._hw[1], self._hw[0])

    def close(self) -> None:
        self._world.close()
        self._topic.close()

    def _newest_record(self) -> np.void:
        record = self._topic.latest()
        if record is None or time.monotonic_ns() - int(record["t_ns"]) > _WORLD_IS_GONE_NS:
            raise DeviceUnavailableError(errno.ENODEV, "the virtual world does not run")
        return record
