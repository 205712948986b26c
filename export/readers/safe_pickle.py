"""Loads what PyTorch and pickle saved, without running any code that a file may hold.

Readers of checkpoints that are pickles call `load_torch` (zip archives of torch.save) and `load_plain` (a bare pickle,
such as dataset_stats.pkl). Both go through `export.readers.pickle_machine`, which knows a list of names and refuses
every other; foreign classes that a reader has to look into are named by it in `extra`, and stay inert. torch.load is
not used, not with weights_only either: in the versions before 2.6 that flag could be walked around (CVE-2025-32434).
What a file claims is checked against what it holds before memory is taken for it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.readers import pickled_arrays
from export.readers.pickle_machine import FAULTS, Global, Inert, Table, plain_key, run_pickle
from export.readers.torch_archive import STORAGES, open_archive, parameter, tensor

__all__ = ["Global", "Inert", "load_plain", "load_torch"]

LARGEST_PICKLE = 256 << 20  # bytes of structure and statistics; tensors stand beside it
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before 1.6: a protocol, then a number, then pickles


def load_torch(path: Path, extra: Table | None = None) -> Any:
    """The object that torch.save wrote to `path`, tensors on the CPU as views of the file.

    `extra`: (module, name) of a global -> what is called in its place (`Inert` keeps what it gets), or None where it
    may stand as a name only; names arrive as `Global`. Numbers, containers, tensors and numpy arrays need no mention.
    Raises ExportError, also for files from before PyTorch 1.6, which are no archives.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        _refuse_other_formats(path, start)
        with open_archive(path, LARGEST_PICKLE) as archive:
            return run_pickle(archive.pickle, {**_TORCH, **(extra or {})}, path, archive.storage)
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except zipfile.BadZipFile as error:
        raise ExportError(f"{path} is cut off or damaged: {_ascii(error)}") from None
    except FAULTS as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} cannot be read: {_ascii(error)}") from None


def load_plain(path: Path, extra: Table | None = None) -> Any:
    """The object that pickle.dump wrote to `path`: plain values and numpy arrays. `extra` as for `load_torch`.
    Raises ExportError."""
    try:
        if path.stat().st_size > LARGEST_PICKLE:
            raise ExportError(f"{path} has {path.stat().st_size} bytes, too many for a pickle of statistics")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    return run_pickle(data, {**_PLAIN, **(extra or {})}, path)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if start.startswith(b"PK\x03\x04"):
        return
    if start[2:].startswith(_LEGACY):
        raise ExportError(
            f"{path} was saved in the format from before PyTorch 1.6; load it and torch.save it again with a newer one"
        )
    if start.startswith(b"version https://"):
        raise ExportError(f"{path} is a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    raise ExportError(f"{path} is no file of torch.save: it begins with {start!r}")


def _ascii(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()[:160]


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    return {plain_key(key): value for key, value in items}


def _default_dict(_: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _ordered_dict(items)


def _set(values: Any = ()) -> set[Any]:
    return {plain_key(value) for value in values}


def _frozenset(values: Any = ()) -> frozenset[Any]:
    return frozenset(_set(values))


def _no_bytes() -> bytes:
    """How protocols before 3 write b""."""
    return b""


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(sizes)


_BUILTINS: Mapping[str, Any] = {
    **dict.fromkeys(("dict", "list", "tuple", "int", "float", "bool", "str")),
    "bytes": _no_bytes,
    "set": _set,
    "frozenset": _frozenset,
}
_PLAIN: Mapping[tuple[str, str], Any] = {
    **pickled_arrays.TABLE,
    **{(module, name): made for module in ("builtins", "__builtin__") for name, made in _BUILTINS.items()},
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
}
_TORCH: Mapping[tuple[str, str], Any] = {
    **_PLAIN,
    **{("torch", name): None for name in STORAGES},
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
}
