"""Puts a bundle on disk, all of it or nothing.

Everything is written and synced in a folder beside the final place, the manifest with every file's hash last, and the
folder is renamed when it is whole: a directory that is called as asked is a bundle, also after a power cut.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import simplejpeg

from device.arrays import Array, dump_arrays
from device.bundle import GOLDEN, MANIFEST, POLICY, Manifest, file_sha256
from device.durable import rename_durably, sync_directory, write_durably
from export.errors import ExportError

JPEG_QUALITY = 92


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise ExportError where `out` holds something that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"{out} exists already; give another --out, or remove it first")
    if not (out / MANIFEST).is_file():
        raise ExportError(f"{out} is no bundle, so it is not overwritten; give another --out")


def write_bundle(
    out: Path,
    manifest: Manifest,
    model: bytes,
    golden: Mapping[str, Array],
    pictures: Mapping[str, Array],
    overwrite: bool = False,
) -> None:
    """Write a bundle; `manifest.files` is filled in here. `golden`: inputs and `action`. `pictures`: camera -> uint8
    [H, W, 3] RGB, what it saw in training. Raises ExportError; `out` is then as it was."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    try:
        partial.chmod(0o755)
        _write_files(partial, model, golden, pictures)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listed = {path.relative_to(partial).as_posix(): file_sha256(path) for path in files}
        write_durably(partial / MANIFEST, manifest.model_copy(update={"files": listed}).to_json())
        if overwrite and out.exists():
            shutil.rmtree(out)
        rename_durably(partial, out)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(folder: Path, model: bytes, golden: Mapping[str, Array], pictures: Mapping[str, Array]) -> None:
    write_durably(folder / POLICY, model)
    write_durably(folder / GOLDEN, dump_arrays(golden))
    if pictures:
        (folder / "reference").mkdir()
        sync_directory(folder)
    for camera, frame in pictures.items():
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=JPEG_QUALITY, colorspace="RGB")
        write_durably(folder / "reference" / f"{camera}.jpg", jpeg)
