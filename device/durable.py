"""Files that are either wholly there or not there at all, also after a power cut.

Everything that the project writes and later trusts (bundle manifests, episode manifests, update state, calibration)
goes through here. The order is the one that POSIX asks for: write beside the target, fsync the file, rename over the
target, fsync the folder. A reader sees the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data`. Raises OSError; the old content is then untouched."""
    with replace_durably(path) as file:
        file.write(data)


@contextlib.contextmanager
def replace_durably(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the block ends; when it raises, the old content is untouched."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or a directory whose content is already on disk, so that the new name survives a power cut."""
    source.rename(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: a rename is only on disk once its folder is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
