"""`understudy distill`: a diffusion policy in, a student of one to four steps out.

The command line calls `run_distill`, tests and recipes call `distill`. Method: consistency distillation, Song et al.
2023 (arXiv:2303.01469), algorithm 2, over skipped steps as Luo et al. 2023 (LCM, arXiv:2310.04378), for policies as
alexander-soare/consistency_policy (MIT) has shown it. Features of the frozen encoder are kept and the training's state
is, in a folder beside the student's (`<out>.work`): the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from export.diffusion.consistency import consistency
from export.diffusion.samplers import ConsistencySamplers
from export.distillation.features import episodes_identity, recorded_features
from export.distillation.gate import Verdict
from export.distillation.options import ONE_STEP_WARNING, Limits, Options
from export.distillation.progress import Bar, TrainingBar
from export.distillation.questions import Questions
from export.distillation.recorded import Recorded
from export.distillation.report import print_verdict
from export.distillation.student import provenance, refuse_occupied_student, write_student
from export.distillation.teacher import Teacher, read_teacher
from export.distillation.training import Training, stopping
from export.episodes import Episodes, check_episodes, open_episodes, split
from export.errors import ExportError
from export.units import SO101_JOINTS


@dataclass(frozen=True)
class DistillReport:
    """What a distillation came to. `seconds` and `steps` of training, all runs together."""

    path: Path
    verdict: Verdict
    timesteps: tuple[int, ...]
    steps: int
    seconds: float
    cpu_seconds_per_step: float | None  # of this run; None where it had nothing left to learn


@dataclass(frozen=True)
class Material:
    """What is learnt from, what timesteps are chosen on, and what the gate looks at: different episodes each, where
    there are three."""

    learning: Recorded
    choosing: Recorded
    judging: Recorded
    description: dict[str, Any]


def distill(
    teacher: Path,
    episodes: Path,
    out: Path,
    options: Options,
    *,
    limits: Limits | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> DistillReport:
    """Distil the checkpoint `teacher` on the recorded `episodes`; the student is put at `out` whatever the verdict.

    Raises ExportError for what cannot be distilled, for episodes of another robot, and when it is told to stop by
    SIGINT or SIGTERM: the same call then goes on.
    """
    shown = console or Console(stderr=True, quiet=True)
    refuse_occupied_student(out, overwrite)
    source = read_teacher(teacher)
    if options.timesteps is not None:
        consistency(source.schedule, options.timesteps)  # raises for what cannot be, before an hour of training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = _work_folder(out)
    material = _material(source, episodes, options, work, device, shown)
    belongs_to = {
        "teacher": source.identity,
        "episodes": str(material.description["sha256"]),
        "learning": ", ".join(f"{name} {getattr(options, name)}" for name in ("batch", "skip", "seed", "held_out")),
    }
    training = Training(source, material.learning, options, work, belongs_to, device)
    per_step = _train(training, options, device, shown)
    shown.print("asking teacher and student", highlight=False)
    questions = Questions(source, training.average, options, limits or Limits(), device)
    timesteps, tried = questions.timesteps(material.choosing)
    verdict = questions.verdict(material.judging, timesteps)
    samplers = ConsistencySamplers(schedule=source.schedule, timesteps=timesteps)
    document = provenance(
        source,
        material.description,
        options,
        {"steps": training.step, "seconds": round(training.seconds, 1), "loss": training.loss, "device": device.type},
        verdict,
        limits or Limits(),
        {"teacher_sampler": questions.teacher_sampler, "timesteps": list(timesteps), "timesteps_tried": tried},
    )
    write_student(out, source, training.average, samplers, document)
    return DistillReport(out, verdict, timesteps, training.step, training.seconds, per_step)


def run_distill(
    teacher: Path,
    episodes: Path,
    out: Path,
    *,
    timesteps: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    as_json: bool = False,
    **options: Any,
) -> bool:
    """What the command line calls: the report on standard output, progress on standard error. False where the gate
    failed and `force` was not given. `options`: fields of `Options`."""
    console = Console(stderr=True)
    chosen = Options(timesteps=None if timesteps is None else _numbers(timesteps), **options)
    if chosen.steps == 1:
        console.print(f"warning: {ONE_STEP_WARNING}", highlight=False, soft_wrap=True)
    report = distill(teacher, episodes, out, chosen, overwrite=overwrite, console=console)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"path": str(out), "passed": report.verdict.passed}))
    else:
        joints = SO101_JOINTS if len(report.verdict.teacher.nearest_joints) == len(SO101_JOINTS) else None
        names = joints or [f"joint {i}" for i in range(len(report.verdict.teacher.nearest_joints))]
        print_verdict(Console(), report.verdict, names)
        steps = f"timesteps {' '.join(map(str, report.timesteps))}"
        took = f"{report.seconds / 60:.1f} minutes"
        if report.cpu_seconds_per_step is not None:
            took += f", {report.cpu_seconds_per_step:.2f} s of CPU each"
        print(f"{out}: {report.steps} steps of training in {took}; {steps}")
    if not report.verdict.passed:
        console.print(
            f"the gate failed: {'; '.join(report.verdict.objections)}. The student is there with this verdict in it; "
            "more --train-steps may help (with --overwrite, the same command goes on)",
            highlight=False,
            soft_wrap=True,
        )
    return report.verdict.passed or force


def _train(training: Training, options: Options, device: torch.device, console: Console) -> float | None:
    began, cpu = training.step, time.process_time()
    whole = f"{options.train_steps} steps" + (f" or {options.minutes:g} minutes" if options.minutes else "")
    where = f"{options.threads} threads" if device.type == "cpu" else str(device)
    with stopping() as stopped:
        console.print(f"learning for {whole}, {options.batch} horizons a step, on {where}", highlight=False)
        if began:
            console.print(f"goes on from step {began}", highlight=False)
        with TrainingBar(console, training.step, training.seconds) as bar:
            finished = training.run(bar.report, stopped)
    if not finished:
        raise ExportError(f"stopped at step {training.step}; the same command goes on from there")
    steps = training.step - began
    return (time.process_time() - cpu) / steps if steps else None


def _work_folder(out: Path) -> Path:
    work = out.with_name(f"{out.name}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{work} cannot be made: {error}") from error
    return work


def _material(
    teacher: Teacher, folder: Path, options: Options, work: Path, device: torch.device, console: Console
) -> Material:
    console.print(f"reading {folder}", highlight=False)
    episodes = open_episodes(folder)
    if options.episodes_limit is not None:
        episodes = episodes[: options.episodes_limit]
    shapes = teacher.policy.inputs.shapes()
    check_episodes(episodes, {teacher.names[name]: shape for name, shape in shapes.items()}, teacher.policy.action_size)
    _, held = split(episodes, options.held_out, options.seed)
    with Bar(console, "features") as bar:
        features = recorded_features(
            teacher.encoder(),
            teacher.names,
            episodes,
            work,
            threads=options.threads,
            cuda=device.type == "cuda",
            progress=lambda done, total: bar.at(done / total, f"{done} of {total} frames"),
        )
    whole = Recorded.of(episodes, features, teacher.policy.observation_steps, teacher.policy.horizon)
    out_of_it = _numbers_of(episodes, held)
    rest = [number for number in range(len(episodes)) if number not in set(out_of_it)]
    return Material(
        learning=whole.of_episodes(rest),
        choosing=whole.of_episodes(out_of_it[::2]),
        judging=whole.of_episodes(out_of_it[1::2] or out_of_it),
        description={
            "path": str(folder.resolve()),
            "episodes": len(episodes),
            "frames": episodes.frame_count,
            "held_out": [episode.name for episode in held],
            "sha256": episodes_identity(episodes),
        },
    )


def _numbers_of(episodes: Episodes, some: Episodes) -> list[int]:
    wanted = {id(episode) for episode in some}
    return [number for number, episode in enumerate(episodes) if id(episode) in wanted]


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ExportError(f"--timesteps {text!r}: expected numbers such as 99,50") from None
