"""Policy bundles: a good one opens, and every bad one gets one sentence that says what is wrong and what to do."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

from device.arrays import dump_arrays
from device.bundle import Bundle
from device.config import VIRTUAL_CELL, LoadedCell, load_cell
from device.errors import BundleError
from fixtures.tiny_bundle import JOINTS, document, expected, observed, write_tiny_bundle
from fixtures.tiny_diffusion import sampler

FIDELITY = document()["fidelity"]
HANDOFF = document()["handoff"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "tiny")


def edit(bundle: Bundle, **changes: Any) -> Path:
    """Change the manifest as a person with an editor would."""
    path = bundle.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return bundle.path


def rehash(path: Path) -> Path:
    """Make the manifest agree with the files again, as a damaged export would."""
    manifest = path / "manifest.json"
    document = json.loads(manifest.read_text())
    files = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in document["files"]}
    manifest.write_text(json.dumps(document | {"files": files}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_bundle_opens_with_its_golden_inputs(bundle: Bundle) -> None:
    inputs, actions = bundle.golden()
    for name, array in observed().items():
        np.testing.assert_array_equal(inputs[name], array)
    np.testing.assert_array_equal(actions, expected(inputs))
    assert set(bundle.manifest.files) == {"policy.onnx", "golden.npz", "reference/front.jpg"}


def test_its_digest_is_that_of_the_manifest(bundle: Bundle) -> None:
    assert bundle.digest == hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()


def test_it_may_be_moved_and_reached_through_a_link(bundle: Bundle, tmp_path: Path) -> None:
    shutil.move(bundle.path, tmp_path / "moved")
    (tmp_path / "current").symlink_to("moved")
    assert Bundle.open(tmp_path / "current").digest == bundle.digest


def test_a_link_that_is_turned_to_another_bundle_does_not_mix_the_two(bundle: Bundle, tmp_path: Path) -> None:
    other = write_tiny_bundle(tmp_path / "other", action_rate_hz=10.0)
    current = tmp_path / "current"
    current.symlink_to(bundle.path)
    opened = Bundle.open(current)
    current.unlink()
    current.symlink_to(other.path)
    assert opened.path == bundle.path, "its graphs and golden values are read later, and are those of its manifest"


def test_arrays_are_written_the_same_each_time() -> None:
    assert dump_arrays(observed()) == dump_arrays(observed())


def test_a_changed_file_is_named(bundle: Bundle) -> None:
    with (bundle.path / "policy.onnx").open("ab") as file:
        file.write(b"\0")
    assert "policy.onnx is not the file that was exported" in refusal(bundle.path)


def test_a_missing_file_is_named(bundle: Bundle) -> None:
    (bundle.path / "reference" / "front.jpg").unlink()
    assert "reference/front.jpg is missing" in refusal(bundle.path)


def test_a_file_that_no_hash_covers_is_refused(bundle: Bundle) -> None:
    (bundle.path / "weights.bin").write_bytes(b"from somewhere else")
    with pytest.raises(BundleError, match=r"weights\.bin is not in the manifest's list"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_a_file_outside_the_folder_is_refused(bundle: Bundle, name: str) -> None:
    files = {**bundle.manifest.files, name: "0" * 64}
    assert "points outside the bundle" in refusal(edit(bundle, files=files))


def test_a_link_to_outside_the_folder_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.move(bundle.path / "policy.onnx", tmp_path / "policy.onnx")
    (bundle.path / "policy.onnx").symlink_to(tmp_path / "policy.onnx")
    assert "is a link that points outside" in refusal(bundle.path)


def test_a_newer_schema_says_what_to_update(bundle: Bundle) -> None:
    message = refusal(edit(bundle, schema=2, novelty=True))
    assert "was written by a newer exporter (schema 2; this device knows 1): update the device software" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": "1"}, "schema: is missing"),
        ({"novelty": 1}, "novelty: Extra inputs are not permitted"),
        ({"chunk_size": 0}, "chunk_size: Input should be greater than 0"),
        ({"chunk_size": "8"}, "chunk_size: Input should be a valid integer"),
        ({"joints": []}, "joints: Tuple should have at least 1 item"),
        ({"joints": [{"name": "a", "unit": "radians"}]}, "joints.0.unit"),
        ({"joints": [{"name": "a", "unit": "degrees"}] * 2}, "a joint is named twice"),
        ({"two_state_joints": ["claw"]}, "two_state_joints names 'claw'"),
        ({"action_rate_hz": -1}, "action_rate_hz"),
        ({"files": {}}, "lists no policy.onnx"),
        ({"family": "flow"}, "family 'flow'; this device runs act, diffusion, cloning: update the device software"),
        ({"family": "diffusion"}, "sampler: is missing"),
        ({"observation_steps": 2}, "observation_steps: a policy of family act looks at one step"),
        ({"sampler": sampler()}, "sampler: a policy of family act answers at once"),
        ({"fidelity": FIDELITY | {"joint_errors": [0.1]}}, "joint_errors has 1 for 6 joints"),
        ({"fidelity": FIDELITY | {"precision": "fp8"}}, "fidelity.precision"),
        ({"fidelity": FIDELITY | {"max_error": float("inf")}}, "fidelity.max_error: Input should be a finite number"),
        ({"fidelity": FIDELITY | {"max_error": float("nan")}}, "fidelity.max_error"),
        ({"fidelity": FIDELITY | {"joint_errors": [float("nan")] * 6}}, "fidelity.joint_errors.0"),
        ({"fidelity": FIDELITY | {"joint_errors": [-1.0] * 6}}, "fidelity.joint_errors.0"),
    ],
)
def test_a_manifest_that_says_something_odd_is_refused(bundle: Bundle, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(edit(bundle, **changes))


def test_a_manifest_that_is_cut_is_refused(bundle: Bundle) -> None:
    path = bundle.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not valid JSON" in refusal(bundle.path)
    path.write_bytes(b"\xff\xfe")
    assert "is not valid JSON" in refusal(bundle.path)
    path.unlink()
    assert "holds no manifest.json" in refusal(bundle.path)


def test_what_is_no_directory_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    assert "does not exist; a bundle is a directory" in refusal(tmp_path / "nowhere")
    assert "is a file; a bundle is a directory" in refusal(bundle.path / "policy.onnx")


@pytest.mark.parametrize(
    ("golden", "says"),
    [
        ({"action": np.full((4, 6), np.nan, np.float32)}, "action holds NaN or infinity"),
        ({"observation.state": np.full(6, np.inf, np.float32)}, "observation.state holds NaN or infinity"),
        ({"action": np.zeros((3, 6), np.float32)}, "action should be float32 [4, 6], found float32 [3, 6]"),
        ({"action": np.zeros((4, 6), np.complex64)}, "action should be float32 [4, 6], found complex64 [4, 6]"),
    ],
)
def test_golden_values_that_prove_nothing_are_refused(bundle: Bundle, golden: dict[str, Any], says: str) -> None:
    arrays = observed() | {"action": expected(observed())} | golden
    (bundle.path / "golden.npz").write_bytes(dump_arrays(arrays))
    with pytest.raises(BundleError) as caught:
        Bundle.open(rehash(bundle.path)).golden()
    assert says in str(caught.value)


def test_golden_values_are_never_unpickled(bundle: Bundle) -> None:
    np.savez(bundle.path / "golden.npz", action=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match=r"cannot be read as an \.npz file of plain arrays"):
        Bundle.open(rehash(bundle.path)).golden()


# Does it fit the cell?


@pytest.fixture(scope="module")
def cell() -> LoadedCell:
    return load_cell(VIRTUAL_CELL)


def unfit(tmp_path: Path, cell: LoadedCell, **changes: Any) -> str:
    with pytest.raises(BundleError) as caught:
        write_tiny_bundle(tmp_path / "unfit", **changes).check_fits(cell)
    return str(caught.value)


def test_a_bundle_made_for_the_cell_fits(bundle: Bundle, cell: LoadedCell) -> None:
    bundle.check_fits(cell)


def test_joints_in_another_order_do_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    joints = document()["joints"]
    message = unfit(tmp_path, cell, joints=[joints[1], joints[0], *joints[2:]])
    assert "the policy moves shoulder_lift, shoulder_pan" in message
    assert "in another order" in message


def test_other_joints_do_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    joints = [{"name": f"axis_{index}", "unit": "degrees"} for index in range(6)]
    assert "has other joints: shoulder_pan" in unfit(tmp_path, cell, joints=joints)


def test_other_units_do_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    joints = [{"name": name, "unit": "range_m100_100"} for name in JOINTS]
    message = unfit(tmp_path, cell, joints=joints)
    assert "joint shoulder_pan in range_m100_100, but arm.joints.shoulder_pan.unit" in message


def test_a_camera_that_the_cell_lacks_does_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    cameras = [{"name": "ceiling", "input": "observation.images.front", "width": 96, "height": 96}]
    assert "needs a camera named 'ceiling'; the cell has front" in unfit(tmp_path, cell, cameras=cameras)


def test_a_camera_of_another_size_does_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    cameras = [{"name": "front", "input": "observation.images.front", "width": 640, "height": 480}]
    message = unfit(tmp_path, cell, cameras=cameras)
    assert "640x480 pixels of camera 'front', but the cell's gives 96x96" in message


def test_a_policy_that_acts_faster_than_the_loop_does_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    assert "acts at 100 Hz, but control.rate_hz" in unfit(tmp_path, cell, action_rate_hz=100.0)


def test_a_policy_that_sees_more_than_a_cell_can_does_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    assert "takes observation.environment_state" in unfit(tmp_path, cell, environment_state=3)


def test_a_state_that_is_more_than_positions_does_not_fit(tmp_path: Path, cell: LoadedCell) -> None:
    assert "has 12 values for 6 joints" in unfit(tmp_path, cell, state_size=12)


def with_policy(tmp_path: Path, lines: str) -> LoadedCell:
    text = VIRTUAL_CELL.read_text().replace('"calibration.json"', f'"{VIRTUAL_CELL.parent / "calibration.json"}"')
    text = re.sub(r"(?s)\[policy\].*?(?=\n\[)", f"[policy]\n{lines}", text)
    (tmp_path / "cell.toml").write_text(text)
    return load_cell(tmp_path / "cell.toml")


@pytest.mark.parametrize(
    ("lines", "advance", "changes", "says"),
    [
        ("", 4, {}, "the bundle asks for a chunk every 4 actions, but a chunk has 4, and the next one takes time"),
        ("advance = 9", 2, {}, "every 9 actions, but a chunk has 4, and the next one takes time to infer; set "
         "policy.advance to 3 or less"),
        ("", 3, {"action_rate_hz": 5.0}, "every 3 actions at 5 Hz, which is every 0.6 s, but after policy.staleness_s "
         "= 0.5 without an observation the arm holds"),
        ("staleness_s = 0.1", 3, {}, "every 0.1 s, but after policy.staleness_s = 0.1"),
        ("", 20, {"family": "cloning", "chunk_size": 1}, "which is every 0.67 s"),
    ],
)  # fmt: skip
def test_a_chunk_that_is_over_before_the_next_one_is_looked_for_does_not_fit(
    lines: str, advance: int, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    message = unfit(tmp_path, with_policy(tmp_path, lines), handoff=HANDOFF | {"advance": advance}, **changes)
    assert says in message


@pytest.mark.parametrize(
    ("lines", "advance", "changes"),
    [
        ("", 3, {}),
        ("advance = 2", 9, {}),  # the cell overrides what the bundle recommends
        ("staleness_s = 0.7", 3, {"action_rate_hz": 5.0}),
        ("", 1, {"family": "cloning", "chunk_size": 1}),
        ("", None, {"action_rate_hz": 1.0}),
    ],
)
def test_a_chunk_that_lasts_until_the_next_one_fits(
    lines: str, advance: int | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    handoff = HANDOFF | {"advance": advance}
    write_tiny_bundle(tmp_path / "fit", handoff=handoff, **changes).check_fits(with_policy(tmp_path, lines))
