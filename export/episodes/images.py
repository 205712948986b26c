"""Single pictures as recordings store them, PNG and JPEG, to RGB pixels.

JPEG is decoded as LeRobot's Pillow decodes it (libjpeg's exact integer transform, smooth chroma), PNG is lossless; so
the pixels are those that the policy was trained on.
"""

from __future__ import annotations

import av
import numpy as np
import simplejpeg
from av.video.frame import VideoFrame

from export.episodes.episode import Pixels
from export.errors import ExportError

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"


def decode_image(content: bytes, where: str) -> Pixels:
    """uint8 [H, W, 3] RGB. Raises ExportError, which names `where` the picture lies."""
    if content.startswith(JPEG):
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(content, colorspace="RGB", fastdct=False, fastupsample=False)
        except ValueError as error:
            raise ExportError(f"{where}: the JPEG picture is damaged: {error}") from error
        return pixels
    if content.startswith(PNG):
        return _decode_png(content, where)
    raise ExportError(f"{where} should be a PNG or JPEG picture, found bytes that begin with {content[:4]!r}")


def _decode_png(content: bytes, where: str) -> Pixels:
    try:
        context = av.VideoCodecContext.create("png", "r")
        frames = [*context.decode(av.Packet(content)), *context.decode(None)]
    except (av.FFmpegError, ValueError) as error:
        raise ExportError(f"{where}: the PNG picture is damaged: {error}") from error
    if len(frames) != 1 or frames[0].is_corrupt:
        raise ExportError(f"{where}: the PNG picture is damaged")
    return rgb(frames[0])  # exact for 8-bit RGB, where no colour is converted


def rgb(frame: VideoFrame) -> Pixels:
    """A decoded frame as uint8 [H, W, 3]."""
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
