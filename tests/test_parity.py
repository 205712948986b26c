"""Whole policies of real size against the framework that made them: every case that a folder holds.

`UNDERSTUDY_PARITY_CASES` names the folder; without it there is nothing to do here (the recipes' fixtures are what is
always tested). A case is a checkpoint as LeRobot saved it with, beside it, what LeRobot answered: `io.npz` with raw
observations `raw/<input>` and actions `chunk_unnorm`, noise where the policy samples (`init_noise`, `ddpm_step_noise`),
and where it was recorded a closed loop through LeRobot's queues (`seq/<input>`, `seq/select_action`, `seq/init_noise`).
The largest error of each goes into the table of parity (conftest.py).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="export needs the export extra")

import torch

from conftest import Parity
from device.bundle import Bundle
from device.engine import Engine, infer_observation, open_engine
from export.bundling import export_checkpoint

FOLDER = os.environ.get("UNDERSTUDY_PARITY_CASES")
CASES = sorted(path.parent for path in Path(FOLDER).rglob("io.npz")) if FOLDER else []
TOLERANCE = 1e-3  # joint units

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not CASES, reason="UNDERSTUDY_PARITY_CASES names no folder of cases")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_gives_the_actions_that_it_gave_in_its_framework(case: Path, parity: Parity) -> None:
    recorded = np.load(case / "io.npz")
    with tempfile.TemporaryDirectory() as folder:
        report = export_checkpoint(case, Path(folder) / "bundle")
        bundle = Bundle.open(report.path)
        engine = open_engine(bundle)
        errors = [*_chunks(bundle, engine, recorded), *_sequence(bundle, engine, recorded)]
    kind = json.loads((case / "config.json").read_text())["type"]
    assert parity(f"{kind} of a case folder", "LeRobot", case.name, errors) < TOLERANCE


def _chunks(bundle: Bundle, engine: Engine, recorded: Any) -> Iterator[float]:
    """The largest error of every chunk that the case holds."""
    manifest = bundle.manifest
    for index, expected in enumerate(recorded["chunk_unnorm"]):
        seen = {name.removeprefix("raw/"): recorded[name][index] for name in recorded if name.startswith("raw/")}
        if manifest.sampler is not None and manifest.observation_steps == 1:
            seen = {name: array[0] for name, array in seen.items()}
        for name, key in (("noise", "init_noise"), ("step_noise", "ddpm_step_noise")):
            if key in recorded:
                drawn = recorded[key][index]
                seen[name] = drawn[0] if name == "noise" else drawn[:, 0]
        action = infer_observation(engine, manifest, {name: _fit(name, array) for name, array in seen.items()})
        yield float(np.abs(action - expected).max())


def _fit(name: str, array: Array) -> Array:
    return np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32))


def _sequence(bundle: Bundle, engine: Engine, recorded: Any) -> Iterator[float]:
    """The errors along a closed loop, where one was recorded."""
    manifest, ticks = bundle.manifest, len(recorded["seq/select_action"]) if "seq/select_action" in recorded else 0
    if manifest.sampler is not None and manifest.sampler.draws_noise:
        return  # what its steps drew along the loop is not recorded
    chunk: Array | None = None
    for tick in range(ticks):
        for name, target in engine.inputs.items():
            target[...] = recorded[f"seq/{name}"][tick]
        engine.observe(tick)
        if manifest.sampler is None:
            yield float(np.abs(engine.infer() - recorded["seq/chunk_unnorm"][tick]).max())
            continue
        # LeRobot asks for a chunk when the last one is used up; at the beginning it repeats the first observation.
        if tick % manifest.chunk_size == 0:
            seen = [max(0, tick - back) for back in reversed(range(manifest.observation_steps))]
            chunk = engine.infer(seen, noise=recorded["seq/init_noise"][tick][0]).copy()
        assert chunk is not None
        yield float(np.abs(chunk[tick % manifest.chunk_size] - recorded["seq/select_action"][tick]).max())
