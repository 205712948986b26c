"""Plain behaviour cloning: the original CNNMLP, equal to its network, and refused where it cannot be."""

from __future__ import annotations

import math
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
from device.engine import open_engine
from export.bundling import export_checkpoint
from export.errors import ExportError
from export.units import TrainedIn
from fixtures.original_act_files import make_policy, make_statistics, observe, write_folder
from original_act_model import CnnMlp, Policy, answer

JOINTS = [f"joint_{index}" for index in range(6)] + ["gripper"]
FACTORS = np.array([180 / math.pi] * 6 + [100.0])
SIZE = (416, 448)  # 13x14 cells of the ResNet, 1x2 after the convolutions
CELLS = 2
TOLERANCE = 1e-3  # joint units
TOLD = {"joints": JOINTS, "cameras": ["top", "wrist"], "image_size": SIZE, "rate_hz": 50, "units": TrainedIn.radians}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder that goes at once: checkpoints are large, and pytest keeps its own for days."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(CnnMlp(cameras=2, cells=CELLS, state=7, actions=7, hidden=64))


@pytest.fixture
def saved(policy: Policy, scratch: Path) -> Path:
    return write_folder(scratch / "run", policy, make_statistics(7, 7))


def run(bundle: Path, seen: dict[str, Any]) -> np.ndarray:
    engine = open_engine(Bundle.open(bundle))
    engine.inputs["observation.state"][...] = seen["qpos"] * FACTORS
    for name, picture in seen.items():
        if name != "qpos":
            engine.inputs[f"observation.images.{name}"][...] = picture
    return engine.infer()


def refusal(checkpoint: Path, **changes: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, checkpoint.parent / "refused", **(TOLD | changes))
    return str(caught.value)


def test_the_bundle_gives_the_original_networks_action(
    policy: Policy, saved: Path, scratch: Path, parity: Parity
) -> None:
    report = export_checkpoint(saved, scratch / "bundle", **TOLD)
    seen, statistics = observe(["top", "wrist"], SIZE, 7), make_statistics(7, 7)
    expected = answer(policy, statistics, seen["qpos"], [seen["top"], seen["wrist"]]) * FACTORS
    found = run(report.path, seen)
    assert found.shape == (1, 7)
    assert parity("Behaviour cloning (CNNMLP)", "its network written anew", "two cameras", found - expected) < TOLERANCE
    still = run(report.path, seen | {"top": np.zeros_like(seen["top"])})
    swapped = run(report.path, seen | {"top": seen["wrist"], "wrist": seen["top"]})
    for other in (still, swapped):
        assert np.abs(other - expected).max() > 100 * TOLERANCE, "each camera has a say of its own"
    assert report.nodes < 200


def test_the_repositorys_own_sizes_fit_480x640(scratch: Path) -> None:
    policy = make_policy(CnnMlp(cameras=1, cells=24))
    assert policy.state_dict()["model.mlp.0.weight"].shape == (1024, 768 + 14)
    folder = write_folder(scratch / "run", policy, make_statistics())
    joints = [f"joint_{index}" for index in range(14)]
    told = TOLD | {"joints": joints, "cameras": ["top"], "image_size": (480, 640)}
    report = export_checkpoint(folder, scratch / "bundle", **told)
    assert report.max_error < TOLERANCE
    message = refusal(folder, **(told | {"image_size": (240, 320)}))
    assert "takes 768 numbers from 1 cameras, and pictures of 240x320 give 0" in message
    assert "480x640 fits" in message


def test_the_manifest_says_that_there_is_one_action_for_now(saved: Path, scratch: Path) -> None:
    manifest = Bundle.open(export_checkpoint(saved, scratch / "bundle", **TOLD).path).manifest
    assert (manifest.family, manifest.chunk_size, manifest.action_rate_hz) == ("cloning", 1, 50)
    assert manifest.handoff.method == "latest"
    assert manifest.provenance.policy_type == "cloning"


@pytest.mark.parametrize("cameras", [["top"], ["top", "wrist", "side"]])
def test_another_number_of_cameras_than_backbones_is_refused(saved: Path, cameras: list[str]) -> None:
    assert f"trained with 2 cameras, but --cameras names {len(cameras)}" in refusal(saved, cameras=cameras)


def test_what_a_checkpoint_does_not_say_is_asked_for(saved: Path) -> None:
    message = refusal(saved, rate_hz=None, image_size=None)
    assert "--rate" in message
    assert "--image-size" in message


@pytest.mark.parametrize("name", ["model.backbone_down_projs.1.2.bias", "model.mlp.2.weight"])
def test_a_missing_tensor_is_refused_by_name(policy: Policy, saved: Path, name: str) -> None:
    state = dict(policy.state_dict())
    del state[name]
    torch.save(state, saved / "policy_best.ckpt")
    assert f"{name} is missing" in refusal(saved)


def test_a_tensor_that_is_not_finite_is_refused(policy: Policy, saved: Path) -> None:
    state = dict(policy.state_dict())
    state["model.mlp.2.bias"] = torch.full_like(state["model.mlp.2.bias"], math.nan)
    torch.save(state, saved / "policy_best.ckpt")
    assert "model.mlp.2.bias holds NaN" in refusal(saved)
