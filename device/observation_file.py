"""`understudy bundle run`: an observation from a file in, the policy's actions in a file out.

The same engine as in `predict`, without a cell: to compare a bundle with the framework it came from, and for support
from afar. What the file holds is checked name by name before anything runs, with a sentence for each way to get it
wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from device.arrays import Array, dump_arrays, load_arrays
from device.bundle import ACTION, STEP_NOISE, Bundle, Manifest
from device.durable import write_durably
from device.engine import infer_observation, open_engine
from device.errors import BundleError


def run_observation(bundle_path: Path, observation: Path, out: Path, threads: int = 1) -> Array:
    """One inference from files: OBS.npz by LeRobot's names in, CHUNK.npz with `action` float32 [K, A] out.

    What else OBS.npz may hold is in docs/formats.md: several observation steps, noise. Returns the actions.
    Raises BundleError for an observation that is not what the policy takes, EngineError.
    """
    bundle = Bundle.open(bundle_path)
    arrays = load_arrays(observation)
    check_observation(bundle.manifest, arrays, str(observation))
    engine = open_engine(bundle, threads)
    actions: Array = infer_observation(engine, bundle.manifest, arrays).copy()
    try:
        write_durably(out, dump_arrays({ACTION: actions}))
    except OSError as error:
        raise BundleError(f"{out} cannot be written: {error}") from error
    return actions


def check_observation(manifest: Manifest, arrays: dict[str, Array], where: str) -> None:
    """Raise BundleError unless the arrays are finite and what the policy takes. `where` names the file.

    With several observation steps every input has a leading axis of them. Noise may be there where a policy samples.
    """
    needed = {
        name: ((shape if manifest.observation_steps == 1 else (manifest.observation_steps, *shape)), dtype)
        for name, (shape, dtype) in manifest.input_shapes().items()
    }
    noise = {name: (shape, np.dtype(np.float32)) for name, shape in manifest.noise_shapes().items()}
    for name in needed:
        if name not in arrays:
            raise BundleError(f"{where}: {name} is missing; the policy takes {', '.join(needed)}")
    taken = needed | noise
    for name, array in arrays.items():
        if name not in taken:
            raise BundleError(f"{where}: {name} is nothing that the policy takes; it takes {', '.join(taken)}")
        _check_array(name, array, *taken[name], where)


def _check_array(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    shapes = [shape, (shape[0] - 1, *shape[1:])] if name == STEP_NOISE else [shape]
    if array.dtype != dtype or array.shape not in shapes:
        raise BundleError(f"{where}: {name} should be {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BundleError(f"{where}: {name} holds NaN or infinity")
