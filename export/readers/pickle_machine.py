"""Executes pickles that may be hostile: the opcodes are interpreted here, and nothing is imported or called by name.

`export.readers.safe_pickle` calls `run_pickle` with a table of the globals that a file may name and of what stands in
for each. Python's own unpickler with a guarded `find_class` would still call `__setstate__`, constructors and whatever
else the objects on its stack offer, and five bytes make its memo fill the memory; so this is an interpreter of its own
over the standard library's decoder of opcodes. A global is only ever a `Global`, a name; calling it looks its
replacement up in the table. Whatever goes wrong is an ExportError that names the file.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from export.readers import pickled_arrays

# (module, name) -> what is called in its place; None where it may be named, but not called.
Table = Mapping[tuple[str, str], Callable[..., Any] | None]
# What damaged or hostile bytes make the decoder, the replacements, numpy and torch raise.
FAULTS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, MemoryError,
    EOFError, OSError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_KEYS = (str, int, float, bytes, type(None))  # hashing deep tuples would overflow the stack
_NEWEST_PROTOCOL = 5


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".encode("ascii", "backslashreplace").decode()[:120]


class Inert:
    """Stands in for an instance of a foreign class: keeps what it was made of, and does nothing.

    A replacement as it is or as a base class; what it holds is read afterwards.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None


def run_pickle(data: bytes, table: Table, where: Path, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What the pickle `data` describes, of plain Python values, numpy arrays and what `table` makes.

    `persistent` resolves persistent ids. Dictionaries and OrderedDicts are dict. `where` is for the messages. Values
    may share parts and contain themselves. Raises ExportError.
    """
    machine = _Machine(table, persistent, where, budget=2 * len(data))
    try:
        return machine.run(data)
    except FAULTS as error:
        if isinstance(error, ExportError):
            raise
        problem = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()[:120]
        raise ExportError(f"{where} is damaged, its pickle cannot be followed ({problem})") from None


_MARK = object()


class _Machine:
    def __init__(self, table: Table, persistent: Callable[[Any], Any] | None, where: Path, budget: int) -> None:
        self._table = table
        self._persistent = persistent
        self._where = where
        self._budget = budget  # bytes: memoised ones, repeated, would otherwise grow without end
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                break
            if name in _PUSHES:
                self._stack.append(argument)
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                raise ValueError(f"opcode {name}")
        result = self._pop()
        if self._stack:
            raise ValueError("values are left over")
        return result

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def _pop_to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:  # an IndexError where there is none
            at -= 1
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def spend(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise ValueError("it unfolds into more bytes than it holds")

    def protocol(self, version: int) -> None:
        if version > _NEWEST_PROTOCOL:
            raise ValueError(f"protocol {version}")

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def duplicate(self, _: Any) -> None:
        value = self._pop()
        self._stack += [value, value]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def put(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self._stack.append(value)

    def memoize(self, _: Any) -> None:
        self.put(len(self._memo))

    def append(self, _: Any) -> None:
        value = self._pop()
        self._extend([value])

    def appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("items are added to what is no list")
        self._stack[-1].extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, pairs: list[Any]) -> None:
        if type(self._stack[-1]) is not dict or len(pairs) % 2:
            raise ValueError("items are set in what is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self._stack[-1][plain_key(key)] = value

    def add_items(self, _: Any) -> None:
        values = self._pop_to_mark()
        if type(self._stack[-1]) is not set:
            raise ValueError("items are added to what is no set")
        self._stack[-1].update(plain_key(value) for value in values)

    def dictionary(self, _: Any) -> None:
        pairs = self._pop_to_mark()
        self._stack.append({})
        self._update(pairs)

    def global_by_line(self, line: str) -> None:
        module, _, name = line.partition(" ")
        self._stack.append(self._named(module, name))

    def global_by_stack(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self._named(module, name))

    def _named(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global without a name")
        found = Global(module, name)
        if (module, name) not in self._table:
            raise ExportError(f"{self._where} contains code ({found}), which is not run")
        return found

    def reduce(self, _: Any) -> None:
        arguments, called = self._pop(), self._pop()
        self._stack.append(self._call(called, arguments))

    def reduce_by_name(self, _: Any) -> None:
        options, arguments, called = self._pop(), self._pop(), self._pop()
        if options != {}:
            raise ValueError("a constructor is called with options")
        self._stack.append(self._call(called, arguments))

    def instance(self, line: str) -> None:
        arguments = tuple(self._pop_to_mark())
        self.global_by_line(line)
        self._stack.append(self._call(self._pop(), arguments))

    def instance_of_stack(self, _: Any) -> None:
        called, *arguments = self._pop_to_mark()
        self._stack.append(self._call(called, tuple(arguments)))

    def _call(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Global) or type(arguments) is not tuple:
            raise ValueError("something is called that is no function")
        replacement = self._table.get((called.module, called.name))
        if replacement is None:
            raise ExportError(f"{self._where} calls {called}, which is not run")
        made = replacement(*arguments)
        if isinstance(made, bytes):
            self.spend(len(made))
        return made

    def build(self, _: Any) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, pickled_arrays.PickledType):
            target.take(state)
        elif isinstance(target, np.ndarray):
            self.spend(pickled_arrays.fill(target, state))
        elif type(target) is not dict:  # a dict was an OrderedDict, whose attributes (_metadata) nobody needs
            raise ValueError(f"a state for a {type(target).__name__}")

    def persistent(self, identity: Any) -> None:
        if self._persistent is None:
            raise ValueError("it refers to parts that are not in it")
        self._stack.append(self._persistent(identity))


def plain_key(value: Any) -> Any:
    """The value, if it may be a key or a member of a set. Raises TypeError."""
    if not isinstance(value, _KEYS):
        raise TypeError(f"a {type(value).__name__} as a key")
    return value


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _: Any) -> None:
        values = [machine._pop() for _ in range(count)]
        machine._stack.append(tuple(reversed(values)))

    return make


def _collect(kind: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine._stack.append(kind(machine._pop_to_mark()))


def _push(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine._stack.append(make())


# Opcodes whose decoded argument is the value.
# fmt: off
_PUSHES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol, "FRAME": lambda machine, _: None, "MARK": _Machine.mark, "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark, "DUP": _Machine.duplicate,
    "NONE": _push(lambda: None), "NEWTRUE": _push(lambda: True), "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list), "EMPTY_DICT": _push(dict), "EMPTY_TUPLE": _push(tuple), "EMPTY_SET": _push(set),
    "TUPLE": _collect(tuple), "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3),
    "LIST": _collect(list), "DICT": _Machine.dictionary,
    "FROZENSET": _collect(lambda values: frozenset(plain_key(value) for value in values)),
    "APPEND": _Machine.append, "APPENDS": _Machine.appends, "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items, "ADDITEMS": _Machine.add_items,
    "GET": _Machine.get, "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.global_by_line, "STACK_GLOBAL": _Machine.global_by_stack,
    "REDUCE": _Machine.reduce, "NEWOBJ": _Machine.reduce, "NEWOBJ_EX": _Machine.reduce_by_name,
    "INST": _Machine.instance, "OBJ": _Machine.instance_of_stack, "BUILD": _Machine.build,
    "PERSID": _Machine.persistent, "BINPERSID": lambda machine, _: machine.persistent(machine._pop()),
}
# fmt: on
