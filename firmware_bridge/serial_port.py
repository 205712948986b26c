"""A serial port opened for one owner, raw, with plain system calls.

The servo bus opens its adapter through this and reads and writes the descriptor itself: pyserial's
`read` loops over `select` and its `write` likewise, which costs several system calls a transaction.
Promises a descriptor that is exclusive, raw 8N1 at the exact baud rate, and non-blocking; or
`PortUnavailable`, whose message says what was found and what to do.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import termios
from pathlib import Path

# linux/termios.h for the architectures we run on (x86-64, aarch64: asm-generic); arbitrary baud rates
# go through `struct termios2` because the classic one knows only the constants.
_TCGETS2 = 0x802C542A
_TCSETS2 = 0x402C542B
_TERMIOS2_SIZE = 44
_SPEED_OFFSET = 36  # c_ispeed, c_ospeed
_BOTHER = 0o010000
_CBAUD = 0o010017

# linux/serial.h: struct serial_struct.flags is the fifth int; linux/tty_flags.h for the bit.
_SERIAL_STRUCT_SIZE = 72
_SERIAL_FLAGS_OFFSET = 16
_ASYNC_LOW_LATENCY = 1 << 13


class PortUnavailable(OSError):  # noqa: N818 - a state of the world, like BusLost
    """The port cannot be opened; the message names the port, the reason and the remedy."""


def open_port(path: str, baudrate: int) -> int:
    """Open `path` for this process alone; returns a non-blocking descriptor in raw mode.

    Raises PortUnavailable where the path is missing, busy, forbidden or no serial port.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PortUnavailable(error.errno, _reason(path, error)) from error
    try:
        if not os.isatty(descriptor):
            raise PortUnavailable(errno.ENOTTY, f"{path} is not a serial port; {_candidates()}")
        _claim(path, descriptor)
        _set_raw(descriptor)
        set_baudrate(descriptor, baudrate)
        set_low_latency(descriptor)
        termios.tcflush(descriptor, termios.TCIOFLUSH)
    except PortUnavailable:
        os.close(descriptor)
        raise
    except (OSError, termios.error) as error:
        os.close(descriptor)
        raise PortUnavailable(errno.EIO, f"{path} cannot be set to {baudrate} baud: {error}") from error
    return descriptor


def close_port(descriptor: int) -> None:
    """Give the port back. Never raises: the adapter may be gone."""
    with contextlib.suppress(OSError, termios.error):
        fcntl.ioctl(descriptor, termios.TIOCNXCL)
        termios.tcflush(descriptor, termios.TCIOFLUSH)  # close would wait for a stuck adapter to take what is left
    with contextlib.suppress(OSError):
        os.close(descriptor)


def set_baudrate(descriptor: int, baudrate: int) -> None:
    """Set any baud rate, also those that have no constant (128000, 250000)."""
    settings = bytearray(fcntl.ioctl(descriptor, _TCGETS2, bytes(_TERMIOS2_SIZE)))
    control_flags = struct.unpack_from("I", settings, 8)[0] & ~_CBAUD & ~(_CBAUD << 16)
    struct.pack_into("I", settings, 8, control_flags | _BOTHER)
    struct.pack_into("II", settings, _SPEED_OFFSET, baudrate, baudrate)
    fcntl.ioctl(descriptor, _TCSETS2, bytes(settings))


def get_baudrate(descriptor: int) -> int:
    """The baud rate the port is set to; on a pty's master, what its user has set."""
    settings = fcntl.ioctl(descriptor, _TCGETS2, bytes(_TERMIOS2_SIZE))
    return int(struct.unpack_from("I", settings, _SPEED_OFFSET + 4)[0])


def set_low_latency(descriptor: int) -> bool:
    """Ask the driver to hand bytes over at once (FTDI: latency timer 1 ms instead of 16).

    Returns whether the driver took it; most USB serial drivers neither need nor know it.
    """
    try:
        settings = bytearray(fcntl.ioctl(descriptor, termios.TIOCGSERIAL, bytes(_SERIAL_STRUCT_SIZE)))
        flags = struct.unpack_from("i", settings, _SERIAL_FLAGS_OFFSET)[0]
        struct.pack_into("i", settings, _SERIAL_FLAGS_OFFSET, flags | _ASYNC_LOW_LATENCY)
        fcntl.ioctl(descriptor, termios.TIOCSSERIAL, bytes(settings))
    except OSError:
        return False
    return True


def set_wake_bytes(descriptor: int, count: int) -> None:
    """Let poll() report the port as readable only once `count` bytes (1..255) are there (VMIN)."""
    settings = termios.tcgetattr(descriptor)
    settings[6][termios.VMIN] = count
    settings[6][termios.VTIME] = 0
    termios.tcsetattr(descriptor, termios.TCSANOW, settings)


def _set_raw(descriptor: int) -> None:
    settings = termios.tcgetattr(descriptor)
    settings[0] = settings[1] = settings[3] = 0  # no input, output or line processing
    settings[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    settings[6][termios.VMIN] = 1
    settings[6][termios.VTIME] = 0
    termios.tcsetattr(descriptor, termios.TCSANOW, settings)


def _claim(path: str, descriptor: int) -> None:
    # flock stops programs that ask (pyserial's exclusive mode, another understudy, also run as root);
    # TIOCEXCL stops those that do not.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PortUnavailable(errno.EBUSY, _busy(path)) from error
    fcntl.ioctl(descriptor, termios.TIOCEXCL)


def _busy(path: str) -> str:
    return f"{path} is in use by another program; find it with: fuser -v {path}"


def _reason(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"{path} does not exist; {_candidates()}"
    if error.errno == errno.EBUSY:
        return _busy(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} may not be opened by this user; add the user to the group that owns it (dialout)"
    return f"{path} cannot be opened: {os.strerror(error.errno or 0)}"


def _candidates() -> str:
    found = sorted(
        str(port) for pattern in ("ttyACM*", "ttyUSB*") for port in Path("/dev").glob(pattern) if _is_tty(port)
    )
    return f"connected adapters are {', '.join(found)}" if found else "no serial adapter is connected"


def _is_tty(port: Path) -> bool:
    try:
        return stat.S_ISCHR(port.stat().st_mode)
    except OSError:  # unplugged between the listing and the look
        return False
