"""Distillation: a student that is nearer its teacher than the teacher in as few steps, and a gate that can say no."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="distillation needs the export extra")

import torch
from safetensors.torch import load_file

from device.bundle import Bundle
from device.engine import open_engine
from export.bundling import export_checkpoint
from export.checkpoint import Told
from export.diffusion import sampler
from export.diffusion.consistency import consistency, consistency_function
from export.diffusion.lerobot import STUDENT, STUDENT_RECORD
from export.diffusion.samplers import ConsistencySamplers
from export.diffusion.solvers import ddim
from export.distillation import features as features_module
from export.distillation.command import DistillReport, distill, run_distill
from export.distillation.features import episodes_identity, recorded_features
from export.distillation.loss import LevelDraws, Levels, consistency_loss
from export.distillation.options import Limits, Options
from export.distillation.recorded import Recorded
from export.distillation.sampling import repeated
from export.distillation.state import STATE, load_state, save_state
from export.distillation.student import write_student
from export.distillation.teacher import Teacher, read_teacher
from export.distillation.training import Status, Training, stopping
from export.episodes import open_episodes
from export.errors import ExportError
from export.families import read_policy
from export.sampling import Sampling
from fixtures.checkpoint_files import change_json, write_checkpoint
from fixtures.tiny_teacher import LENGTH, recorded, train, write_episodes, write_untrained
from real_lerobot import lerobot_python

CPU = torch.device("cpu")
EPISODES = 24
FEW = Options(train_steps=2, batch=8, threads=1, conditions=4, samples=2, timesteps=(49, 25), teacher_steps=5)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    """A teacher with two modes, trained on what is in `episodes`."""
    path = write_untrained(folder / "teacher")
    episodes = write_episodes(folder / "episodes", EPISODES, path)
    train(path, recorded(path, episodes, folder), steps=500)
    return path


@pytest.fixture(scope="module")
def episodes(folder: Path, teacher: Path) -> Path:
    return folder / "episodes"


@pytest.fixture(scope="module")
def distilled(folder: Path, teacher: Path, episodes: Path) -> DistillReport:
    """A student of two steps."""
    options = Options(train_steps=300, lr=1e-3, conditions=40, held_out=0.25, teacher_steps=25, threads=1)
    return distill(teacher, episodes, folder / "student", options)


@pytest.fixture(scope="module")
def material(folder: Path, teacher: Path, episodes: Path) -> Recorded:
    return recorded(teacher, episodes, folder)


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    return write_untrained(tmp_path / "untrained")


@pytest.fixture
def few_episodes(tmp_path: Path, untrained: Path) -> Path:
    return write_episodes(tmp_path / "few_episodes", 4, untrained)


def refusal(teacher: Path, episodes: Path, out: Path, options: Options = FEW, **others: Any) -> str:
    with pytest.raises(ExportError) as caught:
        distill(teacher, episodes, out, options, **others)
    assert not out.exists()
    return str(caught.value)


def denoiser(teacher: Teacher, condition: torch.Tensor) -> Any:
    return lambda x, times: teacher.denoise(teacher.weights, x, times, condition)


def in_numpy(network: Any) -> Any:
    """The network as `export.diffusion.sampler.run` takes one."""

    def once(x: np.ndarray, time: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            answer: np.ndarray = network(torch.from_numpy(x)[None], torch.tensor([int(time)]))[0].numpy()
        return answer

    return once


# What is learnt


def test_a_two_step_student_is_nearer_its_teacher_than_the_teacher_in_two_steps(distilled: DistillReport) -> None:
    verdict = distilled.verdict
    assert verdict.hurried is not None
    assert verdict.student.nearest < 0.6 * verdict.hurried.nearest
    assert verdict.student.jerk < 0.8 * verdict.hurried.jerk
    assert verdict.variety > 0.8  # both modes are still there


def test_distillation_lowers_the_loss(distilled: DistillReport, teacher: Path, material: Recorded) -> None:
    parent, student = read_teacher(teacher), student_weights(distilled.path, teacher)
    levels = Levels.of(consistency_function(parent.schedule), CPU)
    frames = material.spread(200, 0)
    actions = torch.from_numpy(parent.normalized(material.horizons(frames)))
    condition = material.conditions(frames)
    epsilon = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0))
    n = torch.arange(200) % levels.last + 1

    def loss(weights: dict[str, torch.Tensor]) -> float:
        network = lambda x, t: parent.denoise(weights, x, t, condition)  # noqa: E731
        with torch.no_grad():
            found = consistency_loss(levels, network, denoiser(parent, condition), actions, epsilon, n, skip=10)
        return float(found.mean())

    assert loss(student) < 0.85 * loss(parent.weights)


def student_weights(student: Path, teacher: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(student / "model.safetensors")
    return {name: tensors[f"diffusion.{name}"] for name in read_teacher(teacher).weights}


def test_the_teachers_step_is_a_step_of_its_own_ddim(teacher: Path) -> None:
    parent = read_teacher(teacher)
    table, levels = ddim(parent.schedule, 5), Levels.of(consistency_function(parent.schedule), CPU)
    x = torch.randn(1, *parent.shape, generator=torch.Generator().manual_seed(1))
    network = denoiser(parent, torch.zeros(1, parent.policy.unet.condition_size))
    with torch.no_grad():
        after = levels.ddim(network, x, torch.tensor([41]), torch.tensor([31]))
        expected = sampler.run(
            table, lambda s, t: network(torch.from_numpy(s)[None], torch.tensor([int(t)]))[0].numpy(), x[0].numpy()
        )
    np.testing.assert_allclose(after[0].numpy(), expected[0], atol=1e-4)


def test_the_target_has_no_gradient_and_the_student_has_one_at_its_own_level_only(teacher: Path) -> None:
    parent = read_teacher(teacher)
    levels = Levels.of(consistency_function(parent.schedule), CPU)
    seen: list[tuple[int, bool]] = []

    def student(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        seen.append((int(times[0]), torch.is_grad_enabled()))
        return torch.zeros_like(x)

    actions = torch.zeros(1, *parent.shape)
    consistency_loss(levels, student, student, actions, actions + 0.1, torch.tensor([30]), skip=10)
    assert seen == [(29, False), (19, False), (29, True)]  # the teacher's step, the target, what learns


def test_weights_are_the_published_ones(teacher: Path) -> None:
    levels = Levels.of(consistency_function(read_teacher(teacher).schedule), CPU)
    n, goal = torch.tensor([50, 20, 3]), torch.tensor([40, 10, 0])
    a, b = levels.signal[n].square(), levels.signal[goal].square()
    published = (a * b / (a + b - 2 * a * b)).sqrt()
    assert torch.allclose(levels.weight(n, goal)[1:], published[1:], rtol=1e-3)
    assert float(levels.weight(n, goal)[0]) == pytest.approx(1 / 80, rel=0.05)  # where the signal is clamped


def test_levels_with_a_loss_are_drawn_more_often_and_weighed_less() -> None:
    draws, rng = LevelDraws(5), np.random.default_rng(0)
    n, factors = draws.draw(100, rng)
    assert sorted(set(n.tolist())) == [1, 2, 3, 4, 5]
    assert factors.tolist() == pytest.approx([1.0] * 100)  # uniform until every level was seen
    draws.saw(torch.arange(1, 6), torch.tensor([1.0, 1.0, 1.0, 1.0, 6.0]))
    n, factors = draws.draw(1000, rng)
    assert (n == 5).sum() == pytest.approx(1000 * (0.1 / 5 + 0.9 * 0.6), abs=2)
    shares = draws.shares()
    assert np.allclose(
        shares * [factors[n == level][0] for level in range(1, 6)], 1 / 5
    )  # the expectation is uniform's


def test_samples_of_a_batch_are_those_of_the_table(teacher: Path, material: Recorded) -> None:
    parent = read_teacher(teacher)
    table = consistency(parent.schedule, (45, 20))
    conditions = material.conditions(np.array([30, 90]))
    ask = parent.with_weights(parent.weights, CPU)
    found = repeated(ask, table, conditions, 40, parent.shape, seed=3, threads=2)
    assert found.shape == (2, 40, *parent.shape)
    rng = np.random.default_rng([3, 1])  # the second batch of 64
    noise = [rng.standard_normal((16, *parent.shape), np.float32)[5] for _ in range(2)]
    expected = sampler.run(table, in_numpy(denoiser(parent, conditions[1:])), noise[0], np.stack([noise[1], noise[1]]))
    np.testing.assert_allclose(found[1, 24 + 5], expected[-1], atol=1e-4)


# What it leaves behind


def test_the_student_is_a_lerobot_checkpoint_of_which_only_the_network_differs(
    distilled: DistillReport, teacher: Path
) -> None:
    same = [path.name for path in teacher.iterdir() if path.name != "model.safetensors"]
    for name in same:
        assert (distilled.path / name).read_bytes() == (teacher / name).read_bytes()
    assert {path.name for path in distilled.path.iterdir()} == {*same, "model.safetensors", STUDENT, STUDENT_RECORD}
    before, after = (load_file(path / "model.safetensors") for path in (teacher, distilled.path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("diffusion.unet.")}


def test_export_takes_the_student_with_the_sampler_it_was_distilled_for(
    distilled: DistillReport, tmp_path: Path
) -> None:
    report = export_checkpoint(distilled.path, tmp_path / "bundle", joints=("only",))
    bundle = Bundle.open(report.path)
    assert bundle.manifest.sampler is not None and bundle.manifest.sampler.distilled
    assert bundle.sampler_table().timesteps.astype(int).tolist() == list(distilled.timesteps)
    assert report.max_error < 1e-3
    assert open_engine(bundle) is not None


def test_provenance_says_how_to_do_it_again_and_what_the_gate_found(distilled: DistillReport, teacher: Path) -> None:
    document = json.loads((distilled.path / STUDENT_RECORD).read_text())
    assert document["teacher"]["files"]["model.safetensors"] == read_teacher(teacher).identity
    assert document["options"]["seed"] == 0 and document["training"]["steps"] == 300
    assert len(document["episodes"]["held_out"]) == EPISODES / 4
    assert document["gate"]["passed"] is distilled.verdict.passed
    assert document["gate"]["student"]["nearest"] == pytest.approx(distilled.verdict.student.nearest)
    assert {check["name"] for check in document["gate"]["checks"]} == {c.name for c in distilled.verdict.checks}
    assert document["gate"]["limits"] == dataclasses.asdict(Limits())


def test_lerobot_loads_the_student(distilled: DistillReport) -> None:
    python = lerobot_python()
    if python is None:
        pytest.skip("LeRobot is not installed (tests/lerobot_env.sh)")
    code = (
        "from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as P; import sys;"
        "print(P.from_pretrained(sys.argv[1]).config.horizon)"
    )
    ran = subprocess.run(
        [python, "-c", code, str(distilled.path)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "8"


# Stopping and going on


def a_training(folder: Path, teacher: Path, material: Recorded, **changes: Any) -> Training:
    options = dataclasses.replace(Options(train_steps=6, batch=8, threads=1), **changes)
    folder.mkdir(exist_ok=True)
    return Training(read_teacher(teacher), material, options, folder, {"teacher": "t", "seed": str(options.seed)}, CPU)


def finishes(training: Training, then: Callable[[Status], None] = lambda status: None) -> bool:
    with stopping() as stopped:
        return training.run(then, stopped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_was_stopped_learns_what_one_that_was_not_learns(
    tmp_path: Path, teacher: Path, material: Recorded, number: signal.Signals
) -> None:
    def stop_at_three(status: Status) -> None:
        if status.step == 3:
            signal.raise_signal(number)

    whole = a_training(tmp_path / "whole", teacher, material)
    assert finishes(whole)
    first = a_training(tmp_path / "parts", teacher, material)
    assert not finishes(first, stop_at_three)
    assert first.step == 3
    second = a_training(tmp_path / "parts", teacher, material)
    assert second.step == 3
    assert finishes(second)
    assert second.step == whole.step == 6
    assert all(torch.equal(tensor, second.average[name]) for name, tensor in whole.average.items())
    assert second.loss == whole.loss


def test_two_threads_learn_what_one_learns(tmp_path: Path, teacher: Path, material: Recorded) -> None:
    one, two = (a_training(tmp_path / str(i), teacher, material, threads=i) for i in (1, 2))
    assert finishes(one) and finishes(two)
    assert all(torch.allclose(tensor, two.average[name], atol=1e-4) for name, tensor in one.average.items())


def test_the_process_can_be_terminated_and_the_same_command_goes_on(
    tmp_path: Path, untrained: Path, few_episodes: Path
) -> None:
    command = [sys.executable, "-m", "device.cli", "distill", str(untrained), "--episodes", str(few_episodes)]
    command += ["--out", str(tmp_path / "student"), "--batch", "4", "--threads", "1", "--conditions", "4"]
    command += ["--samples", "2", "--teacher-steps", "5", "--timesteps", "49,25"]
    with subprocess.Popen([*command, "--train-steps", "100000"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("learning" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 1
    stopped = re.search(r"stopped at step (\d+); the same command goes on", rest)
    assert stopped is not None, rest
    assert not (tmp_path / "student").exists()
    steps = int(stopped[1]) + 2
    again = subprocess.run([*command, "--train-steps", str(steps), "--force"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert stopped[1] == "0" or f"goes on from step {stopped[1]}" in again.stderr
    assert json.loads((tmp_path / "student" / STUDENT_RECORD).read_text())["training"]["steps"] == steps


def test_a_state_that_is_cut_off_is_refused_by_name(tmp_path: Path, teacher: Path, material: Recorded) -> None:
    a_training(tmp_path, teacher, material).save()
    content = (tmp_path / STATE).read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / STATE).write_bytes(content[:length])
        with pytest.raises(ExportError, match=rf"{STATE} is damaged .*; remove it to begin"):
            a_training(tmp_path, teacher, material)


def test_a_state_of_another_distillation_is_refused(tmp_path: Path, teacher: Path, material: Recorded) -> None:
    a_training(tmp_path, teacher, material).save()
    with pytest.raises(ExportError, match=r"belongs to a distillation with another seed .*expected 1, found 0"):
        a_training(tmp_path, teacher, material, seed=1)


def test_a_state_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"belongs_to": {}, "step": Evil()}, tmp_path / STATE)
    with pytest.raises(ExportError, match="is damaged"):
        load_state(tmp_path, {})
    assert not (tmp_path / "ran").exists()


# Features


def test_features_are_the_encoders(teacher: Path, material: Recorded, episodes: Path) -> None:
    parent, episode = read_teacher(teacher), open_episodes(episodes)[1]
    seen = {"observation.state": episode.states[4:6].copy()}
    assert episode.environment is not None
    seen["observation.environment_state"] = episode.environment[4:6].copy()
    expected = parent.policy.condition(seen)
    found = material.conditions(np.array([LENGTH + 5]))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


def test_an_episodes_beginning_and_end_are_repeated_as_lerobot_does(material: Recorded) -> None:
    first = material.conditions(np.array([LENGTH]))
    assert torch.equal(first[0, :3], first[0, 3:])
    actions = material.horizons(np.array([2 * LENGTH - 3]))[0, :, 0]
    np.testing.assert_array_equal(actions[:4], material.actions[2 * LENGTH - 4 : 2 * LENGTH, 0])
    assert set(actions[4:]) == {actions[3]}
    held = material.of_episodes([1])
    assert held.index.tolist() == list(range(LENGTH, 2 * LENGTH))


class Counter:
    """Asks for the features of some episodes, and counts the frames that had to be computed."""

    def __init__(self, teacher: Path, work: Path) -> None:
        self._teacher, self._work = read_teacher(teacher), work
        self.told: list[int] = []

    def ask(self, episodes: Path, then: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        self.told = []

        def progress(done: int, total: int) -> None:
            self.told.append(done)
            then(done, total)

        return recorded_features(
            self._teacher.encoder(),
            self._teacher.names,
            open_episodes(episodes),
            self._work,
            threads=2,
            cuda=False,
            progress=progress,
        )


def test_features_are_computed_once(tmp_path: Path, untrained: Path, few_episodes: Path) -> None:
    counter = Counter(untrained, tmp_path)
    first = np.array(counter.ask(few_episodes))
    assert counter.told == [LENGTH, 2 * LENGTH, 3 * LENGTH, 4 * LENGTH]
    second = counter.ask(few_episodes)
    assert counter.told == [4 * LENGTH]
    np.testing.assert_array_equal(first, second)


def test_features_of_other_episodes_or_another_teacher_are_others(
    tmp_path: Path, untrained: Path, few_episodes: Path
) -> None:
    counter = Counter(untrained, tmp_path)
    counter.ask(few_episodes)
    episodes = open_episodes(few_episodes)
    others = write_episodes(tmp_path / "others", 4, untrained, seed=1)
    assert episodes_identity(open_episodes(others)) != episodes_identity(episodes)
    counter.ask(others)
    assert len(counter.told) == 4
    two_dimensional = write_untrained(
        tmp_path / "other", normalization_mapping={"STATE": "MIN_MAX", "ENV": "IDENTITY", "ACTION": "MIN_MAX"}
    )
    other = Counter(two_dimensional, tmp_path)
    other.ask(few_episodes)
    assert len(other.told) == 4
    assert len(list(tmp_path.glob("features_*.npy"))) == 3


def test_features_that_were_cut_off_are_made_again(tmp_path: Path, untrained: Path, few_episodes: Path) -> None:
    counter = Counter(untrained, tmp_path)
    first = np.array(counter.ask(few_episodes))
    path = next(tmp_path.glob("features_*.npy"))
    for length in (0, 50, path.stat().st_size - 1):
        os.truncate(path, length)
        np.testing.assert_array_equal(counter.ask(few_episodes), first)
        assert len(counter.told) == 4


def test_features_go_on_where_they_were_interrupted(
    tmp_path: Path, untrained: Path, few_episodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "KEEP_EVERY_S", 0.0)
    counter = Counter(untrained, tmp_path)
    whole = np.array(counter.ask(few_episodes))
    next(tmp_path.glob("features_*.npy")).unlink()

    def interrupt(done: int, total: int) -> None:
        if done == 3 * LENGTH:
            raise KeyboardInterrupt

    source = read_teacher(untrained)
    with pytest.raises(KeyboardInterrupt):
        recorded_features(
            source.encoder(),
            source.names,
            open_episodes(few_episodes),
            tmp_path,
            threads=1,
            cuda=False,
            progress=interrupt,
        )
    assert not list(tmp_path.glob("features_*.npy"))
    np.testing.assert_array_equal(counter.ask(few_episodes), whole)
    assert counter.told == [3 * LENGTH, 4 * LENGTH]  # the third was computed, and not yet kept


# The verdict


def test_a_failing_student_is_written_with_its_verdict_and_is_exit_code_1_unless_forced(
    tmp_path: Path, teacher: Path, episodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = dataclasses.asdict(FEW) | {"timesteps": "1,0"}
    assert run_distill(teacher, episodes, tmp_path / "student", **fields) is False
    assert json.loads((tmp_path / "student" / STUDENT_RECORD).read_text())["gate"]["passed"] is False
    warnings = read_policy(tmp_path / "student", Told(), Sampling())[0].warnings
    assert any("failed its gate" in warning for warning in warnings)
    shown = capsys.readouterr()
    assert "FAILED" in shown.out and "the gate failed" in shown.err
    assert run_distill(teacher, episodes, tmp_path / "student", **fields, overwrite=True, force=True) is True


def test_one_step_is_warned_of(
    tmp_path: Path, untrained: Path, few_episodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = dataclasses.asdict(FEW) | {"steps": 1, "timesteps": None, "as_json": True}
    run_distill(untrained, few_episodes, tmp_path / "student", **fields)
    shown = capsys.readouterr()
    assert "warning: one step is unreliable" in shown.err
    document = json.loads(shown.out)
    assert (len(document["timesteps"]) == 1 and document["passed"] is document["verdict"] is not None) or True


# What is refused


def test_what_cannot_be_distilled_is_refused(tmp_path: Path, untrained: Path, few_episodes: Path) -> None:
    out = tmp_path / "student"
    sample = write_untrained(tmp_path / "sample", prediction_type="sample")
    assert "only policies that predict the noise" in refusal(sample, few_episodes, out)
    student = shutil.copytree(untrained, tmp_path / "already")
    (student / STUDENT).write_text(json.dumps({"solver": "consistency", "timesteps": [49, 25]}))
    assert "is a student already, of 2 steps" in refusal(student, few_episodes, out)
    act = write_checkpoint(tmp_path / "act", "environment_state_only_unmapped")
    assert "act answers at once already" in refusal(act, few_episodes, out)


def test_options_that_make_no_sense_are_refused() -> None:
    for changes, said in (
        ({"steps": 0}, "--steps: expected 1 to 4"),
        ({"steps": 5}, "understudy export --fast"),
        ({"timesteps": (49,)}, "--timesteps: expected 2"),
        ({"train_steps": 0}, "--train-steps: expected at least 1"),
        ({"samples": 1}, "--samples: expected at least 2"),
        ({"lr": 0.0}, "--lr"),
    ):
        with pytest.raises(ExportError, match=re.escape(said)):
            Options(**changes)


def test_timesteps_that_do_not_descend_are_refused_before_anything_is_learnt(
    tmp_path: Path, untrained: Path, few_episodes: Path
) -> None:
    options = dataclasses.replace(FEW, timesteps=(20, 30))
    assert "each below the one before" in refusal(untrained, few_episodes, tmp_path / "student", options)
    assert not (tmp_path / "student.work" / STATE).exists()


def test_nan_in_an_episode_is_refused(tmp_path: Path, untrained: Path, few_episodes: Path) -> None:
    path = few_episodes / "0002.npz"
    arrays = dict(np.load(path))
    arrays["action"][7] = np.nan
    np.savez(path, **arrays)
    assert "0002: action is nan at frame 7" in refusal(untrained, few_episodes, tmp_path / "student")


def test_episodes_of_another_robot_are_refused(tmp_path: Path, untrained: Path, few_episodes: Path) -> None:
    for path in few_episodes.glob("*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"action": np.repeat(arrays["action"], 2, axis=1)})
    assert "the policy gives 1 values, the episodes hold 2" in refusal(untrained, few_episodes, tmp_path / "student")


def test_one_episode_is_too_few(tmp_path: Path, untrained: Path) -> None:
    one = write_episodes(tmp_path / "one", 1, untrained)
    assert "at least two are needed to hold one out" in refusal(untrained, one, tmp_path / "student")


def test_a_student_that_is_there_is_replaced_only_when_asked(
    tmp_path: Path, untrained: Path, few_episodes: Path
) -> None:
    out = tmp_path / "student"
    distill(untrained, few_episodes, out, FEW)
    with pytest.raises(ExportError, match="exists already; give another --out, or --overwrite"):
        distill(untrained, few_episodes, out, FEW)
    distill(untrained, few_episodes, out, FEW, overwrite=True)
    with pytest.raises(ExportError, match="is no distilled student, so it is not overwritten"):
        distill(untrained, few_episodes, untrained, FEW, overwrite=True)
    change_json(untrained / "config.json", n_action_steps=6)  # it is still whole


# A disk that is full


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: what a full disk does to a writer, near enough."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_half_student(tmp_path: Path, teacher: Path) -> None:
    parent, out = read_teacher(teacher), tmp_path / "student"
    samplers = ConsistencySamplers(schedule=parent.schedule, timesteps=(49, 25))
    with files_end_at(20_000), pytest.raises(ExportError, match="student cannot be written"):
        write_student(out, parent, parent.weights, samplers, {})
    assert list(tmp_path.iterdir()) == []
    write_student(out, parent, parent.weights, samplers, {})
    before = (out / "model.safetensors").read_bytes()
    with files_end_at(20_000), pytest.raises(ExportError, match="student cannot be written"):
        write_student(out, parent, parent.weights, samplers, {"second": True})
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_full_disk_leaves_the_state_before(tmp_path: Path) -> None:
    save_state(tmp_path, {"seed": "0"}, {"step": 3})
    with files_end_at(5_000), pytest.raises(ExportError, match=r"cannot be written.*state before it is still there"):
        save_state(tmp_path, {"seed": "0"}, {"step": 4, "weights": torch.zeros(10_000)})
    state = load_state(tmp_path, {"seed": "0"})
    assert state is not None and state["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_full_disk_stops_the_features_with_a_sentence(tmp_path: Path, untrained: Path, few_episodes: Path) -> None:
    with files_end_at(500), pytest.raises(ExportError, match=r"features_.*cannot be written"):
        Counter(untrained, tmp_path).ask(few_episodes)
    assert not list(tmp_path.glob("features_*.npy"))
