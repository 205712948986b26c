"""Parquet files of a LeRobotDataset: columns as arrays, and pictures that are stored in a column.

Both versions of the format keep their rows so. Only the columns that are asked for are read, and pictures row group by
row group, a few rows at a time. What is damaged or of another type is an ExportError with the file and the column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from export.episodes.episode import Vectors, vectors
from export.errors import ExportError

DAMAGE = (OSError, pa.ArrowException)
PICTURES_AT_ONCE = 16  # rows; a picture of 640x480 is some 300 KB as PNG


def read_columns(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Columns (pyarrow arrays) by name. Raises ExportError."""
    with _open(path) as file:
        _require(path, file, names)
        try:
            table = file.read(columns=list(names))
        except DAMAGE as error:
            raise _damaged(path, error) from error
    return {name: _one_array(table.column(name)) for name in names}


def column_names(path: Path) -> list[str]:
    """What a file's rows hold. Raises ExportError."""
    with _open(path) as file:
        return list(file.schema_arrow.names)


def as_vectors(where: str, column: Any, width: int) -> Vectors:
    """A column of lists of `width` numbers, or of plain numbers where `width` is 1, as float32 [rows, width]."""
    values = column
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if lengths != [width]:
            raise ExportError(f"{where} should hold {width} values in every row, found {_listed(lengths)}")
        values = column.flatten()
    elif width != 1:
        raise ExportError(f"{where} should be lists of {width} numbers, found {column.type}")
    return vectors(where, as_numbers(where, values).reshape(-1, width))


def as_numbers(where: str, column: Any) -> NDArray[Any]:
    """A column of plain numbers. Raises ExportError for gaps and for what is no number."""
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not any(kind(column.type) for kind in kinds):
        raise ExportError(f"{where} should be numbers, found {column.type}")
    if column.null_count:
        raise ExportError(f"{where} has no value in {column.null_count} places")
    numbers: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return numbers


def read_pictures(path: Path, name: str, rows: Sequence[int], root: Path) -> Iterator[bytes]:
    """The PNG or JPEG files in column `name` at `rows` of the file, ascending. `root`: of paths in their stead."""
    wanted = iter(rows)
    row = next(wanted, None)
    with _open(path) as file:
        _require(path, file, [name])
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if row is not None and row < end:
                for batch in _batches(path, file, group, name):
                    while row is not None and row < begin + batch.num_rows:
                        yield _picture(path, name, batch.column(name), row - begin, root)
                        row = next(wanted, None)
                    begin += batch.num_rows
                    if row is None:
                        return
            begin = end


def _batches(path: Path, file: Any, group: int, name: str) -> Iterator[Any]:
    try:
        yield from file.iter_batches(PICTURES_AT_ONCE, row_groups=[group], columns=[name])
    except DAMAGE as error:
        raise _damaged(path, error) from error


def _picture(path: Path, name: str, column: Any, i: int, root: Path) -> bytes:
    """Hugging Face's image type: a struct of the file's bytes, or else its path."""
    value = column[i].as_py() if pa.types.is_struct(column.type) else None
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ExportError(f"{path}: {name} should hold pictures (bytes or path), found {column.type}")
    content: bytes | None = value.get("bytes")
    if content is not None:
        return content
    file = root / inside(str(value["path"]), f"{path}: {name}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: {name} points to {file}, which cannot be read: {error}") from error


def inside(text: str, where: str) -> Path:
    """A relative path that stays below its folder. Raises ExportError for any other."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts:
        raise ExportError(f"{where} points to {text}, outside of the recording")
    return path


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ExportError(f"{path} is missing")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ExportError:
    reason = str(error).partition("\n")[0]
    return ExportError(f"{path} is damaged, as after a recording that was cut off: {reason}")


def _require(path: Path, file: Any, names: Sequence[str]) -> None:
    held = file.schema_arrow.names
    if absent := [name for name in names if name not in held]:
        raise ExportError(f"{path} should hold {', '.join(absent)}; it holds {', '.join(held)}")


def _one_array(column: Any) -> Any:
    """A table's column, in chunks as it was read, as one array of its storage type."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return array.storage if isinstance(array.type, pa.ExtensionType) else array


def _listed(lengths: Sequence[int | None]) -> str:
    return ", ".join("none" if length is None else str(length) for length in lengths) or "no row"
