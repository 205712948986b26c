"""One thread a process; and the table of parity: how far exported policies are from the framework that they came from.

Tests that hold a bundle against a framework's own answers record what they found through the `parity` fixture. The
table is printed at the end of the run and written to `report/parity.md`, a row for each framework and kind of policy;
docs/policies.md shows the latest.
"""

from __future__ import annotations

import os

# Before torch is imported: two threads that wait for each other on a busy core take a hundred times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TABLE = Path(__file__).parent.parent / "report" / "parity.md"
HEADINGS = ("policy", "held against", "cases", "largest difference, joint units", "case of the largest")
ROWS = pytest.StashKey[dict[tuple[str, str], list[tuple[float, str]]]]()

Parity = Callable[[str, str, str, Any], float]


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """parity(policy, framework, case, difference): notes the largest of `difference` (a number or an array) and
    returns it."""
    rows = request.config.stash.setdefault(ROWS, {})

    def record(policy: str, framework: str, case: str, difference: Any) -> float:
        error = float(np.abs(difference).max())
        rows.setdefault((policy, framework), []).append((error, case))
        return error

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = list(_table(config.stash.get(ROWS, {})))
    if not lines:
        return
    terminalreporter.section("parity with the original frameworks")
    for line in lines:
        terminalreporter.write_line(line)
    try:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("\n".join(lines) + "\n")
    except OSError as error:
        terminalreporter.write_line(f"{TABLE} cannot be written: {error}")


def _table(rows: dict[tuple[str, str], list[tuple[float, str]]]) -> Iterator[str]:
    for index, ((policy, framework), found) in enumerate(sorted(rows.items())):
        if not index:
            yield f"| {' | '.join(HEADINGS)} |"
            yield "|" + "---|" * len(HEADINGS)
        error, case = max(found)
        yield f"| {policy} | {framework} | {len(found)} | {error:.1e} | {case} |"
