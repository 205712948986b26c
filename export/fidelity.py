"""How true a bundle is: against PyTorch on its golden inputs, and in a lower precision against fp32.

`export.command` calls `prove` for every bundle; it runs the very files that go into the bundle in the very engine that
a device runs them in. What half precision or int8 costs is measured on real observations, since random ones mislead,
joint by joint in the joints' units, and refused above a bound unless it is forced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from device.arrays import Array
from device.bundle import Bundle, Fidelity, Manifest
from device.engine import infer_observation, open_engine
from export.bundle_writer import PartialBundle
from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.policy import Authored, Policy
from export.precision import Precision

TOLERANCE = 1e-3  # of a joint unit: the bundle against PyTorch, in fp32
BOUNDS = {Precision.fp16: 0.5, Precision.int8: 3.0}  # of a joint unit, largest over actions and observations


def prove(path: Path, manifest: Manifest, inputs: Mapping[str, Array], expected: Array) -> float:
    """Run the bundle's files on `inputs` (the robot's names); returns the largest difference from `expected`, in joint
    units. Raises ExportError above TOLERANCE."""
    if not np.isfinite(expected).all():
        raise ExportError("the policy answers NaN or infinity to ordinary inputs; its weights are of no use")
    error = float(np.abs(_run(path, manifest, inputs) - expected).max())
    if not error <= TOLERANCE:
        raise ExportError(
            f"the bundle differs from PyTorch by {error:.2g} joint units on the golden inputs (bound: {TOLERANCE:g}); "
            "this is a defect of the exporter, please report it with the checkpoint's config.json"
        )
    return error


def observations(
    source: Checkpoint, policy: Policy, manifest: Manifest, episodes: Path | None, observation: Path | None
) -> list[dict[str, Array]]:
    """Real observations by the robot's names, from a folder of episodes or from one file. Raises ExportError."""
    raise ExportError("--precision fp16 and int8 are not there yet")


def lower(
    partial: PartialBundle,
    manifest: Manifest,
    policy: Policy,
    names: Mapping[str, str],
    authored: Authored,
    measured: Fidelity,
    observed: Sequence[Mapping[str, Array]],
    precision: Precision,
    force: bool,
) -> tuple[Authored, Fidelity]:
    """Replace the fp32 files of a partial bundle by ones of a lower precision, and measure what that costs."""
    raise ExportError("--precision fp16 and int8 are not there yet")


def _run(path: Path, manifest: Manifest, inputs: Mapping[str, Array]) -> Array:
    engine = open_engine(Bundle(path, manifest, ""))
    action: Array = infer_observation(engine, manifest, inputs).copy()
    return action
