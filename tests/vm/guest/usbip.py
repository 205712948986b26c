"""A USB device in software: answers the host controller vhci_hcd over USB/IP, on a socket pair within one process.

`UsbDevice` knows the transport and the standard requests; a subclass says what it is (descriptors), answers its class's
control requests, and sends on its one bulk IN endpoint with `send`. The kernel's own driver binds to it as to real
hardware. Closing the socket, which the end of the process does too, is the pull of the plug.
Protocol: Documentation/usb/usbip_protocol.rst of the kernel.
"""

from __future__ import annotations

import collections
import socket
import struct
import threading
from pathlib import Path

ATTACH = Path("/sys/devices/platform/vhci_hcd.0/attach")
HIGH_SPEED = 3

_CMD_SUBMIT, _CMD_UNLINK, _RET_SUBMIT, _RET_UNLINK = 1, 2, 3, 4
_STALL = -32  # -EPIPE
_UNLINKED = -104  # -ECONNRESET
_GET_STATUS, _GET_DESCRIPTOR = 0, 6
_DEVICE, _CONFIGURATION, _STRING = 1, 2, 3
_US_ENGLISH = b"\x09\x04"


def descriptor(*parts: int | bytes) -> bytes:
    """A descriptor with its length in front; integers are single bytes."""
    body = b"".join(bytes([part]) if isinstance(part, int) else part for part in parts)
    return bytes([len(body) + 1]) + body


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


class UsbDevice:
    """One high-speed device with a control endpoint and a bulk IN endpoint."""

    def __init__(self, device: bytes, configuration: bytes, strings: tuple[str, ...]) -> None:
        self._descriptors = {_DEVICE: device, _CONFIGURATION: configuration}
        self._strings = strings
        self._socket, self._kernel_end = socket.socketpair()
        self._waiting: collections.deque[int] = collections.deque()  # IN requests of the host, to be answered in order
        self._change = threading.Condition()

    def control(self, request_type: int, request: int, value: int, index: int, data: bytes) -> bytes | None:
        """Answer a class request; None stalls it. To be overridden."""
        raise NotImplementedError

    def plug_in(self, port: int) -> None:
        """Attach to a port of the virtual hub."""
        devid = (1 << 16) | (port + 2)
        ATTACH.write_text(f"{port} {self._kernel_end.fileno()} {devid} {HIGH_SPEED}")
        self._kernel_end.close()

    def send(self, data: bytes, timeout_s: float) -> bool:
        """Answer the host's next IN request; False if it makes none in time."""
        with self._change:
            if not self._change.wait_for(lambda: self._waiting, timeout_s):
                return False
            self._return(self._waiting.popleft(), data=data)
            return True

    def serve(self) -> None:
        """Answer the host until it lets go of the device."""
        while header := self._receive(20):
            command, sequence, _, is_in, endpoint = struct.unpack(">5I", header)
            rest = self._receive(28)
            if command == _CMD_UNLINK:
                self._unlink(sequence, *struct.unpack_from(">I", rest))
            elif endpoint == 0:
                self._control(sequence, rest, bool(is_in))
            else:
                with self._change:
                    self._waiting.append(sequence)
                    self._change.notify_all()

    def _control(self, sequence: int, rest: bytes, is_in: bool) -> None:
        (length,) = struct.unpack_from(">i", rest, 4)
        request_type, request, value, index, most = struct.unpack_from("<BBHHH", rest, 20)
        data = b"" if is_in else self._receive(length)
        answer = self._answer(request_type, request, value, index, data)
        with self._change:
            if answer is None:
                self._return(sequence, status=_STALL)
            elif is_in:
                self._return(sequence, data=answer[:most])
            else:
                self._return(sequence, length=length)

    def _answer(self, request_type: int, request: int, value: int, index: int, data: bytes) -> bytes | None:
        if request_type & 0x60:  # not a standard request
            return self.control(request_type, request, value, index, data)
        if request_type & 0x80 == 0:
            return b""  # set configuration, set interface, clear feature
        if request == _GET_STATUS:
            return b"\0\0"
        if request == _GET_DESCRIPTOR:
            kind, number = value >> 8, value & 0xFF
            return self._string(number) if kind == _STRING else self._descriptors.get(kind)
        return None

    def _string(self, number: int) -> bytes | None:
        if number == 0:
            return descriptor(_STRING, _US_ENGLISH)
        if number > len(self._strings):
            return None
        return descriptor(_STRING, self._strings[number - 1].encode("utf-16le"))

    def _unlink(self, sequence: int, unwanted: int) -> None:
        with self._change:
            status = _UNLINKED if unwanted in self._waiting else 0
            if status:
                self._waiting.remove(unwanted)
            self._socket.sendall(struct.pack(">5Ii24x", _RET_UNLINK, sequence, 0, 0, 0, status))

    def _return(self, sequence: int, status: int = 0, data: bytes = b"", length: int | None = None) -> None:
        done = len(data) if length is None else length
        self._socket.sendall(struct.pack(">5I5i8x", _RET_SUBMIT, sequence, 0, 0, 0, status, done, 0, 0, 0) + data)

    def _receive(self, count: int) -> bytes:
        """Exactly `count` bytes, or none at the end of the connection."""
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                return b""
            data += more
        return data
