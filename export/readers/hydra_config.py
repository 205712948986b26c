"""A hydra configuration out of a pickle: omegaconf's objects as plain values, their interpolations resolved.

Readers of checkpoints that carry one (`export.readers.diffusion_policy`) load the pickle with `OMEGACONF`, whose
stand-ins do nothing, and call `resolve`. Interpolations arrive as the text that was written, as ${task.shape_meta};
those that name a key are followed. Diffusion Policy's own `eval` resolver is Python's, and none of that is run here:
sums, differences, products and whole quotients of integers are computed, anything else stays an `Unresolved`, which is
refused where its value is needed. Families ask for values through a `Section`, so that messages name the key.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint import LARGEST
from export.errors import ExportError
from export.readers.safe_pickle import Inert

DEEPEST = 40  # levels of a configuration, and of interpolations that lead to interpolations
MOST = 1 << 17  # values and characters: parts that are shared, or follow each other, unfold without end
LONGEST_SUM = 200  # characters
_MISSING = object()
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


class Container(Inert):
    """DictConfig or ListConfig: `_content` holds nodes, or text where the whole is an interpolation."""


class Node(Inert):
    """A value: `_val`."""


OMEGACONF = {
    ("omegaconf.dictconfig", "DictConfig"): Container,
    ("omegaconf.listconfig", "ListConfig"): Container,
    **{("omegaconf.nodes", f"{kind}Node"): Node for kind in ("Any", "String", "Integer", "Float", "Boolean")},
    ("omegaconf.base", "ContainerMetadata"): Inert,
    ("omegaconf.base", "Metadata"): Inert,
    ("typing", "Any"): None,
    ("dill._dill", "_load_type"): Inert,  # a builtin type by its name, in the metadata
}


@dataclass(frozen=True)
class Unresolved:
    """A value that is not known, with the reason as a sentence's end."""

    text: str
    why: str


def plain(found: Any, where: Path) -> Any:
    """omegaconf's containers and nodes as dict, list and values; interpolations stay text. Raises ExportError."""
    return _plain(found, where, _Allowance(), 0)


def resolve(tree: Mapping[str, Any], key: str) -> Any:
    """What a configuration holds at the dotted `key`, None where it holds nothing, interpolations followed everywhere
    below it. What cannot be known is `Unresolved`."""
    found = _find(tree, key)
    return None if found is _MISSING else _Resolver(tree, _Allowance()).value(found, 0)


@dataclass(frozen=True)
class Section:
    """A part of a configuration, asked for its values. `where` names file and part for the messages."""

    values: Mapping[str, Any]
    where: str

    def given(self, key: str, default: Any = None) -> Any:
        """The value at `key`, `default` where it is missing. Raises ExportError for one that could not be resolved."""
        value = self.values.get(key, default)
        if isinstance(value, Unresolved):
            raise ExportError(f"{self.where}.{key} is {value.text[:120]!r}, which {value.why}")
        return value

    def section(self, key: str) -> Section:
        value = self.given(key)
        if not isinstance(value, dict):
            raise ExportError(f"{self.where}.{key} should be a group of values, found {value!r}")
        return Section(value, f"{self.where}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive one."""
        value = self.given(key, default)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ExportError(f"{self.where}.{key} should be a positive integer, at most {LARGEST}, found {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.given(key, default)
        if type(value) not in (int, float):
            raise ExportError(f"{self.where}.{key} should be a number, found {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.given(key, default)
        if type(value) is not bool:
            raise ExportError(f"{self.where}.{key} should be true or false, found {value!r}")
        return value

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Positive ones."""
        value = self.given(key, default)
        if not isinstance(value, list | tuple) or not value or any(type(part) is not int or part < 1 for part in value):
            raise ExportError(f"{self.where}.{key} should be a list of positive integers, found {value!r}")
        return tuple(value)

    def size(self, key: str, default: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Height and width, px, or None for null."""
        if self.given(key, default) is None:
            return None
        found = self.integers(key, default)
        if len(found) != 2:
            raise ExportError(f"{self.where}.{key} should be height and width, found {list(found)}")
        return found[0], found[1]

    def target(self) -> str:
        """The class that the section is of: the last part of _target_."""
        value = self.given("_target_")
        if not isinstance(value, str):
            raise ExportError(f"{self.where}._target_ should name a class, found {value!r}")
        return value.rpartition(".")[2]

    def refuse_others(self, known: Iterable[str]) -> None:
        """Raise ExportError for a key that is not among `known`; hydra's own begin with an underscore."""
        listed = sorted(known)
        for key in self.values:
            if key not in listed and not str(key).startswith("_"):
                raise ExportError(f"{self.where}.{key} is not supported; supported are {', '.join(listed)}")


class _Allowance:
    """How much a configuration may unfold to."""

    def __init__(self) -> None:
        self._left = MOST

    def spend(self, size: int) -> bool:
        """Whether that much is still allowed."""
        self._left -= size
        return self._left >= 0


def _plain(found: Any, where: Path, allowance: _Allowance, depth: int) -> Any:
    if depth > DEEPEST or not allowance.spend(1):
        raise ExportError(f"{where}: its configuration is nested more than {DEEPEST} levels deep, or unfolds endlessly")
    if isinstance(found, Inert):
        state = found.state if isinstance(found.state, dict) else {}
        key = {Container: "_content", Node: "_val"}.get(type(found))
        if key not in state:
            raise ExportError(f"{where}: its configuration holds something that is neither a container nor a value")
        return _plain(state[key], where, allowance, depth + 1)
    if isinstance(found, dict):
        return {str(key): _plain(value, where, allowance, depth + 1) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_plain(value, where, allowance, depth + 1) for value in found]
    return found


def _find(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict):
            tree = tree.get(part, _MISSING)
        else:
            return _MISSING
    return tree


class _Resolver:
    """Follows interpolations in the configuration `root`."""

    def __init__(self, root: Mapping[str, Any], allowance: _Allowance) -> None:
        self._root = root
        self._allowance = allowance

    def value(self, found: Any, depth: int) -> Any:
        if depth > DEEPEST or not self._allowance.spend(1 + (len(found) if isinstance(found, str) else 0)):
            return Unresolved(str(found)[:80], "leads back to itself, or on without end")
        if isinstance(found, dict):
            return {key: self.value(part, depth + 1) for key, part in found.items()}
        if isinstance(found, list):
            return [self.value(part, depth + 1) for part in found]
        return self._text(found, depth) if isinstance(found, str) and "${" in found else found

    def _text(self, text: str, depth: int) -> Any:
        """Text with interpolations: the value of one that is alone, else text with their values in it."""
        found, at = "", 0
        while (start := text.find("${", at)) >= 0:
            end = _end(text, start)
            if end < 0:
                return Unresolved(text, "has an interpolation that does not end")
            value = self._interpolation(text[start + 2 : end], depth + 1)
            if isinstance(value, Unresolved) or (start == 0 and end == len(text) - 1):
                return value
            if isinstance(value, dict | list):
                return Unresolved(text, "puts a group of values into a text")
            found, at = found + text[at:start] + str(value), end + 1
        return found + text[at:]

    def _interpolation(self, body: str, depth: int) -> Any:
        whole = f"${{{body}}}"
        name, colon, argument = body.partition(":")
        if colon and name.strip() == "eval":
            inner = self.value(argument.strip().strip("'\""), depth)
            if isinstance(inner, Unresolved):
                return inner
            value = arithmetic(str(inner))
            return Unresolved(whole, "is more than arithmetic of integers, and is not run") if value is None else value
        if colon:
            return Unresolved(whole, f"asks the resolver {name!r}, which a checkpoint does not hold")
        if body.startswith("."):
            return Unresolved(whole, "is relative, which is not supported")
        value = _find(self._root, body.strip())
        if value is _MISSING:
            return Unresolved(whole, "names nothing in the configuration")
        return self.value(value, depth)


def _end(text: str, start: int) -> int:
    """Where the brace that opens after `start` is closed; -1 where it is not."""
    depth = 0
    for at in range(start + 1, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
    return -1


def arithmetic(text: str) -> int | None:
    """The value of + - * // and brackets on integers; None for whatever else the text is."""
    if len(text) > LONGEST_SUM:
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        result: int = _ARITHMETIC[type(node.op)](_value(node.left), _value(node.right))
        return result
    raise ValueError(type(node).__name__)
