"""Export of ACT: numbers equal to LeRobot's in every variant, and a refusal with a reason for everything else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="export needs the export extra")

from conftest import Parity
from device.arrays import dump_arrays
from device.bundle import Bundle
from device.engine import open_engine
from device.errors import BundleError
from export.bundling import export_checkpoint
from export.checkpoint import Told
from export.errors import ExportError
from export.families import read_policy
from export.fidelity import prove
from export.sampling import Sampling
from firmware_bridge.calibration import Unit
from fixtures.checkpoint_files import (
    POST_STATE,
    PRE_STATE,
    change_json,
    change_step,
    change_tensors,
    tensor_shapes,
    write_checkpoint,
)
from fixtures.recipe import LEGACY, VARIANTS, observation
from real_lerobot import lerobot_python

FIXTURES = Path(__file__).parent / "fixtures"
CURRENT = np.load(FIXTURES / "act_lerobot_0_4_4.npz")
BEFORE_0_4 = np.load(FIXTURES / "act_lerobot_0_3_3.npz")
TOLERANCE = 1e-3  # joint units
SMALL = "environment_state_only_unmapped"  # no cameras: 300 kB instead of 50 MB


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder that goes at once: checkpoints are large, and pytest keeps its own for days."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def small(scratch: Path) -> Path:
    return write_checkpoint(scratch / "small", SMALL)


@pytest.fixture(scope="module")
def shared_plain() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_checkpoint(Path(folder), "plain")


@pytest.fixture
def plain(shared_plain: Path, scratch: Path) -> Path:
    """A copy of the plain two-camera checkpoint whose weights are a link, so that tests can change the rest."""
    folder = scratch / "plain"
    shutil.copytree(shared_plain, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "model.safetensors").symlink_to(shared_plain / "model.safetensors")
    return folder


def run(bundle: Path, variant: str) -> np.ndarray:
    engine = open_engine(Bundle.open(bundle))
    for name, array in observation(VARIANTS[variant]["input_features"]).items():
        engine.inputs[name][...] = array
    return engine.infer()


def refusal(checkpoint: Path, **options: object) -> str:
    out = checkpoint.parent / "refused"
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, out, **options)
    left = [path.name for path in checkpoint.parent.iterdir() if "refused" in path.name]
    assert left == [], "a refused export leaves nothing behind"
    return str(caught.value)


def places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value in a JSON document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


# What LeRobot computes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_actions_that_lerobot_gives(variant: str, scratch: Path, parity: Parity) -> None:
    report = export_checkpoint(write_checkpoint(scratch / "checkpoint", variant), scratch / "bundle")
    assert report.nodes < 500
    difference = run(report.path, variant) - CURRENT[f"{variant}/action"]
    assert parity("ACT", "LeRobot 0.4.4", variant, difference) < TOLERANCE


@pytest.mark.parametrize("variant", LEGACY)
def test_checkpoints_from_before_0_4_give_the_actions_that_lerobot_0_3_3_gives(
    variant: str, scratch: Path, parity: Parity
) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", variant, legacy=True)
    report = export_checkpoint(checkpoint, scratch / "bundle")
    difference = run(report.path, variant) - BEFORE_0_4[f"{variant}/action"]
    assert parity("ACT", "LeRobot 0.3.3", variant, difference) < TOLERANCE
    assert "before 0.4" in Bundle.open(report.path).manifest.provenance.source_layout


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tensors_that_are_expected_are_the_tensors_that_lerobot_saves(variant: str) -> None:
    listed = sorted((f"model.{name}", list(shape)) for name, shape in tensor_shapes(VARIANTS[variant]).items())
    assert hashlib.sha256(json.dumps(listed).encode()).hexdigest() == str(CURRENT[f"{variant}/keys"])


def test_half_precision_halves_the_file_and_reports_what_rounding_costs(plain: Path, scratch: Path) -> None:
    whole = export_checkpoint(plain, scratch / "whole")
    half = export_checkpoint(plain, scratch / "half", weights="fp16")
    sizes = [(report.path / "policy.onnx").stat().st_size for report in (whole, half)]
    assert sizes[1] < 0.52 * sizes[0]
    assert half.nodes < 500
    assert half.max_error < TOLERANCE, "against PyTorch with the rounded weights"
    assert half.max_rounding_error > 0
    assert whole.max_rounding_error == 0
    fidelity = Bundle.open(half.path).manifest.fidelity
    assert (fidelity.weights, fidelity.max_rounding_error) == ("fp16", half.max_rounding_error)
    off = np.abs(run(half.path, "plain") - CURRENT["plain/action"]).max()
    assert 0 < off < 1, "rounded weights stay near the original"


def test_a_checkpoint_that_lerobot_itself_saved_gives_its_actions(scratch: Path) -> None:
    recorder = [lerobot_python(), str(FIXTURES / "record_act.py"), str(scratch / "now.npz")]
    command = [*recorder, "--variant", "plain", "--save", str(scratch)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    now = np.load(scratch / "now.npz")
    assert np.abs(now["plain/action"] - CURRENT["plain/action"]).max() < TOLERANCE
    report = export_checkpoint(scratch / "plain", scratch / "bundle")
    assert np.abs(run(report.path, "plain") - now["plain/action"]).max() < TOLERANCE


# What a bundle says


def test_the_manifest_says_what_the_checkpoint_does_not(plain: Path, scratch: Path) -> None:
    (plain / "train_config.json").write_text(json.dumps({"dataset": {"repo_id": "lab/cubes"}}))
    manifest = Bundle.open(export_checkpoint(plain, scratch / "bundle", rate_hz=25).path).manifest
    assert manifest.joint_names == (
        "shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"
    )  # fmt: skip
    assert [joint.unit for joint in manifest.joints] == [*[Unit.degrees] * 5, Unit.range_0_100]
    assert [(camera.name, camera.width, camera.height) for camera in manifest.cameras] == [
        ("front", 96, 64),
        ("wrist_left", 96, 64),
    ]
    assert (manifest.action_rate_hz, manifest.chunk_size, manifest.state_size) == (25, 8, 6)
    assert (manifest.handoff.method, manifest.handoff.m) == ("ensemble", 0.01)
    assert manifest.two_state_joints == ()
    assert manifest.provenance.dataset == "lab/cubes"
    weights = hashlib.sha256((plain / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.provenance.checkpoint_sha256 == weights
    assert set(manifest.provenance.source_files) >= {"config.json", PRE_STATE, POST_STATE}


def test_the_checkpoints_own_ensemble_coefficient_is_recommended(small: Path, scratch: Path) -> None:
    change_json(small / "config.json", temporal_ensemble_coeff=0.05)
    assert Bundle.open(export_checkpoint(small, scratch / "own").path).manifest.handoff.m == 0.05
    chosen = export_checkpoint(small, scratch / "chosen", handoff="crossfade", two_state_joints=["gripper"])
    manifest = Bundle.open(chosen.path).manifest
    assert (manifest.handoff.method, manifest.handoff.m, manifest.two_state_joints) == ("crossfade", None, ("gripper",))


def test_a_renamed_camera_keeps_the_robots_name(plain: Path, scratch: Path) -> None:
    front = "observation.images.front"
    change_step(
        plain / "policy_preprocessor.json",
        "rename_observations_processor",
        rename_map={"observation.images.overhead": front},
    )
    bundle = Bundle.open(export_checkpoint(plain, scratch / "bundle").path)
    assert [camera.name for camera in bundle.manifest.cameras] == ["overhead", "wrist_left"]
    engine = open_engine(bundle)
    for name, array in observation(VARIANTS["plain"]["input_features"]).items():
        engine.inputs["observation.images.overhead" if name == front else name][...] = array
    assert np.abs(engine.infer() - CURRENT["plain/action"]).max() < TOLERANCE


def test_a_real_observation_becomes_golden_and_reference_pictures(plain: Path, scratch: Path) -> None:
    seen = observation(VARIANTS["plain"]["input_features"])
    (scratch / "seen.npz").write_bytes(dump_arrays(seen))
    report = export_checkpoint(plain, scratch / "bundle", observation=scratch / "seen.npz")
    bundle = Bundle.open(report.path)
    inputs, actions = bundle.golden()
    assert all(np.array_equal(inputs[name], seen[name]) for name in seen)
    assert np.abs(actions - CURRENT["plain/action"]).max() < TOLERANCE
    assert {"reference/front.jpg", "reference/wrist_left.jpg"} < set(bundle.manifest.files)
    (scratch / "lacking.npz").write_bytes(dump_arrays({"observation.state": seen["observation.state"]}))
    assert "front should be uint8 [64, 96, 3], found nothing" in refusal(plain, observation=scratch / "lacking.npz")


def test_names_that_torch_compile_changed_are_understood(small: Path, scratch: Path) -> None:
    head = np.ones((6, 64), np.float32)
    change_tensors(small / "model.safetensors", **{"model.action_head.weight": None})
    change_tensors(small / "model.safetensors", **{"model._orig_mod.action_head.weight": head})
    assert export_checkpoint(small, scratch / "bundle").max_error < TOLERANCE


@pytest.mark.parametrize("given", [".", "..", "pretrained_model/model.safetensors", "training_state", "../.."])
def test_a_folder_beside_the_policy_is_found_and_said(given: str, scratch: Path) -> None:
    run_folder = scratch / "run"
    policy = write_checkpoint(run_folder / "checkpoints" / "last" / "pretrained_model", SMALL)
    (policy.parent / "training_state").mkdir()
    report = export_checkpoint(policy.parent / given, scratch / "bundle")
    assert "using" in report.warnings[0]
    assert str(policy) in report.warnings[0]


# What is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.action_head.bias": None}, "model.action_head.bias is missing"),
        ({"model.surprise": np.zeros(3, np.float32)}, "model.surprise is unknown"),
        ({"model.action_head.bias": np.zeros(7, np.float32)}, "action_head.bias should have shape [6], found [7]"),
        ({"model.action_head.bias": np.full(6, np.nan, np.float32)}, "model.action_head.bias holds NaN or infinity"),
    ],
)
def test_every_tensor_is_accounted_for(changes: dict[str, np.ndarray | None], expected: str, small: Path) -> None:
    change_tensors(small / "model.safetensors", **changes)
    assert expected in refusal(small)


ZERO, NAN = np.zeros(6, np.float32), np.full(6, np.nan, np.float32)


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        (PRE_STATE, {"observation.state.q10": None}, "observation.state.q10 is missing"),
        (PRE_STATE, {"observation.state.q90": NAN}, "observation.state.q90 holds NaN or infinity"),
        (POST_STATE, {"action.q10": ZERO, "action.q90": ZERO}, "action: q90 is not above q10 in element 0"),
        (POST_STATE, {"action.q90": np.full(6, np.inf, np.float32)}, "action.q90 holds NaN or infinity"),
        (POST_STATE, {"action.q90": np.ones(5, np.float32)}, "action.q90 should hold 6 values, found 5"),
        (
            PRE_STATE,
            {f"observation.state.{key}": None for key in "mean std min max q01 q99 q10 q90".split()},  # noqa: SIM905
            "observation.state has no statistics",
        ),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(
    file: str, changes: dict[str, np.ndarray | None], expected: str, small: Path
) -> None:
    change_tensors(small / file, **changes)
    assert expected in refusal(small)


def test_a_std_of_zero_is_refused(plain: Path) -> None:
    change_tensors(plain / PRE_STATE, **{"observation.state.std": ZERO})
    assert "observation.state: std is zero in element 0" in refusal(plain)


def test_a_feature_without_statistics_passes_only_where_that_is_said(small: Path, scratch: Path) -> None:
    statistics = "mean std min max q01 q99 q10 q90".split()  # noqa: SIM905
    change_tensors(small / PRE_STATE, **{f"observation.state.{key}": None for key in statistics})
    assert "--allow-unnormalized observation.state" in refusal(small)
    export_checkpoint(small, scratch / "bundle", allow_unnormalized=["observation.state"])


def test_legacy_statistics_that_were_never_set_are_refused(scratch: Path) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", "plain", legacy=True)
    buffer = "unnormalize_outputs.buffer_action.mean"
    change_tensors(checkpoint / "model.safetensors", **{buffer: np.full(6, np.inf, np.float32)})
    assert "action.mean holds NaN or infinity" in refusal(checkpoint)
    change_tensors(checkpoint / "model.safetensors", **{buffer: None})
    assert "action.mean is missing" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": "pi0"}, "type: pi0 is not supported; supported are act"),
        ({"feedforward_activation": "glu"}, "feedforward_activation 'glu' is not supported"),
        ({"n_obs_steps": 2}, "ACT takes one observation"),
        ({"dim_model": "64"}, "dim_model should be a positive integer"),
        ({"n_encoder_layers": 10**9}, "n_encoder_layers should be a positive integer, at most 65536"),
        ({"dim_model": 62}, "62 does not divide by n_heads 4"),
        ({"input_features": None}, "input_features is missing"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [6]}}}, "neither a camera nor"),
        ({"input_features": {"observation.tactile": {"type": "STATE", "shape": [6]}}}, "observation.tactile"),
    ],
)
def test_configurations_that_act_does_not_have_are_named(
    changes: dict[str, object], expected: str, small: Path
) -> None:
    change_json(small / "config.json", **changes)
    assert expected in refusal(small)


def test_a_cameras_name_cannot_lead_out_of_the_bundle(plain: Path) -> None:
    renamed = {"observation.images.../../../evil": "observation.images.front"}
    change_step(plain / "policy_preprocessor.json", "rename_observations_processor", rename_map=renamed)
    assert "is no name of a camera" in refusal(plain)


def test_a_key_that_no_act_reads_is_a_warning(small: Path, scratch: Path) -> None:
    change_json(small / "config.json", brand_new_option=1)
    warnings = export_checkpoint(small, scratch / "bundle").warnings
    assert any("brand_new_option" in warning for warning in warnings)


def test_a_step_that_might_change_numbers_is_refused(small: Path) -> None:
    path = small / "policy_preprocessor.json"
    document = json.loads(path.read_text())
    document["steps"].append({"registry_name": "delta_action_processor", "config": {}})
    path.write_text(json.dumps(document))
    assert "step delta_action_processor is not supported" in refusal(small)


def test_damaged_and_missing_files_are_named(small: Path) -> None:
    whole = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is damaged" in refusal(small)
    (small / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(small)
    (small / "config.json").unlink()
    assert "holds no config.json" in refusal(small)


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json", "config.json"])
def test_json_of_another_structure_is_refused_and_no_defect(file: str, small: Path) -> None:
    whole = json.loads((small / file).read_text())
    for place in places(whole):
        for value in (None, True, 0.5, -1, "x", [], [1], {}, {"a": 1}, float("inf")):
            document = json.loads(json.dumps(whole))
            holder = document
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            (small / file).write_text(json.dumps(document))
            with contextlib.suppress(ExportError):
                read_policy(small, Told(), Sampling())


def test_a_missing_processor_file_is_named(small: Path) -> None:
    (small / POST_STATE).unlink()
    assert f"{POST_STATE} is missing" in refusal(small)
    (small / "policy_postprocessor.json").unlink()
    assert "policy_postprocessor.json is missing" in refusal(small)


def test_units_that_contradict_the_statistics_are_refused(small: Path) -> None:
    change_tensors(small / POST_STATE, **{"action.max": np.full(6, 130, np.float32)})
    message = refusal(small, units=Unit.range_m100_100)
    assert "joint shoulder_pan" in message
    assert "--units" in message


def test_joints_are_asked_for_where_they_cannot_be_known(small: Path) -> None:
    assert "--joints names 2 joints, but the policy has 6 actions" in refusal(small, joints=["a", "b"])
    assert "given twice" in refusal(small, joints=["a,b,c,d,e,e"])
    assert "unit 'rad' is unknown" in refusal(small, joints=["a=rad,b,c,d,e,f"])
    assert "names 'hand', which is no joint" in refusal(small, two_state_joints=["hand"])
    assert "--rate: Input should be greater than 0" in refusal(small, rate_hz=0)
    assert "Input should be 'ensemble', 'crossfade' or 'latest'" in refusal(small, handoff="sudden")


def test_options_that_would_have_no_effect_are_refused(small: Path) -> None:
    assert "leave out --cameras" in refusal(small, cameras=["front"])
    assert "leave out --image-size" in refusal(small, image_size=(48, 64))
    assert "--ensemble-m is of the ensemble" in refusal(small, handoff="latest", ensemble_m=0.1)
    assert "--advance: expected at most" in refusal(small, advance=1000)


def test_an_existing_bundle_is_replaced_only_when_asked(small: Path, scratch: Path) -> None:
    out = export_checkpoint(small, scratch / "bundle").path
    with pytest.raises(ExportError, match="exists already"):
        export_checkpoint(small, out)
    export_checkpoint(small, out, overwrite=True)
    (scratch / "empty").mkdir()
    assert Bundle.open(export_checkpoint(small, scratch / "empty").path)
    (scratch / "photos").mkdir()
    (scratch / "photos" / "cat.jpg").touch()
    with pytest.raises(ExportError, match="is no bundle"):
        export_checkpoint(small, scratch / "photos", overwrite=True)
    (scratch / "link").symlink_to(out)
    with pytest.raises(ExportError, match="is a link"):
        export_checkpoint(small, scratch / "link", overwrite=True)
    assert sorted(path.name for path in scratch.iterdir()) == ["bundle", "empty", "link", "photos", "small"]


def test_an_observation_that_is_no_npz_is_refused(small: Path, scratch: Path) -> None:
    (scratch / "seen.npz").write_text("no")
    with pytest.raises(BundleError, match=r"seen\.npz cannot be read"):
        export_checkpoint(small, scratch / "bundle", observation=scratch / "seen.npz")


def test_a_bundle_is_refused_beyond_what_rounding_does_to_pytorch_itself(plain: Path, scratch: Path) -> None:
    bundle = Bundle.open(export_checkpoint(plain, scratch / "bundle").path)
    inputs, expected = bundle.golden()
    for unsteadiness in (0.0, 1e-4):
        with pytest.raises(ExportError, match=r"differs from PyTorch by 0\.01 joint units"):
            prove(bundle.path, bundle.manifest, inputs, expected + 0.01, lambda found=unsteadiness: found)
    assert prove(bundle.path, bundle.manifest, inputs, expected + 0.01, lambda: 1e-3) == pytest.approx(0.01, abs=1e-3)
    with pytest.raises(ExportError, match="NaN or infinity"):
        prove(bundle.path, bundle.manifest, inputs, np.full_like(expected, np.nan), lambda: np.inf)
