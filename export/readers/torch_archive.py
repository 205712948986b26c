"""The zip archives of torch.save: a pickle of the structure, and beside it a record for each storage.

`export.readers.safe_pickle` opens one here and resolves the pickle's tensors with it. All records are checked first:
uncompressed as torch writes them, no larger together than the file, whole by their CRC. Then the file is mapped into
memory instead of read, since a checkpoint with an optimizer has gigabytes that nobody looks at; tensors are views, and
pages are copied only where somebody writes. Format: torch/serialization.py and caffe2/serialize/inline_container.h.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.errors import ExportError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip record: the lengths of name and extra field, which the data follow
_CHUNK = 1 << 20


class TorchArchive:
    """One file of torch.save, checked and mapped. `pickle` is the structure."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, largest_pickle: int) -> None:
        self._path = path
        records = {record.filename: record for record in archive.infolist()}
        self._folder = self._find_folder(records)
        self._check(archive, path.stat().st_size)
        structure = records[f"{self._folder}/data.pkl"]
        if structure.file_size > largest_pickle:
            raise ExportError(f"{path}: its data.pkl has {structure.file_size} bytes, too many for a checkpoint")
        self.pickle = archive.read(structure)
        order = f"{self._folder}/byteorder"
        if order in records and archive.read(records[order]) != b"little":
            raise ExportError(f"{path} was saved on a big-endian machine, which is not supported")
        self._records = records
        self._bytes = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
        self._made: dict[str, torch.Tensor] = {}

    def storage(self, identity: Any) -> torch.Tensor:
        """A flat tensor for the persistent id ("storage", type, key, location, elements). Raises ValueError."""
        kind, saved, key, _, elements = identity
        dtype = STORAGES.get(getattr(saved, "name", ""))
        if kind != "storage" or dtype is None or not isinstance(key, str) or type(elements) is not int:
            raise ValueError(f"a storage that torch does not write: {identity!r}")
        record = self._records.get(f"{self._folder}/data/{key}")
        if record is None:
            raise ExportError(f"{self._path} is damaged, the storage {key[:40]!r} of a tensor is missing")
        if elements * dtype.itemsize != record.file_size:
            raise ExportError(
                f"{self._path} is damaged, storage {key} should hold {elements} elements of {dtype}, "
                f"found {record.file_size} bytes"
            )
        if key not in self._made:
            self._made[key] = self._map(record)
        return self._made[key].view(dtype)

    def _map(self, record: zipfile.ZipInfo) -> torch.Tensor:
        at = record.header_offset
        name, extra = _LOCAL_HEADER.unpack(self._bytes[at : at + _LOCAL_HEADER.size].numpy().tobytes())
        start = at + _LOCAL_HEADER.size + name + extra
        found = self._bytes[start : start + record.file_size]
        # Only an aligned part of the file can be seen as numbers of eight bytes; torch aligns to 64.
        return found if start % 8 == 0 else found.clone()

    def _find_folder(self, records: dict[str, zipfile.ZipInfo]) -> str:
        found = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ExportError(f"{self._path} is a zip archive, but not one of torch.save: it holds no single data.pkl")
        if f"{found[0]}/constants.pkl" in records:
            raise ExportError(f"{self._path} is a TorchScript program, not a checkpoint; give what torch.save wrote")
        return found[0]

    def _check(self, archive: zipfile.ZipFile, size: int) -> None:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise ExportError(f"{self._path} is damaged, it holds two records of one name")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ExportError(f"{self._path}: {record.filename[:80]!r} is compressed, which torch.save never does")
        if (claimed := sum(record.file_size for record in records)) > size:
            raise ExportError(f"{self._path} is damaged, it claims {claimed} bytes and has {size}")
        for record in records:
            with archive.open(record) as opened:
                while opened.read(_CHUNK):
                    pass  # zipfile checks the record's CRC when it reaches its end


@contextmanager
def open_archive(path: Path, largest_pickle: int) -> Iterator[TorchArchive]:
    """The archive at `path`. May raise, beside ExportError, any of the machine's FAULTS."""
    with zipfile.ZipFile(path) as archive:
        yield TorchArchive(path, archive, largest_pickle)


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """torch._utils._rebuild_tensor_v2: a view of a storage. Raises ValueError where it would leave it, or repeat it."""
    if not isinstance(storage, torch.Tensor) or len(size) != len(stride):
        raise TypeError("a tensor without storage, or of a shape that does not fit its strides")
    if not all(type(value) is int and value >= 0 for value in (offset, *size, *stride)):
        raise ValueError(f"a tensor of shape {size!r} with strides {stride!r}")
    elements = math.prod(size)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if elements else 0
    if elements > storage.numel() or last >= max(storage.numel(), 1):
        raise ValueError(f"a tensor of {elements} elements in a storage of {storage.numel()}")
    return storage.as_strided(size, stride, storage.storage_offset() + offset)


def parameter(data: Any, *_: Any) -> torch.Tensor:
    """torch._utils._rebuild_parameter: the tensor alone."""
    if not isinstance(data, torch.Tensor):
        raise TypeError("a parameter without a tensor")
    return data
