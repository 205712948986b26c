"""One ACT chunk on the CPU: our ONNX in onnxruntime in every precision, our PyTorch forward, and LeRobot's own policy,
in the same run.

`python -m tests.bench.bench_act [THREADS]` prints the tables; `run()` returns the figures. LeRobot takes part where
it is there (`make lerobot`). Each way has a process of its own with the same
threads, the same checkpoint (made from the tests' recipe, in LeRobot's layout) and the same observation; they infer in
turns, a few at a time, so that whatever else the machine does hits all of them. The least time of all turns is what the
way costs where nothing interferes; processor time is the sum over threads and does not depend on what interferes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from device.arrays import dump_arrays  # noqa: E402 - after the path
from export.bundling import export_checkpoint  # noqa: E402
from fixtures.checkpoint_files import write_checkpoint  # noqa: E402
from fixtures.recipe import VARIANTS, observation, uniform  # noqa: E402
from real_lerobot import find_lerobot  # noqa: E402
from tests.bench.workers import Worker  # noqa: E402

THREADS = 2
RECORDED = 32  # frames that int8 is calibrated and measured on
TURNS, PER_TURN = 5, 4


def config(height: int, width: int, **sizes: Any) -> dict[str, Any]:
    """config.json of a two-camera policy: LeRobot's defaults but for `sizes`."""
    found = dict(VARIANTS["plain"])
    defaults = {"dim_model": 512, "n_heads": 8, "dim_feedforward": 3200, "chunk_size": 100, "n_encoder_layers": 4}
    features = {"observation.state": {"type": "STATE", "shape": [6]}}
    for camera in ("front", "wrist"):
        features[f"observation.images.{camera}"] = {"type": "VISUAL", "shape": [3, height, width]}
    more = {"n_vae_encoder_layers": 4, "latent_dim": 32, "n_action_steps": 1, "input_features": features}
    return found | defaults | more | sizes


CASES = {
    "2 x 640x480, LeRobot's default sizes": config(480, 640),
    "2 x 96x96, the demo's sizes": config(96, 96, dim_model=256, n_heads=8, dim_feedforward=1024, chunk_size=30),
}


def run(turns: int = TURNS, threads: int = THREADS) -> dict[str, Any]:
    """Figures by case: `export` (seconds, nodes, MB, largest error), `ways` -> latency in ms, memory in MB, and
    `bundle_run`: memory of `understudy bundle run`, in MB."""
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "threads": threads}
    for name, document in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = _case(Path(folder), document, turns, threads)
    return figures


def _case(folder: Path, document: dict[str, Any], turns: int, threads: int) -> dict[str, Any]:
    checkpoint = write_checkpoint(folder / "checkpoint", document)
    (folder / "observation.npz").write_bytes(dump_arrays(observation(document["input_features"])))
    started = time.process_time()
    report = export_checkpoint(checkpoint, folder / "bundle")
    exported = {
        "seconds": report.seconds,
        "cpu_seconds": time.process_time() - started,
        "nodes": report.nodes,
        "mb": (folder / "bundle" / "policy.onnx").stat().st_size / 1e6,
        "max_error": report.max_error,
    }
    _export_lowered(checkpoint, document, folder)
    workers = {
        "engine": Worker(sys.executable, "engine", folder / "bundle", folder / "observation.npz", threads),
        "int8": Worker(sys.executable, "engine", folder / "int8", folder / "observation.npz", threads),
        "fp16": Worker(sys.executable, "engine", folder / "fp16", folder / "observation.npz", threads),
        "torch": Worker(sys.executable, "torch", checkpoint, folder / "observation.npz", threads),
    }
    if named := find_lerobot():
        workers["lerobot"] = Worker(named, "lerobot", checkpoint, folder / "observation.npz", threads)
    try:
        for _ in range(turns):
            for worker in workers.values():
                worker.infer(PER_TURN)
        reference = workers.get("lerobot", workers["torch"]).actions
        ways = {way: worker.figures(reference) for way, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    reference = "lerobot" if "lerobot" in workers else "torch"
    return {"export": exported, "ways": ways, "reference": reference, "bundle_run": {"peak_mb": _bundle_run(folder)}}


def _export_lowered(checkpoint: Path, document: dict[str, Any], folder: Path) -> None:
    """Bundles in int8 and fp16. Forced: what the recipe's random weights answer is far more sensitive than what any
    training makes of them."""
    frames = [observation(document["input_features"], frame) for frame in range(RECORDED)]
    recorded = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    (folder / "episodes").mkdir()
    (folder / "episodes" / "0.npz").write_bytes(dump_arrays(recorded | {"action": uniform("action", (RECORDED, 6))}))
    export_checkpoint(checkpoint, folder / "int8", precision="int8", episodes=folder / "episodes", force=True)
    seen = folder / "observation.npz"
    export_checkpoint(checkpoint, folder / "fp16", precision="fp16", observation=seen, force=True)


def _bundle_run(folder: Path) -> float:
    """Peak memory of the command, MB."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from policy_worker import peak_mb; from device.cli import app\n"
        "app(sys.argv[3:], standalone_mode=False); print(peak_mb())"
    )
    paths = [str(Path(__file__).parent), str(ROOT)]
    files = ["--observation", str(folder / "observation.npz"), "--out", str(folder / "chunk.npz")]
    command = [sys.executable, "-c", program, *paths, "bundle", "run", str(folder / "bundle"), *files]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(ran.stdout.split()[-1])


def tables(figures: dict[str, Any]) -> list[Table]:
    """The figures as a person reads them, one table a case."""
    titles = {
        "engine": "Understudy",
        "int8": "Understudy, int8",
        "fp16": "Understudy, fp16",
        "torch": "PyTorch (ours)",
        "lerobot": "LeRobot",
    }
    made = []
    for name in CASES:
        case = figures[name]
        exported = case["export"]
        caption = (
            f"{figures['threads']} threads, load average {figures['load_average']:.1f} on {figures['cores']} cores; "
            f"export {exported['seconds']:.1f} s ({exported['cpu_seconds']:.1f} s of processor time), "
            f"{exported['nodes']} nodes, {exported['mb']:.0f} MB; bundle run {case['bundle_run']['peak_mb']:.0f} MB"
        )
        table = Table(
            "way", "least ms", "median ms", "cpu ms", "peak MB", "load s", f"off {case['reference']}",
            title=name, caption=caption,
        )  # fmt: skip
        for way, row in case["ways"].items():
            cells = [f"{row[key]:.0f}" for key in ("min_ms", "median_ms", "cpu_ms", "peak_mb")]
            table.add_row(titles[way], *cells, f"{row['load_s']:.1f}", f"{row['difference']:.1e}")
        made.append(table)
    return made


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    for table in tables(figures):
        Console().print(table)


if __name__ == "__main__":
    show(run(threads=int(sys.argv[1]) if len(sys.argv) > 1 else THREADS))
