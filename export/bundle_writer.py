"""Puts a bundle on disk, all of it or nothing.

Everything is written and synced in a folder beside the final place, where engines can already run it; the manifest with
every file's hash comes last, and the folder is renamed when it is whole: a directory that is called as asked is a
bundle, also after a power cut.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg

from device.arrays import Array, dump_arrays
from device.bundle import GOLDEN, MANIFEST, Manifest, file_sha256
from device.durable import rename_durably, sync_directory, write_durably
from export.errors import ExportError

JPEG_QUALITY = 92


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise ExportError where `out` holds something that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"{out} exists already; give another --out, or remove it first")
    if out.is_symlink():
        raise ExportError(f"{out} is a link, which is not overwritten; give what it points to")
    if not (out / MANIFEST).is_file():
        raise ExportError(f"{out} is no bundle, so it is not overwritten; give another --out")


class PartialBundle:
    """A bundle that is being written, in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, files: Mapping[str, bytes]) -> None:
        """Add or replace files."""
        for name, content in files.items():
            write_durably(self.path / name, content)

    def write_golden(self, arrays: Mapping[str, Array]) -> None:
        """Inputs by the robot's names, noise, and the reference's `action`."""
        write_durably(self.path / GOLDEN, dump_arrays(arrays))

    def write_pictures(self, pictures: Mapping[str, Array]) -> None:
        """Camera -> uint8 [H, W, 3] RGB, what it saw in training."""
        if pictures:
            (self.path / "reference").mkdir()
            sync_directory(self.path)
        for camera, frame in pictures.items():
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=JPEG_QUALITY, colorspace="RGB")
            write_durably(self.path / "reference" / f"{camera}.jpg", jpeg)

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, with the hash of every file that is there."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        listed = {path.relative_to(self.path).as_posix(): file_sha256(path) for path in files}
        write_durably(self.path / MANIFEST, manifest.model_copy(update={"files": listed}).to_json())


@contextmanager
def partial_bundle(out: Path, overwrite: bool = False) -> Iterator[PartialBundle]:
    """A folder to write a bundle in, which is put at `out` when the block ends, and removed when it raises.

    Raises ExportError where it cannot be written; `out` is then as it was.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    try:
        partial.chmod(0o755)
        yield PartialBundle(partial)
        _put(partial, out, overwrite)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename `partial` to `out`. What is replaced steps aside first, and comes back where that fails."""
    if not (overwrite and out.exists()):
        rename_durably(partial, out)
        return
    aside = partial.with_name(f"{partial.name}.replaced")
    out.rename(aside)
    try:
        rename_durably(partial, out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)
