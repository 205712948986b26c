"""How true a bundle is: against PyTorch on its golden inputs, and in a lower precision against fp32.

`export.command` calls `prove` for every bundle; it runs the very files that go into the bundle in the very engine that
a device runs them in. Half precision and int8 (`lower`) are measured on real observations, since made-up ones mislead,
joint by joint in the joints' units and with the same noise where the policy samples, and refused above BOUNDS unless
forced. int8 is calibrated on other observations than those that it is measured on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from device.arrays import Array
from device.bundle import ENCODER, NOISE, POLICY, STATE, Bundle, Fidelity, Manifest
from device.engine import Engine, EngineError, infer_observation, open_engine
from export import golden
from export.bundle_writer import PartialBundle
from export.calibrate import largest_magnitudes
from export.checkpoint import Checkpoint
from export.episodes import check_episodes, open_episodes, sample_observations
from export.errors import ExportError
from export.policy import Authored, Policy
from export.precision import Precision, Storage
from export.quantize import plan, quantize
from export.rounding import with_roundings

TOLERANCE = 1e-3  # of a joint unit: the bundle against PyTorch, in fp32
# A sampler of many steps can blow roundings up (seen with random weights; trained policies stay near 1e-5), PyTorch's
# as well as ours. What PyTorch does to one rounding of the noise, times the roundings that a network makes: a few.
ROUNDINGS = 20
# The largest difference from fp32 of any joint, action and observation, in joint units (degrees, or hundredths of a
# range). fp16: five steps of an STS3215 (0.088 degrees each), less than its gears' play; the virtual cell's ACT and
# diffusion policies were measured at 0.06 and 0.05. int8: three degrees are 18 mm at the gripper of an outstretched
# SO-101, for one action that those around it outvote; the two were measured at 0.4 and 2.3 (0.02 and 0.05 on average).
# What quantises badly is off by tens.
BOUNDS = {Precision.fp16: 0.5, Precision.int8: 3.0}
MEASURED = 64  # observations
FEWEST = 16  # that int8 is calibrated on, and as many more that it is measured on
SEED = 0


@dataclass(frozen=True)
class Proven:
    """An fp32 bundle that is being written and was proven: its files stand in `partial`. `inputs` (by the robot's
    names) and `expected` are its golden ones; `names`: policy's input -> robot's."""

    partial: PartialBundle
    manifest: Manifest
    policy: Policy
    names: Mapping[str, str]
    authored: Authored
    fidelity: Fidelity
    inputs: Mapping[str, Array]
    expected: Array


@dataclass(frozen=True)
class Lowered:
    """A bundle whose files are now of a lower precision. `mean_errors`: per joint, beside fidelity's largest ones."""

    authored: Authored
    fidelity: Fidelity
    mean_errors: tuple[float, ...]


def prove(
    path: Path, manifest: Manifest, inputs: Mapping[str, Array], expected: Array, unsteadiness: Callable[[], float]
) -> float:
    """Run the bundle's files on `inputs` (the robot's names); returns the largest difference from `expected`, in joint
    units. Raises ExportError above TOLERANCE, unless the policy itself is too unsteady for it: `unsteadiness` says how
    far one rounding of its noise moves PyTorch's own answer (0 where it does not sample)."""
    if not np.isfinite(expected).all():
        raise ExportError("the policy answers NaN or infinity to ordinary inputs; its weights are of no use")
    error = float(np.abs(infer_observation(_engine(path, manifest), manifest, inputs) - expected).max())
    if not error <= TOLERANCE and not error <= ROUNDINGS * unsteadiness():
        raise ExportError(
            f"the bundle differs from PyTorch by {error:.2g} joint units on the golden inputs (bound: {TOLERANCE:g}); "
            "this is a defect of the exporter, please report it with the checkpoint's config.json"
        )
    return error


def unsteadiness(policy: Policy, inputs: Mapping[str, Array], expected: Array) -> float:
    """How far the reference moves when the noise that it starts from moves by one float32 step, joint units."""
    if NOISE not in inputs:
        return 0.0
    nudged = np.nextafter(inputs[NOISE], np.float32(np.inf))
    return float(np.abs(policy.reference({**inputs, NOISE: nudged}) - expected).max())


def observations(
    source: Checkpoint,
    policy: Policy,
    manifest: Manifest,
    precision: Precision,
    episodes: Path | None,
    observation: Path | None,
    factors: Array,
) -> list[dict[str, Array]]:
    """Real observations by the robot's names, evenly spread over a folder of episodes, or the one of a file; what a
    lower precision is measured on. None for fp32 without episodes. Recordings are in the units of training, `factors`
    (`export.units.bundle_factors`) turn their states into the bundle's. Raises ExportError."""
    if precision is Precision.int8 and episodes is None:
        raise ExportError(
            "--precision int8 is calibrated on what the robot saw; give a folder of its recordings with --episodes"
        )
    if precision is Precision.fp16 and episodes is None and observation is None:
        raise ExportError(
            "--precision fp16 is measured on what the robot saw; give a folder of its recordings with --episodes, or "
            "one observation with --observation"
        )
    if episodes is not None:
        return _sampled(manifest, precision, episodes, factors)
    if observation is None or precision is Precision.fp32:
        return []
    seen = golden.from_file(observation, source, policy)
    return [{source.robot_name(name): array for name, array in seen.items()}]


def lower(proven: Proven, observed: Sequence[Mapping[str, Array]], precision: Precision, force: bool) -> Lowered:
    """Replace the fp32 files of a partial bundle by ones of a lower precision, and measure what that costs.

    int8 is calibrated on every other one of `observed` and measured on the rest. Raises ExportError for a policy that
    has no use for the precision or answers nonsense in it, and above BOUNDS unless `force`.
    """
    path, manifest, policy = proven.partial.path, proven.manifest, proven.policy
    tested = observed[1::2] if precision is Precision.int8 else observed
    noise = [policy.noise(seed) for seed in range(len(tested))]
    exact = _run_all(_engine(path, manifest), manifest, tested, noise)
    if precision is Precision.int8:
        authored = _quantized(proven, observed[::2])
    else:
        authored = policy.author(proven.names, Storage(proven.fidelity.weights), precision)
    try:
        proven.partial.write(_as_computed(authored) if precision is Precision.fp16 else authored.files)
        errors = np.abs(_run_all(_engine(path, manifest), manifest, tested, noise) - exact)
        proven.partial.write(authored.files)
        answer = infer_observation(_engine(path, manifest), manifest, proven.inputs)
        golden_error = float(np.abs(answer - proven.expected).max())
    except EngineError as error:
        raise ExportError(f"--precision {precision.value} is not for this policy: {error}") from error
    largest = errors.max(axis=(0, 1))
    _judge(manifest, precision, largest, force)
    measured = {
        "precision": precision.value,
        "max_error": golden_error,
        "joint_errors": tuple(largest.tolist()),
        "observations": len(tested),
    }
    fidelity = proven.fidelity.model_copy(update=measured)
    return Lowered(authored, fidelity, tuple(errors.mean(axis=(0, 1)).tolist()))


def _sampled(manifest: Manifest, precision: Precision, folder: Path, factors: Array) -> list[dict[str, Array]]:
    episodes = open_episodes(folder)
    shapes = {name: shape for name, (shape, _) in manifest.input_shapes().items()}
    check_episodes(episodes, shapes, len(manifest.joints))
    needed = 2 * FEWEST if precision is Precision.int8 else 1
    if episodes.frame_count < needed:
        raise ExportError(f"{folder} holds {episodes.frame_count} observations; int8 needs {needed}")
    samples = sample_observations(
        episodes,
        {Precision.fp32: 1, Precision.fp16: MEASURED, Precision.int8: 2 * MEASURED}[precision],
        SEED,
        horizon=1,
        observation_steps=manifest.observation_steps,
        rate_hz=None if manifest.observation_steps == 1 else manifest.action_rate_hz,
        inputs=shapes,
    )
    if (factors == 1).all():
        return [sample.observation for sample in samples]
    return [{**each.observation, STATE: (each.observation[STATE] * factors).astype(np.float32)} for each in samples]


def _quantized(proven: Proven, observed: Sequence[Mapping[str, Array]]) -> Authored:
    """The bundle's files with int8 in the graph that the cameras go into. The convolutions over time of a policy that
    samples keep float32: in int8 they saved a quarter of a step, and moved actions by 0.6 on average, 3.6 at most."""
    name = POLICY if proven.manifest.sampler is None else ENCODER
    model = onnx.load_from_string(proven.authored.files[name])
    planned = plan(model)
    steps = proven.manifest.observation_steps
    feeds = [
        {key: array if steps == 1 else array[step] for key, array in each.items()}
        for each in observed
        for step in range(steps)
    ]
    quantized = quantize(model, planned, largest_magnitudes(model, planned.observed, feeds, _threads()))
    nodes = proven.authored.nodes + len(quantized.graph.node) - len(model.graph.node)
    return Authored({**proven.authored.files, name: quantized.SerializeToString()}, nodes)


def _as_computed(authored: Authored) -> dict[str, bytes]:
    """The files with half precision as a GPU computes it, see `export.rounding`."""
    files = dict(authored.files)
    for name, content in authored.files.items():
        if name.endswith(".onnx"):
            files[name] = with_roundings(onnx.load_from_string(content)).SerializeToString()
    return files


def _judge(manifest: Manifest, precision: Precision, largest: Array, force: bool) -> None:
    worst = int(largest.argmax())
    if largest[worst] <= BOUNDS[precision] or force:
        return
    joint = manifest.joints[worst]
    raise ExportError(
        f"--precision {precision.value} moves {joint.name} by up to {largest[worst]:.2g} {joint.unit.value} from what "
        f"fp32 answers to the same observations (bound: {BOUNDS[precision]:g}); export in a higher precision, or "
        "accept it with --force"
    )


def _run_all(
    engine: Engine,
    manifest: Manifest,
    observed: Sequence[Mapping[str, Array]],
    noise: Sequence[Mapping[str, Array]],
) -> Array:
    """float32 [N, K, A], in joint units."""
    pairs = zip(observed, noise, strict=True)
    return np.stack([infer_observation(engine, manifest, {**seen, **drawn}).copy() for seen, drawn in pairs])


def _engine(path: Path, manifest: Manifest) -> Engine:
    return open_engine(Bundle(path, manifest, ""), _threads())


def _threads() -> int:
    return len(os.sched_getaffinity(0))
