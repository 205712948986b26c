"""Processes that run a policy when told to (policy_worker.py), so that several ways take turns on one machine."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]


class Worker:
    """One way to run the policy in `policy` on the observation in the file `observation`."""

    def __init__(self, python: str, way: str, policy: Path, observation: Path, threads: int) -> None:
        worker = Path(__file__).with_name("policy_worker.py")
        command = [python, str(worker), way, str(policy), str(observation), str(threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if way != "lerobot":
            environment["PYTHONPATH"] = str(ROOT)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self._answers: list[dict[str, Any]] = []
        ready = self._read()
        self.actions = np.array(ready["actions"])
        self._load_s = ready["load_s"]

    def infer(self, count: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        self._answers.append(self._read())

    def figures(self, reference: np.ndarray) -> dict[str, float]:
        """ms, MB and s, and the largest distance of the first answer from `reference`, in joint units."""
        walls = [wall for answer in self._answers for wall in answer["ms"]]
        return {
            "min_ms": min(walls),
            "median_ms": statistics.median(walls),
            "cpu_ms": statistics.median(answer["cpu_ms"] for answer in self._answers),
            "peak_mb": self._answers[-1]["peak_mb"],
            "load_s": self._load_s,
            "difference": float(np.abs(self.actions - reference).max()),
        }

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        _, problem = self._process.communicate()
        raise RuntimeError(f"{' '.join(map(str, self._process.args))} ended without an answer: {problem[-2000:]}")
