"""The file behind a topic: its layout, how it comes into being, and how one writer is kept the only one.

device/topic.py is the only caller; this module knows files, locks and offsets, that one the protocol in the slots. A
file appears whole, under its name, by a rename, with all of its room allocated: a reader never sees half a header, and
a full tmpfs is an error at start instead of a SIGBUS later. It describes itself (dtype, slots), so that a reader needs
no schema. A writer that died leaves a file that its successor replaces, going on from its number.

Layout, in native unsigned 64-bit words (only little-endian machines, see device/atomics.py): the header's page or
pages (words 0 to 9, head counter at word 16, the dtype's descr as text from byte 256), then the slots, each one cache
line that holds `seq`, and the record, padded to whole cache lines.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import fcntl
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from device.atomics import futex_waker
from device.errors import UnderstudyError

Record = npt.NDArray[np.void]

_MAGIC = b"USTOPIC\0"
_LAYOUT = 1
_W_MAGIC, _W_LAYOUT, _W_SIZE, _W_SLOTS, _W_STRIDE, _W_RING, _W_SCHEMA, _W_EPOCH, _W_FIRST, _W_ORIGIN = range(10)
HEAD = 16  # alone in its cache line; its low half is the futex word
_SCHEMA_AT = 256
_PAYLOAD_AT = 64  # in a slot: seq has the first cache line, so that the record is aligned for memcpy
_LINE = 64
_PAGE = 4096


class TopicError(UnderstudyError, OSError):
    """A topic's file that cannot be created, or is not what it should be: the message names the file and the remedy."""


class Ring:
    """One mapped topic file, from either side: header words, slots, and the arithmetic between them.

    Record n lives in slot n % slots. `words` is the whole file as 64-bit words: a memoryview item is read and written
    by one machine instruction (struct's ">Q" is not: it goes byte by byte, and tears).
    """

    def __init__(self, path: Path, fd: int, prot: int) -> None:
        """Maps `fd`, whose header is complete. Raises TopicError if it is no topic, or not a whole one."""
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)  # the inode is not reused while we map it
        _check_header(path, os.pread(fd, _SCHEMA_AT, 0), status.st_size)
        self._map = mmap.mmap(fd, status.st_size, mmap.MAP_SHARED | mmap.MAP_POPULATE, prot)
        self.words = memoryview(self._map).cast("Q")
        self.slots = self.words[_W_SLOTS]
        self.stride = self.words[_W_STRIDE]
        self.epoch = self.words[_W_EPOCH]  # CLOCK_MONOTONIC ns at which the writer made the file
        self.first = self.words[_W_FIRST]  # the last number before this file: its records are first+1, first+2, ...
        self.origin = self.words[_W_ORIGIN]  # the last number before the unbroken line of files that this one ends
        schema = self._map[_SCHEMA_AT : _SCHEMA_AT + self.words[_W_SCHEMA]].decode()
        self.dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(ast.literal_eval(schema))
        self._ring_at = self.words[_W_RING]
        payload_at = self._ring_at + _PAYLOAD_AT
        self.records: Record = np.ndarray((self.slots,), self.dtype, self._map, payload_at, (self.stride,))
        # The same memory as bytes: numpy copies a structured record field by field, and bytes by one memcpy.
        shape = (self.slots, self.dtype.itemsize)
        self.bytes: npt.NDArray[np.uint8] = np.ndarray(shape, np.uint8, self._map, payload_at, (self.stride, 1))
        self.head_address = int(np.frombuffer(self._map, np.uint8).ctypes.data) + 8 * HEAD

    def seq_word(self, n: int) -> int:
        """Index in `words` of the sequence of record n's slot."""
        return (self._ring_at + (n % self.slots) * self.stride) // 8

    def whole(self, n: int) -> bool:
        """Whether record n, published before, is still in its slot untouched."""
        return self.words[self.seq_word(n)] == 2 * n

    def oldest(self, head: int) -> int:
        """The oldest record that may be whole while `head` is the newest; head + 1 if there is none."""
        return max(head - self.slots, self.first) + 1

    def replaced(self, path: str) -> bool:
        """Whether the file of that name is another one by now, or gone."""
        try:
            status = os.stat(path)  # noqa: PTH116 - Path.stat takes twice as long, and readers ask often
        except FileNotFoundError:
            return True
        return (status.st_dev, status.st_ino) != self.identity

    def close(self) -> None:
        self.words.release()
        del self.records, self.bytes
        with contextlib.suppress(BufferError):  # a view that a caller still holds keeps the mapping until it goes
            self._map.close()


def _check_header(path: Path, header: bytes, size: int) -> None:
    if header[: len(_MAGIC)] != _MAGIC:
        raise TopicError(f"{path} is not a topic (it does not begin with USTOPIC); remove it, or correct the path")
    words = np.frombuffer(header.ljust(_SCHEMA_AT, b"\0"), "<u8").tolist()
    if words[_W_LAYOUT] not in (0, _LAYOUT):
        raise TopicError(
            f"{path} has topic layout {words[_W_LAYOUT]}, this software knows layout {_LAYOUT}; "
            "run all roles of the cell from one version"
        )
    if len(header) < _SCHEMA_AT or size != words[_W_SIZE]:
        raise TopicError(
            f"{path} is truncated: it has {size} bytes, its header says {words[_W_SIZE]}; remove it and restart the "
            "role that writes it"
        )


def create(path: Path, dtype: np.dtype[Any], slots: int) -> tuple[int, Ring]:
    """Builds the topic's file and renames it into place; returns its descriptor, locked, and its mapping.

    The lock is on the file itself and goes with it through the rename, so that there is no lock file to leave behind:
    whoever holds the temporary name's lock is the only one who starts, whoever holds the topic's is its writer.
    Raises TopicError if another writer lives, if there is no room, or if `path` is something else than a topic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.new")
    fd = _locked(building, os.O_RDWR | os.O_CREAT, path)
    try:
        try:
            previous = _locked(path, os.O_RDWR, path)
        except FileNotFoundError:
            ring = _build(path, fd, dtype, slots, None)
            building.rename(path)
            return fd, ring
        try:
            predecessor = _predecessor(path, previous)
            ring = _build(path, fd, dtype, slots, predecessor)
            building.rename(path)
            if predecessor is not None:
                futex_waker(predecessor.head_address)()  # its waiting readers look for the new file
                predecessor.close()
            return fd, ring
        finally:
            os.close(previous)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            building.unlink()
        os.close(fd)
        raise


def _locked(file: Path, flags: int, path: Path) -> int:
    """Opens `file` and locks it. Raises TopicError if a live writer of the topic `path` has it."""
    while True:
        fd = os.open(file, flags | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(file.stat(), os.fstat(fd)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise TopicError(
                f"{path} has a writer already, and a topic has one only; stop the other process (fuser {path} names it)"
            ) from None
        except FileNotFoundError:
            pass
        os.close(fd)  # renamed or removed between open and lock: look again


def _predecessor(path: Path, fd: int) -> Ring | None:
    """The dead writer's file, to go on from its number; None if it is of another layout or damaged."""
    if os.pread(fd, len(_MAGIC), 0) != _MAGIC:
        raise TopicError(f"{path} exists and is not a topic; remove it, or correct the path")
    try:
        return Ring(path, fd, mmap.PROT_READ)
    except TopicError:
        return None


def _build(path: Path, fd: int, dtype: np.dtype[Any], slots: int, predecessor: Ring | None) -> Ring:
    schema = repr(np.lib.format.dtype_to_descr(dtype)).encode()
    ring_at = _ceil(_SCHEMA_AT + len(schema), _PAGE)
    stride = _ceil(_PAYLOAD_AT + dtype.itemsize, _LINE)
    size = ring_at + slots * stride
    _allocate(path, fd, size)
    epoch = time.monotonic_ns()
    # Without a predecessor's number, a number that none can have reached: nobody publishes once a microsecond.
    first = epoch // 1000 if predecessor is None else predecessor.words[HEAD]
    origin = first if predecessor is None else predecessor.origin
    words = np.zeros(_SCHEMA_AT // 8, "<u8")
    magic = int.from_bytes(_MAGIC, "little")
    words[: _W_ORIGIN + 1] = (magic, _LAYOUT, size, slots, stride, ring_at, len(schema), epoch, first, origin)
    words[HEAD] = first
    os.pwrite(fd, words.tobytes() + schema, 0)
    return Ring(path, fd, mmap.PROT_READ | mmap.PROT_WRITE)


def _allocate(path: Path, fd: int, size: int) -> None:
    """Takes all of the file's room now: on a tmpfs that fills up later, the first touch of a page would be SIGBUS."""
    try:
        os.ftruncate(fd, 0)  # a writer killed while it built may have left something
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        room = os.statvfs(path.parent)
        raise TopicError(
            f"{path} needs {size} bytes and cannot have them ({error.strerror}; {room.f_bavail * room.f_frsize} bytes "
            f"are free in {path.parent}); make room there, raise the limit, or give the topic fewer slots"
        ) from error


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit
