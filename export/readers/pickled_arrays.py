"""numpy's arrays out of pickles, without numpy's own unpickling.

`export.readers.pickle_machine` and `safe_pickle` call these in the place of the functions that numpy's pickles name.
Only plain numbers are made (bool, integer, floating point), never objects or structures, and never more of them than
the bytes in the file. Where a file says otherwise, a ValueError or TypeError says what; the machine names the file.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_PLAIN = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")


class PickledType:
    """A numpy.dtype on its way: its state, which says the byte order, comes after it is made."""

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise ValueError(f"an array of {code!r}, not of numbers")
        self.type = np.dtype(code)

    def take(self, state: Any) -> None:
        """(version, byte order, subtype, names, fields, item size, alignment, flags)"""
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("an array of structures, not of numbers")
        if order in "<>":
            self.type = self.type.newbyteorder(order)


def reconstruct(kind: object, shape: Any, code: object) -> Array:
    """numpy.core.multiarray._reconstruct: an empty array, which `fill` fills."""
    return np.empty(0, dtype=np.int8)


def fill(array: Array, state: Any) -> int:
    """Give an array of `reconstruct` its numbers; returns how many bytes they are."""
    _, shape, kind, fortran, data = state
    if not isinstance(kind, PickledType) or not isinstance(data, bytes | bytearray):
        raise TypeError("an array that holds no numbers")
    _check_size(shape, kind.type, data)
    set_state: Any = array.__setstate__  # numpy's types ask for numpy's own bool
    set_state((1, shape, kind.type, bool(fortran), bytes(data)))
    return len(data)


def from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> Array:
    """numpy.core.numeric._frombuffer, as protocol 5 has it."""
    if not isinstance(kind, PickledType) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise TypeError("an array that holds no numbers")
    _check_size(shape, kind.type, data)
    array: Array = np.frombuffer(data, dtype=kind.type).reshape(shape, order=order)
    return array


def scalar(kind: Any, data: Any) -> Any:
    """numpy.core.multiarray.scalar"""
    if not isinstance(kind, PickledType) or not isinstance(data, bytes):
        raise TypeError("a scalar that is no number")
    _check_size((), kind.type, data)
    return np.frombuffer(data, dtype=kind.type)[0]


def encode(text: Any, encoding: Any = None) -> bytes:
    """_codecs.encode, which pickles before protocol 3 write bytes with."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _check_size(shape: Any, kind: np.dtype[Any], data: bytes | bytearray) -> None:
    if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape!r}")
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of shape {list(shape)} in {len(data)} bytes")


# What stands in for the globals of numpy's pickles, of both its module layouts.
TABLE = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): PickledType,
    ("_codecs", "encode"): encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in ("core", "_core")},
}
