"""Named arrays in .npz files (golden inputs, observations, action chunks), never unpickled and never pickled.

`np.load` would run code from a file if it were allowed to; what reaches a device over the air must not. Bundles, the
engine and the exporter read and write their arrays here.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from device.errors import BundleError

Array = np.ndarray[Any, np.dtype[Any]]


def load_arrays(path: Path) -> dict[str, Array]:
    """Every array of an .npz file, never unpickling. Raises BundleError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise BundleError(f"{path} is not an .npz file of named arrays")
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error


def dump_arrays(arrays: Mapping[str, Array]) -> bytes:
    """An .npz file's bytes (compressed, the same for the same arrays), without numpy's readiness to pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
