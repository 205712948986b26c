"""One diffusion chunk on the CPU: LeRobot with the full schedule, and our bundles with fewer and fewer steps.

`python -m tests.bench.bench_diffusion [THREADS]` prints the tables; `run()` returns the figures. LeRobot takes part
where it is there (`make lerobot`). Weights are the tests' recipe, in LeRobot's layout: speed does not depend on them.
The distilled student is the teacher's checkpoint with the sampler of a student, which is what a student is to an
engine. Each way has a process of its own and they infer in turns, as in `bench_act`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from device.arrays import dump_arrays  # noqa: E402
from export.bundling import export_checkpoint  # noqa: E402
from export.diffusion.samplers import CONSISTENCY  # noqa: E402
from export.sampling import FAST, Sampling  # noqa: E402
from fixtures import recipe_diffusion  # noqa: E402
from fixtures.checkpoint_files import write_checkpoint, write_json  # noqa: E402
from real_lerobot import find_lerobot  # noqa: E402
from tests.bench.workers import Worker  # noqa: E402

THREADS = 2


def config(height: int, width: int, **sizes: Any) -> dict[str, Any]:
    """config.json of a two-camera policy that samples by DDPM in 100 steps: LeRobot's defaults but for `sizes`."""
    images = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, height, width]} for name in ("front", "wrist")
    }
    defaults = {
        "input_features": {"observation.state": {"type": "STATE", "shape": [6]}, **images},
        "horizon": 16,
        "n_action_steps": 8,
        "crop_shape": [84, 84],
        "down_dims": [512, 1024, 2048],
        "diffusion_step_embed_dim": 128,
        "kernel_size": 5,
        "n_groups": 8,
        "spatial_softmax_num_keypoints": 32,
        "noise_scheduler_type": "DDPM",
        "num_train_timesteps": 100,
        "num_inference_steps": None,
    }
    return dict(recipe_diffusion.VARIANTS["shared_encoder_crop_ddpm_100"]) | defaults | sizes


# What is compared, with how many turns and inferences a turn: the large one takes LeRobot a quarter of a minute each.
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "the virtual cell's sizes (5 M parameters)": (
        config(96, 96, down_dims=[64, 128, 256], horizon=32, n_action_steps=16, crop_shape=None, use_group_norm=False),
        4,
        3,
    ),
    "LeRobot's default sizes (266 M parameters)": (config(96, 96), 2, 1),
}
WAYS: dict[str, tuple[str, Sampling | None]] = {
    "ddpm100": ("Understudy, DDPM 100 steps", Sampling()),
    "ddim10": ("Understudy, DDIM 10 steps (--fast)", FAST),
    "student": ("Understudy, distilled to 2 steps", None),
}


def run(threads: int = THREADS) -> dict[str, Any]:
    """Figures by case: way -> latency in ms, memory in MB."""
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "threads": threads}
    for name, (document, turns, per_turn) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = _case(Path(folder), document, turns, per_turn, threads)
    return figures


def _case(folder: Path, document: dict[str, Any], turns: int, per_turn: int, threads: int) -> dict[str, Any]:
    checkpoint = write_checkpoint(folder / "checkpoint", document)
    arrays = recipe_diffusion.observations(document) | {"noise": recipe_diffusion.noise(document)["noise"]}
    (folder / "observation.npz").write_bytes(dump_arrays(arrays))
    for way, (_, sampling) in WAYS.items():
        if sampling is None:
            write_json(checkpoint / "sampler.json", {"solver": CONSISTENCY, "timesteps": [99, 50]})
        export_checkpoint(checkpoint, folder / way, sampling=sampling)
    (checkpoint / "sampler.json").unlink()
    workers = {}
    try:
        for way in WAYS:
            workers[way] = Worker(sys.executable, "engine", folder / way, folder / "observation.npz", threads)
        if named := find_lerobot():
            workers["lerobot"] = Worker(named, "lerobot", checkpoint, folder / "observation.npz", threads)
        for _ in range(turns):
            for worker in workers.values():
                worker.infer(per_turn)
        return {way: worker.figures(worker.actions) for way, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()


def tables(figures: dict[str, Any]) -> list[Table]:
    """The figures as a person reads them, one table a case."""
    titles = {way: title for way, (title, _) in WAYS.items()} | {"lerobot": "LeRobot, DDPM 100 steps"}
    caption = f"{figures['threads']} threads, load average {figures['load_average']:.1f} on {figures['cores']} cores"
    made = []
    for name in CASES:
        table = Table(
            "way", "least ms", "median ms", "cpu ms", "peak MB", "load s", "faster", title=name, caption=caption
        )
        case = figures[name]
        for way, row in case.items():
            cells = [f"{row[key]:.0f}" for key in ("min_ms", "median_ms", "cpu_ms", "peak_mb")]
            times = f"{case['lerobot']['median_ms'] / row['median_ms']:.1f}" if "lerobot" in case else ""
            table.add_row(titles[way], *cells, f"{row['load_s']:.1f}", times)
        made.append(table)
    return made


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    for table in tables(figures):
        Console().print(table)


if __name__ == "__main__":
    show(run(threads=int(sys.argv[1]) if len(sys.argv) > 1 else THREADS))
