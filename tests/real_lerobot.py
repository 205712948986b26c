"""Where the real LeRobot is, for the tests that hold us against it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OWN_ENVIRONMENT = Path(__file__).parent.parent / ".venv-lerobot"


def find_lerobot() -> str | None:
    """An interpreter that can import LeRobot; None where there is none."""
    if named := os.environ.get("UNDERSTUDY_LEROBOT_PYTHON"):
        return named
    if (OWN_ENVIRONMENT / ".ready").exists():
        return str(OWN_ENVIRONMENT / "bin" / "python")
    return sys.executable if importlib.util.find_spec("lerobot") is not None else None


def lerobot_python() -> str:
    """An interpreter that can import LeRobot, or skip the test with the reason."""
    python = find_lerobot()
    if python is None:
        pytest.skip("LeRobot is not here: run `make lerobot`, or name its interpreter in UNDERSTUDY_LEROBOT_PYTHON")
    return python


def ask_lerobot(script: str, question: Any) -> Any:
    """Run a script in LeRobot's interpreter: `question` as JSON on standard input, the answer on its last line."""
    done = subprocess.run(
        [lerobot_python(), "-c", script], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
