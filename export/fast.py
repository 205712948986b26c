"""What `--fast` would save a policy that samples as slowly as its configuration says: two times, measured.

`export.command` asks once a bundle's graphs are written; the answer is a sentence in the report, since speed is for the
person who exports to choose, after `understudy sweep` has said what it costs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from device.arrays import Array
from device.bundle import STEP_NOISE, Bundle
from device.engine import infer_observation, open_engine
from device.manifest import Manifest
from export.diffusion.policy import DiffusionPolicy
from export.policy import Policy
from export.sampling import FAST


@dataclass(frozen=True)
class Saving:
    """Milliseconds of one inference here, as the bundle samples and as `--fast` would."""

    milliseconds: float
    fast_milliseconds: float

    def __str__(self) -> str:
        return (
            f"a chunk takes {self.milliseconds:.0f} ms here; with --fast ({FAST.solver}, {FAST.steps} steps) it would "
            f"take {self.fast_milliseconds:.0f} ms: `understudy sweep` measures what that changes"
        )


def what_fast_saves(folder: Path, policy: Policy, manifest: Manifest) -> Saving | None:
    """Run the bundle's files in `folder` on its golden inputs both ways; None where there is nothing to save."""
    if not isinstance(policy, DiffusionPolicy) or policy.samplers.distilled or policy.table.steps <= (FAST.steps or 0):
        return None
    inputs, _ = Bundle(folder, manifest, "").golden()
    fast = policy.with_sampling(FAST)
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
        other = Path(copy)
        for name in (path.name for path in folder.iterdir() if path.suffix == ".onnx"):
            _link(folder / name, other / name)
        for name, content in fast.sampler_files().items():
            (other / name).write_bytes(content)
        return Saving(
            _milliseconds(folder, manifest, inputs),
            _milliseconds(other, manifest.model_copy(update={"sampler": fast.sampler}), inputs),
        )


def _milliseconds(folder: Path, manifest: Manifest, inputs: Mapping[str, Array]) -> float:
    engine = open_engine(Bundle(folder, manifest, ""))
    draws = manifest.sampler is not None and manifest.sampler.draws_noise
    observed = {name: array for name, array in inputs.items() if draws or name != STEP_NOISE}
    began = time.perf_counter()
    infer_observation(engine, manifest, observed)
    return 1e3 * (time.perf_counter() - began)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
