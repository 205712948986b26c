"""Arrays of an .npz file by the piece: pictures are read where they lie, and a file is never in memory whole.

`np.load` reads a member from beginning to end; one picture of an episode of 640x480 would cost the memory of all of
them. `open_npz` reads the headers only. A stored member (`np.savez`) is then read in place, a compressed one
(`np.savez_compressed`) is unpacked up to what is asked for. Python objects in a file are refused, not unpickled.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from export.errors import ExportError

DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error)
SKIP_BYTES = 1 << 18
LOCAL_HEADER = struct.Struct("<26xHH")  # APPNOTE.TXT 4.3.7: ends with the lengths of the name and of the extra field


@dataclass(frozen=True)
class NpzArray:
    """One array of a file, unread. `begin`: of its numbers, in the file if `stored`, else in the unpacked member."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: bool
    begin: int

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def load(self) -> NDArray[Any]:
        """All of it. Raises ExportError."""
        for whole in self.pieces([(0, self.shape[0])] if self.shape else [(0, 1)]):
            return whole
        raise AssertionError("one span gives one piece")

    def pieces(self, spans: Iterable[tuple[int, int]]) -> Iterator[NDArray[Any]]:
        """`array[a:b]` for each span (a, b) of the first axis; spans ascend. Raises ExportError for a damaged file."""
        inner = self.shape[1:]
        size = self.dtype.itemsize * int(np.prod(inner, dtype=np.int64))
        try:
            with self._open() as file:
                for a, b in spans:
                    self._go(file, self.begin + a * size)
                    content = file.read((b - a) * size)
                    if len(content) != (b - a) * size:
                        raise EOFError("it ends early")
                    yield np.frombuffer(content, self.dtype).reshape((b - a, *inner) if self.shape else ())
        except DAMAGE as error:
            raise ExportError(f"{self} cannot be read: {error}") from error

    def _go(self, file: IO[bytes], position: int) -> None:
        """Forward in what is compressed, a little at a time: zipfile's own seek unpacks 16 MB at once."""
        while not self.stored and position - file.tell() > SKIP_BYTES and file.read(SKIP_BYTES):
            pass
        file.seek(position)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self.stored:
            with self.path.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as member:
            yield member


def open_npz(path: Path) -> dict[str, NpzArray]:
    """The arrays of a file, by name. Raises ExportError where it is no .npz file of plain arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in members}
    except ExportError:
        raise
    except DAMAGE as error:
        raise ExportError(f"{path} is damaged or no .npz file: {error}") from error


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzArray:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as member:
        shape, fortran, dtype = _header(member)
        header = member.tell()
    if dtype.hasobject:
        raise ExportError(f"{path}: {name} holds Python objects, which are not read; save numbers")
    if fortran and len(shape) > 1:
        raise ExportError(f"{path}: {name} is stored by columns; save np.ascontiguousarray of it")
    stored = info.compress_type == zipfile.ZIP_STORED
    return NpzArray(path, name, shape, dtype, stored, header + (_data_offset(path, info) if stored else 0))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the .npy format is unknown")
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin in the file."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return int(info.header_offset + LOCAL_HEADER.size + name + extra)
