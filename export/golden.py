"""Golden inputs: an observation that goes into the bundle with the reference's answer, to prove engines on.

Taken from a file where the person who exports has a real one, made up otherwise: joints within their statistics, smooth
frames that compress well. Both reach every part of the network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from device.arrays import Array, load_arrays
from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.policy import Policy

NOISE_SEED = 0


def made_up(policy: Policy) -> dict[str, Array]:
    """Raw inputs by the policy's names, with a leading axis of observation steps where there are several."""
    steps = [_made_up_step(policy, step) for step in range(policy.observation_steps)]
    if len(steps) == 1:
        return steps[0]
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def from_file(path: Path, source: Checkpoint, policy: Policy) -> dict[str, Array]:
    """The observation in an .npz file by the robot's names; the same as `made_up`. A file with one observation does for
    a policy that looks at several: it stood still. Raises ExportError, BundleError."""
    arrays, inputs = load_arrays(path), {}
    for name, shape in policy.inputs.shapes().items():
        given, steps = source.robot_name(name), policy.observation_steps
        dtype = np.dtype(np.uint8 if len(shape) == 3 else np.float32)
        array = arrays.get(given)
        if array is not None and steps > 1 and array.shape == shape:
            array = np.stack([array] * steps)
        wanted = shape if steps == 1 else (steps, *shape)
        if array is None or array.shape != wanted or array.dtype != dtype:
            found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise ExportError(f"{path}: {given} should be {dtype} {list(wanted)}, found {found}")
        inputs[name] = array
    return inputs


def _made_up_step(policy: Policy, step: int) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    for index, (name, shape) in enumerate(policy.inputs.shapes().items()):
        if len(shape) == 1:
            normalizer = policy.normalizers[name]
            spread = 0.7 * np.sin(1.0 + 2.0 * np.arange(shape[0]) + 0.1 * step)
            inputs[name] = (normalizer.offset + normalizer.scale * spread).astype(np.float32)
            continue
        y, x = np.mgrid[0 : shape[0], 0 : shape[1]] / max(shape)
        waves = [np.sin(2 * np.pi * ((2 + c) * x + (3 - c) * y) + index + c + 0.1 * step) for c in range(3)]
        inputs[name] = (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    return inputs
