"""A memory fence and a futex: the two things that processes sharing memory need and that Python does not have.

device/topic.py is the only caller. `fence()` is a full barrier (libatomic's `atomic_thread_fence`, which is `dmb ish`
on aarch64), called through `ctypes.PyDLL`: the GIL stays where it is, so the call costs 0.1 to 0.3 us and never a
thread switch. `futex_wait` and `futex_wake` sleep and wake on a 32-bit word of shared memory between processes that
need not be related. Importing this module without libatomic, or on a machine that it does not know, raises
AtomicsError: a topic without its fences would lose frames rarely and silently, so nothing starts without them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable
from functools import partial

from device.errors import UnderstudyError

_SEQ_CST = 5  # memory_order_seq_cst, <stdatomic.h>
_FUTEX_WAIT = 0  # <linux/futex.h>; without FUTEX_PRIVATE_FLAG, since waiter and waker are different processes
_FUTEX_WAKE = 1
_EVERYBODY = 2**31 - 1
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}  # asm/unistd_64.h, asm-generic/unistd.h


class AtomicsError(UnderstudyError, OSError):
    """This machine lacks what lock-free topics stand on: the message says what, and what to install."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def load_fence(library: str = "libatomic.so.1") -> Callable[[], None]:
    """The full memory barrier of `library`. Raises AtomicsError if it is not installed."""
    try:
        function = ctypes.PyDLL(library).atomic_thread_fence
    except (OSError, AttributeError) as error:
        raise AtomicsError(
            f"{library} with atomic_thread_fence is needed to exchange data between processes and could not be loaded "
            f"({error}); install it with: apt install libatomic1"
        ) from error
    function.argtypes = (ctypes.c_int,)
    function.restype = None
    return partial(function, _SEQ_CST)


def futex_number(machine: str, byteorder: str) -> int:
    """The number of the futex system call. Raises AtomicsError on machines where topics were never proven."""
    if machine not in _SYS_FUTEX or byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise AtomicsError(
            f"topics need a 64-bit little-endian Linux on {' or '.join(sorted(_SYS_FUTEX))}; "
            f"this is {machine} ({byteorder}-endian, {8 * ctypes.sizeof(ctypes.c_void_p)}-bit)"
        )
    return _SYS_FUTEX[machine]


_FUTEX = futex_number(platform.machine(), sys.byteorder)
_ARGUMENTS = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
# Waiting must let other Python threads run (CDLL); waking takes under a microsecond and must not (PyDLL).
_syscall_waiting = ctypes.CDLL(None, use_errno=True).syscall
_syscall_waking = ctypes.PyDLL(None).syscall
for _function in (_syscall_waiting, _syscall_waking):
    _function.argtypes = _ARGUMENTS
    _function.restype = ctypes.c_long

fence: Callable[[], None] = load_fence()


def futex_wait(address: int, expected: int, timeout_s: float) -> None:
    """Sleep until the 32-bit word at `address` is woken, is found to differ from `expected`, or `timeout_s` has passed.

    May also return early for no reason (a signal): the caller looks at the memory again. The word may be mapped
    read-only. Raises OSError for anything else (a bad address, no futexes in this sandbox).
    """
    seconds, fraction = divmod(max(timeout_s, 0.0), 1.0)
    timeout = _Timespec(int(seconds), int(fraction * 1e9))
    if _syscall_waiting(_FUTEX, address, _FUTEX_WAIT, expected & 0xFFFFFFFF, ctypes.addressof(timeout)) == -1:
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(code, f"futex wait: {os.strerror(code)}")


def futex_waker(address: int) -> Callable[[], object]:
    """A function that wakes everybody who sleeps on the 32-bit word at `address`; costs about 1 us."""
    return partial(_syscall_waking, _FUTEX, address, _FUTEX_WAKE, _EVERYBODY, None)
