"""`make bench`: every benchmark's table, then each budget of budgets.toml beside what was measured.

`python -m tests.bench [NAME ...]` runs some of them; `--json FILE` also writes their figures there. Exit code 0
whatever the figures are: on a shared machine they are the machine's too. `--strict` makes it 1 when a budget is
exceeded.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BENCHES = ("topic", "bus", "ensemble", "execute", "act", "diffusion")


def look_up(figures: Any, path: list[str]) -> float | None:
    for key in path:
        if not isinstance(figures, dict) or key not in figures:
            return None
        figures = figures[key]
    return float(figures)


def judge(budget: dict[str, Any], figures: dict[str, Any]) -> tuple[str, bool]:
    """A line for a budget, and whether it is kept; a figure that could not be measured here is no failure."""
    value = look_up(figures[budget["bench"]], budget["value"])
    if value is not None and "over" in budget:
        divisor = look_up(figures[budget["bench"]], budget["over"])
        value = None if divisor is None else value / divisor
    bound = f"at most {budget['at_most']}" if "at_most" in budget else f"at least {budget['at_least']}"
    if value is None:
        return f"{budget['what']:<62}{'not measured':>14}  {bound}", True
    kept = value <= budget["at_most"] if "at_most" in budget else value >= budget["at_least"]
    return f"{budget['what']:<62}{value:>14.2f}  {bound}{'' if kept else '   EXCEEDED'}", kept


def main() -> int:
    arguments = argparse.ArgumentParser(description="Run benchmarks and hold them against their budgets.")
    arguments.add_argument("names", nargs="*", metavar="NAME", default=BENCHES, help=", ".join(BENCHES))
    arguments.add_argument("--json", type=Path, help="write the figures here")
    arguments.add_argument("--strict", action="store_true", help="exit code 1 where a budget is exceeded")
    chosen = arguments.parse_args()
    figures = {}
    for name in chosen.names:
        print(f"\n=== {name} (load average {os.getloadavg()[0]:.1f})", flush=True)
        module = importlib.import_module(f"tests.bench.bench_{name}")
        figures[name] = module.run()
        module.show(figures[name])
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n=== budgets")
    budgets = tomllib.loads(Path(__file__).with_name("budgets.toml").read_text())["budget"]
    judged = [judge(budget, figures) for budget in budgets if budget["bench"] in figures]
    for line, _ in judged:
        print(line)
    return int(chosen.strict and not all(kept for _, kept in judged))


if __name__ == "__main__":
    sys.exit(main())
