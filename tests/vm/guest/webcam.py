"""A USB webcam in software: the kernel's real uvcvideo driver streams MJPEG or YUYV from it, and it fails on request.

Run as `python -m tests.vm.guest.webcam SERIAL PORT [--no-huffman]`; the end of the process, or of its standard input,
is the pull of the plug. Lines on standard input change what it does: `silent on|off` stops the frames, `repeat on|off`
sends the same picture again and again, `truncate N` cuts the next N frames in half. With --no-huffman its JPEGs come
without Huffman tables, as those of some cameras do. Source: USB Device Class Definition for Video Devices, 1.0a.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import simplejpeg

from tests.vm.guest.usbip import UsbDevice, descriptor, u16, u32

WIDTH, HEIGHT, FPS = 640, 480, 30
MANUFACTURER, PRODUCT = "Understudy", "Test Camera"
PICTURES = 30  # distinct ones, sent in turn
LEFT_RGB, RIGHT_RGB = (200, 60, 40), (40, 80, 190)  # what the two halves of a picture show

_INTERVALS = (10_000_000 // FPS, 10_000_000 // 15)  # 100 ns
_PICTURE_BYTES = WIDTH * HEIGHT * 2
_PAYLOAD_BYTES = 16384
_MJPEG, _YUYV = 1, 2  # format indices
_YUY2_GUID = b"YUY2\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
_ENDPOINT = 0x81
_VIDEO, _CONTROL, _STREAMING, _COLLECTION = 0x0E, 1, 2, 3
_CS_INTERFACE = 0x24
_SET_CUR, _GET_LEN, _GET_INFO = 0x01, 0x85, 0x86
_PROBE, _COMMIT = 1, 2
_END_OF_HEADER, _END_OF_FRAME = 0x80, 0x02


def by_id(serial: str) -> str:
    """Where udev puts the camera."""
    name = f"{MANUFACTURER}_{PRODUCT}_{serial}".replace(" ", "_")
    return f"/dev/v4l/by-id/usb-{name}-video-index0"


def pictures(count: int = PICTURES) -> list[bytes]:
    """JPEGs 4:2:2: two halves of plain colour, and a white bar that walks."""
    made = []
    for number in range(count):
        rgb = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        rgb[:, : WIDTH // 2], rgb[:, WIDTH // 2 :] = LEFT_RGB, RIGHT_RGB
        rgb[: HEIGHT // 8, number * WIDTH // count :][:, : 8 + number] = 255
        made.append(simplejpeg.encode_jpeg(rgb, quality=85, colorsubsampling="422"))
    return made


def without_huffman_tables(jpeg: bytes) -> bytes:
    """The JPEG less its DHT segments, as `Motion JPEG` of some cameras is (the tables are those of ITU T.81, K.3)."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:  # start of scan: the rest is entropy-coded
        (length,) = struct.unpack_from(">H", jpeg, at + 2)
        if jpeg[at + 1] != 0xC4:
            kept += jpeg[at : at + 2 + length]
        at += 2 + length
    return kept + jpeg[at:]


def _frame_descriptor(subtype: int) -> bytes:
    bits = _PICTURE_BYTES * 8
    rates = u32(bits * 15) + u32(bits * FPS) + u32(_PICTURE_BYTES) + u32(_INTERVALS[0])
    intervals = bytes([len(_INTERVALS)]) + b"".join(u32(interval) for interval in _INTERVALS)
    return descriptor(_CS_INTERFACE, subtype, 1, 0, u16(WIDTH), u16(HEIGHT), rates, intervals)


def _configuration() -> bytes:
    camera = descriptor(_CS_INTERFACE, 2, 1, u16(0x201), 0, 0, u16(0), u16(0), u16(0), 3, b"\0\0\0")
    output = descriptor(_CS_INTERFACE, 3, 3, u16(0x101), 0, 1, 0)
    units = camera + output
    control = descriptor(_CS_INTERFACE, 1, u16(0x100), u16(13 + len(units)), u32(48_000_000), 1, 1) + units
    mjpeg = descriptor(_CS_INTERFACE, 6, _MJPEG, 1, 1, 1, 0, 0, 0, 0) + _frame_descriptor(7)
    yuyv = descriptor(_CS_INTERFACE, 4, _YUYV, 1, _YUY2_GUID, 16, 1, 0, 0, 0, 0) + _frame_descriptor(5)
    formats = mjpeg + yuyv
    streaming = descriptor(_CS_INTERFACE, 1, 2, u16(15 + len(formats)), _ENDPOINT, 0, 3, 0, 0, 0, 1, 0, 0) + formats
    body = (
        descriptor(0x0B, 0, 2, _VIDEO, _COLLECTION, 0, 2)
        + descriptor(4, 0, 0, 0, _VIDEO, _CONTROL, 0, 2)
        + control
        + descriptor(4, 1, 0, 1, _VIDEO, _STREAMING, 0, 0)
        + streaming
        + descriptor(5, _ENDPOINT, 2, u16(512), 0)
    )
    return descriptor(2, u16(9 + len(body)), 2, 1, 0, 0x80, 250) + body


@dataclass
class Behaviour:
    """What standard input has asked for."""

    silent: bool = False
    repeat: bool = False
    truncate: int = 0


class Webcam(UsbDevice):
    """The camera: negotiation on the control endpoint, frames on the bulk one."""

    def __init__(self, serial: str, jpegs: list[bytes]) -> None:
        device = descriptor(1, u16(0x200), 0xEF, 2, 1, 64, u16(0x0C45), u16(0x6366), u16(0x100), 1, 2, 3, 1)
        super().__init__(device, _configuration(), (MANUFACTURER, PRODUCT, serial))
        self.behaviour = Behaviour()
        self._pictures = {
            _MJPEG: jpegs,
            _YUYV: [bytes([16 + 7 * n, 128, 16 + 7 * n, 128]) * (WIDTH * HEIGHT // 2) for n in range(PICTURES)],
        }
        self._format = _MJPEG
        self._interval = _INTERVALS[0]

    def control(self, request_type: int, request: int, value: int, index: int, data: bytes) -> bytes | None:
        """Probe and commit of the streaming interface; there is nothing else to control."""
        if index & 0xFF != 1 or value >> 8 not in (_PROBE, _COMMIT):
            return None
        if request == _SET_CUR:
            format_, (interval,) = data[2], struct.unpack_from("<I", data, 4)
            self._format = format_ if format_ in self._pictures else _MJPEG
            self._interval = interval if interval in _INTERVALS else _INTERVALS[0]
            return b""
        if request == _GET_LEN:
            return u16(len(self._probe()))
        return b"\x03" if request == _GET_INFO else self._probe()

    def stream(self) -> None:
        """Send pictures at the negotiated rate for ever, whenever the host asks for data."""
        number, frame_id, due = 0, 0, time.monotonic()
        while True:
            interval = self._interval / 1e7
            due = max(due + interval, time.monotonic() - interval)
            time.sleep(max(0.0, due - time.monotonic()))
            if self.behaviour.silent:
                continue
            number += not self.behaviour.repeat
            self._send_picture(self._cut(self._pictures[self._format][number % PICTURES]), frame_id)
            frame_id ^= 1

    def _cut(self, picture: bytes) -> bytes:
        if not self.behaviour.truncate:
            return picture
        self.behaviour.truncate -= 1
        return picture[: len(picture) // 2]

    def _send_picture(self, picture: bytes, frame_id: int) -> None:
        size = _PAYLOAD_BYTES - 2
        for start in range(0, len(picture), size):
            last = _END_OF_FRAME if start + size >= len(picture) else 0
            header = bytes([2, _END_OF_HEADER | frame_id | last])
            if not self.send(header + picture[start : start + size], timeout_s=0.5):
                return  # the host has stopped streaming

    def _probe(self) -> bytes:
        sizes = (0, 0, 0, 0, 0, _PICTURE_BYTES, _PAYLOAD_BYTES)
        return struct.pack("<HBBIHHHHHII", 1, self._format, 1, self._interval, *sizes)


def obey(behaviour: Behaviour) -> None:
    """Follow standard input; its end is the end of the camera."""
    for line in sys.stdin:
        what, _, value = line.strip().partition(" ")
        setattr(behaviour, what, int(value) if what == "truncate" else value == "on")
    os._exit(0)


def main() -> None:
    jpegs = pictures()
    if "--no-huffman" in sys.argv:
        jpegs = [without_huffman_tables(jpeg) for jpeg in jpegs]
    webcam = Webcam(sys.argv[1], jpegs)
    threading.Thread(target=obey, args=(webcam.behaviour,), daemon=True).start()
    threading.Thread(target=webcam.stream, daemon=True).start()
    webcam.plug_in(int(sys.argv[2]))
    webcam.serve()
    os._exit(0)


if __name__ == "__main__":
    main()
