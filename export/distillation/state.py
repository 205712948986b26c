"""What a distillation keeps so that it can be stopped at any moment and go on: one file, whole or not there.

`training` saves every few minutes and when it is told to stop. The file holds tensors and plain values, and is loaded
without unpickling anything else. It names what it belongs to, teacher, episodes and the options that change what is
learnt, and is refused for any other.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from device.durable import replace_durably
from export.errors import ExportError

STATE = "training_state.pt"
# What torch.load raises for a file that is cut off, of other bytes, or not made of tensors.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


def save_state(folder: Path, belongs_to: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Replace the state in `folder`. Raises ExportError where it cannot be written; the old one is then untouched."""
    path = folder / STATE
    try:
        with replace_durably(path) as file:
            torch.save({"belongs_to": dict(belongs_to), **state}, file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        raise ExportError(f"{path} cannot be written: {error}; the state before it is still there") from error


def load_state(folder: Path, belongs_to: Mapping[str, str]) -> dict[str, Any] | None:
    """The state in `folder`, None where there is none. Raises ExportError for a damaged or a foreign one."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        found = dict(state["belongs_to"])
    except DAMAGE as error:
        problem = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
        raise ExportError(f"{path} is damaged ({problem}); remove it to begin this distillation again") from error
    for name, expected in belongs_to.items():
        if found.get(name) != expected:
            raise ExportError(
                f"{path} belongs to a distillation with another {name} (expected {expected}, found {found.get(name)}); "
                "give another --out, or remove it to begin again"
            )
    return state
