"""The sweep: each way of sampling is measured against the full schedule with the same noise, and judged by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the sweep is part of the export extra")

from device.bundle import STATE
from export.diffusion.samplers import ConsistencySamplers
from export.distillation.teacher import read_teacher
from export.episodes import Sample
from export.errors import ExportError
from export.sampling import MIN_STEPS
from export.sweep import SweepReport, Way, in_units, sweep
from export.sweep_report import FIGURES, PICTURE, recommendation, run_sweep
from export.units import TrainedIn
from fixtures.checkpoint_files import write_checkpoint
from fixtures.tiny_teacher import recorded, train, write_episodes, write_untrained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the episodes that it was trained on."""
    folder = tmp_path_factory.mktemp("sweep")
    checkpoint = write_untrained(folder / "teacher")
    episodes = write_episodes(folder / "episodes", 8, checkpoint)
    (folder / "work").mkdir()
    train(checkpoint, recorded(checkpoint, episodes, folder / "work"), steps=400)
    return checkpoint, episodes


@pytest.fixture(scope="module")
def found(trained: tuple[Path, Path]) -> SweepReport:
    return sweep(*trained, steps=(2, 5, 10, 25, 50), solvers=("ddim", "dpmpp"), observations=16)


def way(found: SweepReport, name: str) -> Way:
    return next(way for way in found.ways if way.name == name)


def test_the_full_schedule_is_the_measure_and_the_checkpoints_own_way_comes_first(found: SweepReport) -> None:
    own, full = found.ways[:2]
    assert (own.solver, own.steps) == ("ddpm", 50)
    assert (full.solver, full.steps, full.error, full.error_p95) == ("ddim", 50, 0.0, 0.0)
    assert {way.steps for way in found.ways[2:]} == {2, 5, 10, 25}, "the full schedule is not swept again"
    assert {(way.solver, way.spacing) for way in found.ways[2:]} == {
        (solver, spacing) for solver in ("ddim", "dpmpp") for spacing in ("leading", "trailing")
    }


def test_more_steps_come_closer_to_the_full_schedule(found: SweepReport) -> None:
    few, some, many = (way(found, f"ddim-{steps} leading") for steps in (2, 10, 25))
    assert few.error > some.error > many.error > 0
    assert few.jerk > 2 * found.ways[1].jerk
    assert few.milliseconds < many.milliseconds


def test_what_is_recommended_has_nothing_spoken_against_it(found: SweepReport) -> None:
    best = found.ways[found.recommended]
    assert best.objection is None and best.steps >= MIN_STEPS
    assert all(way.objection for way in found.ways[2:] if MIN_STEPS <= way.steps < best.steps)
    assert "not distilled" in str(way(found, "ddim-2 leading").objection)
    assert f"--solver {best.solver} --steps {best.steps} --spacing {best.spacing}" in recommendation(found)


def test_a_policy_that_no_shortcut_serves_keeps_its_own_sampling(trained: tuple[Path, Path]) -> None:
    found = sweep(*trained, steps=(2, 3), observations=8)
    assert found.recommended == 0
    assert "own sampling" in recommendation(found)


def test_a_person_gets_a_table_a_picture_and_figures(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = {"steps": "5,10", "dpmpp": False, "observations": 4, "threads": 1}
    run_sweep(*trained, **options, report=tmp_path / "out", as_json=False)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "ddim-5 leading" in printed and "demonstrations" in printed and "recommended" in printed
    assert "…" not in printed, "nothing is cut off in a terminal of 80 columns"
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / FIGURES).read_text())["observations"] == 4
    run_sweep(*trained, **options, report=tmp_path / "out", as_json=True)  # type: ignore[arg-type]
    assert len(json.loads(capsys.readouterr().out)["ways"]) == 6


def test_what_cannot_be_swept_is_refused_by_name(trained: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, episodes = trained
    with pytest.raises(ExportError, match="act answers at once"):
        sweep(write_checkpoint(tmp_path / "act", "plain"), episodes)
    student = write_untrained(tmp_path / "student")
    schedule = read_teacher(checkpoint).schedule
    (student / "sampler.json").write_text(
        json.dumps(ConsistencySamplers(schedule=schedule, timesteps=(49, 25)).document())
    )
    with pytest.raises(ExportError, match="is distilled"):
        sweep(student, episodes)
    with pytest.raises(ExportError, match="--steps 'five'"):
        run_sweep(
            checkpoint,
            episodes,
            steps="five",
            dpmpp=False,
            observations=4,
            threads=1,
            report=tmp_path,
            as_json=True,
        )
    with pytest.raises(ExportError, match="nowhere"):
        sweep(checkpoint, tmp_path / "nowhere")


def test_what_was_recorded_in_radians_is_judged_in_degrees() -> None:
    seen = {
        STATE: np.array([[0.1, 0.5], [0.2, 0.6]], np.float32),
        "observation.images.top": np.zeros((2, 4, 4, 3), np.uint8),
    }
    sample = Sample("episode", 3, seen, actions=np.array([[1.0, 0.2], [2.0, 0.4]], np.float32), recorded=2)
    turned = in_units(sample, np.array([180 / np.pi, 100.0]))
    np.testing.assert_allclose(turned.observation[STATE], [[5.729578, 50], [11.459156, 60]], rtol=1e-6)
    np.testing.assert_allclose(turned.actions, [[57.29578, 20], [114.59156, 40]], rtol=1e-6)
    assert turned.actions.dtype == turned.observation[STATE].dtype == np.float32
    assert sample.actions[0, 0] == 1.0, "the recording stays what it is"


def test_units_that_cannot_be_told_apart_are_refused(trained: tuple[Path, Path]) -> None:
    with pytest.raises(ExportError, match="the state has 2 values and the action 1"):
        sweep(*trained, steps=(5,), observations=4, joints=["swing"], units=TrainedIn.radians)
