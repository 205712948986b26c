"""Export of Consistency Policy's students: one jump or a chain of them, in both readings of the chain's times, equal to
the published sampling written again in plain PyTorch, for the same noise."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="export needs the export extra")

import torch

from conftest import Parity
from device.bundle import Bundle
from device.engine import infer_observation, open_engine
from export.bundling import ExportReport, export_checkpoint
from export.checkpoint import Told
from export.errors import ExportError
from export.families import read_policy
from export.readers.diffusion_policy import read_payload
from export.readers.hydra_config import resolve
from export.sampling import Sampling
from fixtures.diffusion_policy_files import PAYLOADS, Json, student, write_payload
from fixtures.diffusion_policy_originals import Policy, as_the_robot_gives_it, drawn, observations

RECORDED = Path(__file__).parent / "fixtures" / "consistency_policy_vectors.ckpt"
TOLERANCE = 1e-3  # joint units
TOLD = Told(rate_hz=10)
VECTORS = student({"pose": {"shape": [3]}, "grip": {"shape": [2]}})
PICTURES = student(
    {"pose": {"shape": [3]}, "front": {"shape": [3, 72, 96], "type": "rgb"}, "grip": {"shape": [2]}},
    cond_predict_scale=False,
)
BINS = {27: 12.01478, 54: 0.885024}  # noise levels of the paper's two bins, Karras et al. 2022, eq. 5


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder that goes at once."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def original(config: Json) -> Policy:
    return Policy(resolve(config, "policy"))


def save(folder: Path, config: Json, state: dict[str, Any] | None = None) -> Path:
    """A student's checkpoint: no averaged model beside it, whatever use_ema says."""
    state = original(config).state_dict() if state is None else state
    return write_payload(folder / "epoch=0450-test_mean_score=0.940.ckpt", config, state, model=state, ema_model=None)


def export(checkpoint: Path, out: Path, **sampling: Any) -> ExportReport:
    return export_checkpoint(checkpoint, out, rate_hz=10, sampling=Sampling(**sampling))


def difference(policy: Policy, report: ExportReport, levels: list[float]) -> float:
    """Largest difference of the bundle in its engine from the original that chains these noise levels."""
    bundle = Bundle.open(report.path)
    noise, steps = drawn("noise", 8, 6), drawn("chain", len(levels) + 1, 8, 6)
    seen = observations(policy, 2)
    given = as_the_robot_gives_it(policy, seen) | {"noise": noise, "step_noise": steps}
    if not levels:
        del given["step_noise"]
    action = infer_observation(open_engine(bundle), bundle.manifest, given)
    expected = policy.jump(seen, noise, list(zip(levels, steps, strict=False)))
    assert action.shape == expected.shape == (4, 6)
    assert expected.std() > 5, "actions that hardly move would hide an error"
    return float(np.abs(action - expected).max())


def refusal(checkpoint: Path, **sampling: Any) -> str:
    with pytest.raises(ExportError) as caught:
        read_policy(checkpoint, TOLD, Sampling(**sampling))
    return str(caught.value)


# What the original computes


@pytest.mark.parametrize("config", [VECTORS, PICTURES], ids=["vectors", "pictures"])
def test_one_jump_gives_the_actions_of_the_original(config: Json, scratch: Path, parity: Parity) -> None:
    report = export(save(scratch, config), scratch / "bundle")
    found = difference(original(config), report, [])
    assert parity("Consistency Policy", "its network written anew", "one jump", found) < TOLERANCE
    manifest = Bundle.open(report.path).manifest
    sampler = manifest.sampler
    assert sampler is not None
    assert (manifest.family, manifest.provenance.policy_type) == ("diffusion", "consistency_policy")
    assert (sampler.solver, sampler.steps, sampler.spacing, sampler.distilled) == ("ctm", 1, "single", True)
    assert (sampler.initial_scale, sampler.draws_noise, sampler.first_action) == (1.0, False, 1)


@pytest.mark.parametrize(
    ("letter", "sampling", "levels"),
    [
        ("D", {"chain": 3}, [27.0, 54.0]),  # as the published code does by default, whatever the paper means
        ("D", {"chain": 2}, [27.0]),
        ("D", {"chaining": "sigma"}, [27.0, 54.0]),
        ("D", {"chaining": "bins"}, [BINS[27], BINS[54]]),
        ("D", {"chain": 2, "chaining": "bins"}, [BINS[27]]),
        ("C", {"chain": 3}, [BINS[27], BINS[54]]),
        ("C", {"chain": 3, "chaining": "sigma"}, [27.0, 54.0]),
        ("C", {"chain": 1}, []),
    ],
)
def test_a_chain_gives_the_actions_of_the_original(
    letter: str, sampling: dict[str, Any], levels: list[float], scratch: Path, parity: Parity
) -> None:
    config = student(VECTORS["task"]["shape_meta"]["obs"], chaining_times=[letter, 27, 54])
    report = export(save(scratch, config), scratch / "bundle", **sampling)
    found = difference(original(config), report, levels)
    assert parity("Consistency Policy", "its network written anew", f"{letter} {sampling}", found) < TOLERANCE
    said = [warning for warning in report.warnings if "chaining times are read as" in warning]
    assert len(said) == (1 if levels else 0)
    if levels:
        read = "sigma" if levels[0] == 27 else "bins"
        assert f"read as {read}: noise of scale {levels[0]:.4g}" in said[0]
        sampler = Bundle.open(report.path).manifest.sampler
        assert sampler is not None
        assert (sampler.steps, sampler.spacing, sampler.draws_noise) == (1 + len(levels), read, True)


def test_a_checkpoint_that_dill_and_omegaconf_wrote_gives_the_actions_of_the_original(scratch: Path) -> None:
    policy = original(PAYLOADS["consistency_policy_vectors"])
    assert difference(policy, export(RECORDED, scratch / "bundle", chain=3), [27.0, 54.0]) < TOLERANCE


def test_the_checkpoints_of_these_tests_are_like_those_of_dill_and_omegaconf(scratch: Path) -> None:
    ours = read_payload(save(scratch, PAYLOADS["consistency_policy_vectors"]), TOLD)
    theirs = read_payload(RECORDED, TOLD)
    assert ours.config == theirs.config
    assert {name: tensor.shape for name, tensor in ours.weights.items()} == {
        name: tensor.shape for name, tensor in theirs.weights.items()
    }


def test_the_average_and_the_teacher_are_left_behind(scratch: Path) -> None:
    state = original(VECTORS).state_dict()
    for name in state:
        if name.startswith(("model_ema.", "teacher.")):
            state[name] = torch.full_like(state[name], torch.nan)
    assert difference(original(VECTORS), export(save(scratch, VECTORS, state), scratch / "bundle"), []) < TOLERANCE
    without = {name: tensor for name, tensor in state.items() if not name.startswith("teacher.")}
    read_policy(save(scratch, VECTORS, without), TOLD, Sampling())


# What is said, and what is refused


def test_the_densest_of_many_samples_is_not_taken_and_that_is_said(scratch: Path) -> None:
    config = student(VECTORS["task"]["shape_meta"]["obs"], use_kde=True, kde_samples=10)
    source, _ = read_policy(save(scratch, config), TOLD, Sampling())
    assert any("takes the densest; the bundle draws one" in warning for warning in source.warnings)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"solver": "ddim"}, "has no solver, steps or spacing to choose; it has --chain"),
        ({"steps": 2}, "has no solver, steps or spacing to choose; it has --chain"),
        ({"chain": 4}, "chain: expected 1 to 3 steps, found 4; the chaining times are 27, 54"),
        ({"chain": 0}, "chain: expected 1 to 3 steps, found 0"),
    ],
)
def test_what_a_student_cannot_do_is_refused(sampling: dict[str, Any], expected: str, scratch: Path) -> None:
    assert expected in refusal(save(scratch, VECTORS), **sampling)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_target_": "a.KarrasUnetHybridImagePolicy"}, "teacher is not supported: export its student"),
        ({"chaining_times": ["D", "27"]}, "chaining_times should be a letter and times"),
        ({"surprise": 1}, "cfg.policy.surprise is not supported"),
        ({"noise_scheduler": {"_target_": "consistency_policy.diffusion.PFGMPP_Scheduler"}}, "PFGMPP_Scheduler is not"),
    ],
)
def test_configurations_that_cannot_be_exported_are_named(changes: Json, expected: str, scratch: Path) -> None:
    config = VECTORS | {"policy": VECTORS["policy"] | changes}
    assert expected in refusal(save(scratch, config, original(VECTORS).state_dict()))


def test_chaining_is_not_for_other_policies(scratch: Path) -> None:
    checkpoint = Path(__file__).parent / "fixtures" / "diffusion_policy_vectors.ckpt"
    assert "chaining is Consistency Policy's" in refusal(checkpoint, chain=2)


@pytest.mark.parametrize("times", [["D", 90], ["D", 0.001], ["C", 80]])
def test_chaining_times_outside_the_schedule_are_refused(times: list[Any], scratch: Path) -> None:
    config = student(VECTORS["task"]["shape_meta"]["obs"], chaining_times=times)
    assert "chaining times: expected" in refusal(save(scratch, config), chain=2)
