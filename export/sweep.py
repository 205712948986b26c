"""`understudy sweep`: what fewer denoising steps cost a diffusion policy, measured on recorded episodes.

Every way of sampling answers the same observations from the same noise, in the engine that a device runs. Each is
compared with the full schedule (DDIM over all trained steps: with noise given, it is what the others approximate), with
what was demonstrated, and by its jerk and its time. The recommendation is the fewest steps that stay close to the full
schedule by all of these. Where a task has several modes, any distance also counts who chose another one, so the one to
the full schedule is a median; jerk does not care. Success in a cell is not measured here.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device.arrays import Array
from device.bundle import STATE, Bundle
from device.engine import infer_observation, open_engine
from device.manifest import Manifest
from export.bundling import Choices, draft_manifest, input_names
from export.checkpoint import Told
from export.diffusion.policy import DiffusionPolicy
from export.diffusion.samplers import DiffusionSamplers
from export.episodes import Sample, check_episodes, open_episodes, sample_observations
from export.errors import ExportError
from export.families import read_policy
from export.precision import Precision, Storage
from export.sampling import MIN_STEPS, Sampling, Solver, Spacing
from export.units import TrainedIn, bundle_factors, in_bundle_units

STEPS = (2, 4, 5, 8, 10, 16)
OBSERVATIONS = 48
# A way of sampling is as good as the full schedule while it stays within these, of the full schedule's own figure. With
# some fifty observations the distance differs by five percent between ways that are equally good (16 steps were seen
# farther away than 10).
WORSE_BY = {"distance": 1.10, "jerk": 1.25}
MEDIAN_ERROR = 1.0  # joint units, from the full schedule's chunk
P95_ERROR = 5.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """One way of sampling and what it did; all but `milliseconds` in joint units.

    `error`, `error_p95`: mean over a chunk of the distance from the full schedule's, median and 95 % over observations.
    `distance`: mean distance from what was demonstrated. `jerk`: root mean square of third differences, per action
    period cubed. `milliseconds`: median of a whole inference, encoding included.
    """

    name: str
    solver: str
    steps: int
    spacing: str
    error: float
    error_p95: float
    distance: float
    jerk: float
    milliseconds: float
    objection: str | None  # why it is not recommended; None where it could be


@dataclass(frozen=True)
class SweepReport:
    """What a sweep found. `recommended` indexes `ways`; the full schedule is always there to fall back on."""

    checkpoint: Path
    episodes: Path
    observations: int
    threads: int
    demonstrated_jerk: float
    ways: tuple[Way, ...]
    recommended: int
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return found | {"checkpoint": str(self.checkpoint), "episodes": str(self.episodes)}


def sweep(
    checkpoint: Path,
    episodes: Path,
    *,
    steps: Sequence[int] = STEPS,
    solvers: Sequence[Solver] = ("ddim",),
    observations: int = OBSERVATIONS,
    threads: int = 1,
    seed: int = 0,
    told: Told | None = None,
    joints: Sequence[str] | None = None,
    units: TrainedIn = TrainedIn.degrees,
    progress: Progress | None = None,
) -> SweepReport:
    """Measure a diffusion checkpoint on `observations` frames of the recorded `episodes`.

    `joints`, `units`: of training and of the recording, as for an export; figures are in the bundle's.
    Raises ExportError where it is no diffusion policy, is distilled already, or does not fit the episodes.
    """
    say = progress or (lambda what: None)
    say("reading the checkpoint")
    told = told or Told()
    source, policy = read_policy(checkpoint, told, Sampling())
    if not isinstance(policy, DiffusionPolicy):
        raise ExportError(f"{source.path}: {policy.family} answers at once; there are no denoising steps to sweep")
    if not isinstance(policy.samplers, DiffusionSamplers):
        raise ExportError(f"{source.path} is distilled: it samples in {policy.sampler.steps} steps and no other way")
    trained = policy.samplers.schedule.num_train_timesteps
    # Names make no difference here, but some may be said to have another unit.
    joints = joints or [f"joint_{index}" for index in range(policy.action_size)]
    policy, factors = in_bundle_units(source, policy, joints, units), bundle_factors(joints, policy.action_size, units)
    choices = Choices(joints=joints, units=units, told=told)
    names, manifest = input_names(source, policy), draft_manifest(source, policy, choices)
    say("reading the episodes")
    recording = open_episodes(episodes)
    shapes = {names[name]: shape for name, shape in policy.inputs.shapes().items()}
    check_episodes(recording, shapes, policy.action_size)
    samples = sample_observations(
        recording,
        observations,
        seed,
        horizon=policy.chunk_size,
        observation_steps=policy.observation_steps,
        rate_hz=manifest.action_rate_hz,
        inputs=list(shapes),
    )
    samples = [in_units(sample, factors) for sample in samples]
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), policy, names, manifest, samples, threads, seed)
        full = bench.run(Sampling("ddim", trained, "leading"))
        own = bench.run(Sampling())
        rows: list[tuple[str, _Found, Sampling | None]] = [
            ("the checkpoint's own", own, None),
            (f"full schedule, ddim-{trained}", full, None),
        ]
        for sampling in _variants(solvers, sorted(set(steps)), trained):
            say(f"{sampling.solver}, {sampling.steps} steps, {sampling.spacing}")
            rows.append((f"{sampling.solver}-{sampling.steps} {sampling.spacing}", bench.run(sampling), sampling))
    demonstrated = [sample.actions[: sample.recorded] for sample in samples]
    ways = tuple(_judge(name, found, full, demonstrated, sampling) for name, found, sampling in rows)
    return SweepReport(
        checkpoint=source.path,
        episodes=episodes,
        observations=len(samples),
        threads=threads,
        demonstrated_jerk=_jerk(demonstrated),
        ways=ways,
        recommended=_recommend(ways),
        warnings=tuple(source.warnings),
    )


def in_units(sample: Sample, factors: Array) -> Sample:
    """The sample with every joint's numbers, seen and demonstrated, times its factor."""
    if (factors == 1).all():
        return sample
    state = (sample.observation[STATE] * factors).astype(np.float32)
    actions = (sample.actions * factors).astype(np.float32)
    return dataclasses.replace(sample, observation=sample.observation | {STATE: state}, actions=actions)


def _variants(solvers: Sequence[Solver], steps: Sequence[int], trained: int) -> Iterator[Sampling]:
    spacings: tuple[Spacing, ...] = ("leading", "trailing")
    for solver in solvers:
        for spacing in spacings:
            for count in steps:
                if count < trained:
                    yield Sampling(solver, count, spacing, force=True)


@dataclass(frozen=True)
class _Found:
    manifest: Manifest
    chunks: Array  # [N, K, A]
    milliseconds: float


class _Bench:
    """All samples through one way of sampling after the other. The graphs are the same; only their table changes."""

    def __init__(
        self,
        folder: Path,
        policy: DiffusionPolicy,
        names: dict[str, str],
        manifest: Manifest,
        samples: Sequence[Sample],
        threads: int,
        seed: int,
    ) -> None:
        self._folder, self._policy, self._manifest = folder, policy, manifest
        self._samples, self._threads = samples, threads
        for name, content in policy.author(names, Storage.fp32, Precision.fp32).files.items():
            (folder / name).write_bytes(content)
        rng = np.random.default_rng(seed)
        self._noise = rng.standard_normal((len(samples), policy.horizon, policy.action_size)).astype(np.float32)
        self._seed = seed

    def run(self, sampling: Sampling) -> _Found:
        policy = self._policy.with_sampling(sampling)
        for name, content in policy.sampler_files().items():
            (self._folder / name).write_bytes(content)
        manifest = self._manifest.model_copy(update={"sampler": policy.sampler})
        engine = open_engine(Bundle(self._folder, manifest, ""), self._threads, self._seed)
        chunks, seconds = [], []
        for sample, noise in zip(self._samples, self._noise, strict=True):
            began = time.perf_counter()
            chunks.append(infer_observation(engine, manifest, sample.observation | {"noise": noise}).copy())
            seconds.append(time.perf_counter() - began)
        return _Found(manifest, np.stack(chunks), 1e3 * statistics.median(seconds))


def _judge(name: str, found: _Found, full: _Found, demonstrated: list[Array], sampling: Sampling | None) -> Way:
    sampler = found.manifest.sampler
    assert sampler is not None  # a policy that samples has one
    errors = np.abs(found.chunks - full.chunks).mean(axis=(1, 2))
    way = Way(
        name=name,
        solver=sampler.solver,
        steps=sampler.steps,
        spacing=sampler.spacing,
        error=float(np.median(errors)),
        error_p95=float(np.quantile(errors, 0.95)),
        distance=_distance(found.chunks, demonstrated),
        jerk=_jerk(found.chunks),
        milliseconds=found.milliseconds,
        objection=None,
    )
    limits = {"distance": _distance(full.chunks, demonstrated), "jerk": _jerk(full.chunks)}
    return dataclasses.replace(way, objection=None if sampling is None else _objection(way, limits))


def _objection(way: Way, full: dict[str, float]) -> str | None:
    if way.steps < MIN_STEPS:
        return f"fewer than {MIN_STEPS} steps of a policy that is not distilled"
    if way.error > MEDIAN_ERROR or way.error_p95 > P95_ERROR:
        return "other actions than the full schedule's"
    for what, factor in WORSE_BY.items():
        if getattr(way, what) > factor * full[what]:
            return f"{what} more than {factor - 1:.0%} above the full schedule's"
    return None


def _recommend(ways: Sequence[Way]) -> int:
    """The fastest kind that nothing speaks against; the fewest steps, then the smallest error."""
    good = [i for i, way in enumerate(ways) if way.objection is None and i > 1]
    return min(good, key=lambda i: (ways[i].steps, ways[i].error), default=0)


def _distance(chunks: Iterable[Array], demonstrated: Sequence[Array]) -> float:
    """Mean distance, over what was demonstrated."""
    parts = [np.abs(chunk[: len(shown)] - shown).ravel() for chunk, shown in zip(chunks, demonstrated, strict=True)]
    return float(np.concatenate(parts).mean())


def _jerk(chunks: Iterable[Array]) -> float:
    third = [np.diff(chunk, 3, axis=0).ravel() for chunk in chunks if len(chunk) > 3]
    return float(np.sqrt(np.mean(np.concatenate(third) ** 2))) if third else 0.0
