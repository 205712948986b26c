"""Checkpoints of the original ACT repository: numbers equal to its network's, and a question for what it leaves out."""

from __future__ import annotations

import math
import pickle
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
from firmware_bridge.calibration import Unit
from fixtures.original_act_files import make_policy, make_statistics, observe, write_folder
from original_act_model import DetrVae, Policy, answer

ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
JOINTS = [f"{side}_{joint}" for side in ("left", "right") for joint in ARM]
DEGREES = 180 / math.pi
FACTORS = np.array([100.0 if joint.endswith("gripper") else DEGREES for joint in JOINTS])
SIZE = (64, 96)
TOLERANCE = 1e-3  # joint units
TOLD = {
    "joints": JOINTS,
    "cameras": ["top", "left_wrist"],
    "image_size": SIZE,
    "rate_hz": 50,
    "units": TrainedIn.radians,
}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder that goes at once: checkpoints are large, and pytest keeps its own for days."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make_policy(DetrVae(cameras=2))


@pytest.fixture
def saved(policy: Policy, scratch: Path) -> Path:
    return write_folder(scratch / "run", policy, make_statistics())


def run(bundle: Path, seen: dict[str, Any], factors: np.ndarray = FACTORS) -> np.ndarray:
    """The bundle's answer; qpos is given in the bundle's units."""
    engine = open_engine(Bundle.open(bundle))
    engine.inputs["observation.state"][...] = seen["qpos"] * factors
    for name, picture in seen.items():
        if name != "qpos":
            engine.inputs[f"observation.images.{name}"][...] = picture
    return engine.infer()


def original(policy: Policy, statistics: dict[str, Any], seen: dict[str, Any]) -> np.ndarray:
    return answer(policy, statistics, seen["qpos"], [picture for name, picture in seen.items() if name != "qpos"])


def refusal(checkpoint: Path, **changes: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, checkpoint.parent / "refused", **(TOLD | changes))
    assert not (checkpoint.parent / "refused").exists()
    return str(caught.value)


# What the repository computes


@pytest.mark.parametrize("cameras", [["top"], ["top", "left_wrist"], ["top", "left_wrist", "right_wrist"]])
def test_the_bundle_gives_the_original_networks_actions_in_degrees(
    cameras: list[str], scratch: Path, parity: Parity
) -> None:
    policy, statistics, seen = make_policy(DetrVae(len(cameras))), make_statistics(), observe(cameras, SIZE)
    folder = write_folder(scratch / "run", policy, statistics)
    report = export_checkpoint(folder, scratch / "bundle", **(TOLD | {"cameras": cameras}))
    expected = original(policy, statistics, seen) * FACTORS
    assert np.ptp(expected, axis=0).max() > 5, "the reference moves"
    difference = run(report.path, seen) - expected
    assert parity("ACT, the original", "its network written anew", f"{len(cameras)} cameras", difference) < TOLERANCE
    assert report.nodes < 500


def test_forks_with_a_backbone_for_each_camera_are_told_by_their_tensors(scratch: Path) -> None:
    cameras = ["top", "left_wrist"]
    policy, statistics, seen = make_policy(DetrVae(2, backbones=2)), make_statistics(), observe(cameras, SIZE)
    folder = write_folder(scratch / "run", policy, statistics)
    report = export_checkpoint(folder, scratch / "bundle", **TOLD)
    expected = original(policy, statistics, seen) * FACTORS
    assert np.abs(run(report.path, seen) - expected).max() < TOLERANCE
    swapped = run(report.path, seen | {"top": seen["left_wrist"], "left_wrist": seen["top"]})
    assert np.abs(swapped - expected).max() > 100 * TOLERANCE, "the order of cameras matters here"
    assert "trained with 2 cameras, but --cameras names 1" in refusal(folder, cameras=["top"])


VARIANTS: dict[str, dict[str, Any]] = {
    "pre_norm": {"pre_norm": True},
    "other_sizes": {"dim": 48, "feedforward": 32, "encoders": 3, "decoders": 2, "chunk": 3, "state": 7, "actions": 7},
    "one_decoder_layer": {"decoders": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_and_the_place_of_norms_are_read_off_the_tensors(variant: str, scratch: Path) -> None:
    sizes = VARIANTS[variant]
    policy, joints = make_policy(DetrVae(1, **sizes)), JOINTS[: sizes.get("actions", 14)]
    statistics, seen = make_statistics(len(joints), len(joints)), observe(["top"], SIZE, len(joints))
    folder = write_folder(scratch / "run", policy, statistics)
    report = export_checkpoint(folder, scratch / "bundle", **(TOLD | {"cameras": ["top"], "joints": joints}))
    factors = FACTORS[: len(joints)]
    found = run(report.path, seen, factors)
    assert np.abs(found - original(policy, statistics, seen) * factors).max() < TOLERANCE


def test_only_the_first_decoder_layer_has_a_say(policy: Policy, saved: Path, scratch: Path) -> None:
    before = export_checkpoint(saved, scratch / "before", **TOLD).path
    state = dict(policy.state_dict())
    for name, tensor in state.items():
        if "decoder.layers.3." in name or "is_pad_head" in name:
            state[name] = tensor + 1
    torch.save(state, saved / "policy_best.ckpt")
    after = export_checkpoint(saved, scratch / "after", **TOLD).path
    assert (before / "policy.onnx").read_bytes() == (after / "policy.onnx").read_bytes()


@pytest.mark.parametrize("protocol", range(6))
def test_statistics_of_every_pickle_protocol_are_read(policy: Policy, scratch: Path, protocol: int) -> None:
    from export.checkpoint import Told
    from export.readers.original_act import read_checkpoint

    folder = write_folder(scratch / "run", policy, make_statistics(), protocol)
    told = Told(cameras=("top",), image_size=SIZE, rate_hz=50, units="radians")
    read = read_checkpoint(folder, told)
    assert np.array_equal(read.statistics["action"]["mean"], make_statistics()["action_mean"])


# Units


def test_joints_in_radians_become_degrees_and_grippers_percent(saved: Path, scratch: Path) -> None:
    manifest = Bundle.open(export_checkpoint(saved, scratch / "bundle", **TOLD).path).manifest
    units = {joint.name: joint.unit for joint in manifest.joints}
    assert units["left_waist"] is Unit.degrees
    assert units["left_gripper"] is Unit.range_0_100


def test_what_was_trained_in_degrees_is_left_alone(policy: Policy, saved: Path, scratch: Path) -> None:
    report = export_checkpoint(saved, scratch / "bundle", **(TOLD | {"units": TrainedIn.degrees}))
    seen = observe(["top", "left_wrist"], SIZE)
    expected = original(policy, make_statistics(), seen)
    assert np.abs(run(report.path, seen, np.ones(14)) - expected).max() < TOLERANCE


def test_a_single_joint_may_have_another_unit(saved: Path, scratch: Path) -> None:
    joints = [f"{name}=range_0_100" if name == "left_gripper" else name for name in JOINTS]
    report = export_checkpoint(saved, scratch / "bundle", **(TOLD | {"joints": joints}))
    other = export_checkpoint(saved, scratch / "other", **TOLD)
    left, right = JOINTS.index("left_gripper"), JOINTS.index("right_gripper")
    golden = np.load(report.path / "golden.npz")["action"] / np.load(other.path / "golden.npz")["action"]
    assert np.allclose(golden[:, left], 1 / 100, rtol=1e-3)
    assert np.allclose(golden[:, right], 1, rtol=1e-3)


def test_a_state_that_is_not_the_joints_cannot_be_converted(scratch: Path) -> None:
    folder = write_folder(scratch / "run", make_policy(DetrVae(2, actions=16)), make_statistics(14, 16))
    message = refusal(folder, joints=[*JOINTS, "base_x", "base_turn"])
    assert "the state has 14 values and the action 16" in message


# What a bundle says


def test_the_manifest_says_what_was_told(saved: Path, scratch: Path) -> None:
    report = export_checkpoint(saved / "policy_best.ckpt", scratch / "bundle", **TOLD)
    manifest = Bundle.open(report.path).manifest
    assert [(camera.name, camera.height, camera.width) for camera in manifest.cameras] == [
        ("top", *SIZE),
        ("left_wrist", *SIZE),
    ]
    assert manifest.joint_names == tuple(JOINTS)
    assert (manifest.family, manifest.chunk_size, manifest.action_rate_hz) == ("act", 5, 50)
    assert (manifest.handoff.method, manifest.handoff.m) == ("ensemble", 0.01)
    assert set(manifest.provenance.source_files) == {"policy_best.ckpt", "dataset_stats.pkl"}
    assert manifest.provenance.source_layout == "the original ACT repository"


# What is refused


def test_what_the_file_does_not_say_is_asked_for_in_one_sentence(saved: Path) -> None:
    message = refusal(saved, cameras=None, image_size=None, rate_hz=None, units=None)
    for option in ("--cameras", "--image-size", "--rate", "--units radians"):
        assert option in message
    assert "--rate" in refusal(saved, rate_hz=None)
    assert "--cameras" not in refusal(saved, rate_hz=None)


def test_a_camera_named_twice_is_refused(saved: Path) -> None:
    assert "given twice" in refusal(saved, cameras=["top", "top"])


def test_missing_statistics_are_missed_where_they_were_looked_for(saved: Path) -> None:
    (saved / "dataset_stats.pkl").unlink()
    assert f"{saved / 'dataset_stats.pkl'} is missing" in refusal(saved)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("qpos_std", np.zeros(14, np.float32), "std is zero in element 0"),
        ("action_std", np.full(14, np.nan, np.float32), "NaN"),
        ("action_mean", np.full(14, np.inf, np.float32), "NaN or infinity"),
        ("action_mean", None, "action_mean is missing; found qpos_mean"),
        ("qpos_std", np.ones(3, np.float32), "should hold 14 values, found 3"),
        ("qpos_mean", np.zeros((2, 14), np.float32), "one row of numbers"),
        ("qpos_mean", [0.0] * 14, "found list"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(saved: Path, key: str, value: Any, says: str) -> None:
    statistics: dict[str, Any] = make_statistics() | {key: value}
    if value is None:
        del statistics[key]
    (saved / "dataset_stats.pkl").write_bytes(pickle.dumps(statistics))
    message = refusal(saved)
    assert says in message
    assert "dataset_stats.pkl" in message


def test_a_state_dict_of_something_else_is_named_by_its_tensors(saved: Path) -> None:
    torch.save({"model.diffusion.unet.weight": torch.zeros(1), "log_std": torch.zeros(1)}, saved / "policy_best.ckpt")
    message = refusal(saved)
    assert "not a policy of the original ACT: its tensors begin with model.diffusion, log_std" in message


def test_a_file_that_holds_no_tensors_by_name_is_refused(saved: Path) -> None:
    torch.save({"epoch": 3, "state": {}}, saved / "policy_best.ckpt")
    assert "found a dictionary of epoch, state" in refusal(saved)


def test_statistics_of_another_robot_do_not_fit_the_tensors(saved: Path) -> None:
    (saved / "dataset_stats.pkl").write_bytes(pickle.dumps(make_statistics(7, 7)))
    assert "should have shape" in refusal(saved, joints=JOINTS[:7])


def test_a_missing_tensor_is_refused_by_name(policy: Policy, saved: Path) -> None:
    state = dict(policy.state_dict())
    del state["model.transformer.decoder.layers.0.linear2.bias"]
    torch.save(state, saved / "policy_best.ckpt")
    assert "model.decoder.layers.0.linear2.bias is missing" in refusal(saved)


def test_a_cut_file_is_refused(saved: Path) -> None:
    raw = (saved / "policy_best.ckpt").read_bytes()
    (saved / "policy_best.ckpt").write_bytes(raw[: len(raw) // 2])
    assert "cut off or damaged" in refusal(saved)


def test_a_folder_without_the_best_policy_says_what_it_holds(saved: Path) -> None:
    (saved / "policy_best.ckpt").rename(saved / "policy_last.ckpt")
    message = refusal(saved)
    assert "policy_best.ckpt is missing" in message
    assert "policy_last.ckpt" in message
