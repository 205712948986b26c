"""Predict: the newest frames, the joints at their time, and a chunk that says what it is about; over real topics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

import onnx

from device.bundle import Bundle
from device.config import VIRTUAL_CELL, LoadedCell, load_cell
from device.engine import EngineError
from device.errors import BundleError
from device.messages import TOPICS, frames_dtype, joints_dtype
from device.predict import Predict, useful_ns
from device.topic import TopicReader, TopicWriter, topic_path
from fixtures.tiny_bundle import FRONT, STATE, network, write_tiny_bundle

MS = 1_000_000
# What a camera sends that does not keep to the size it agreed to.
SMALLER = simplejpeg.encode_jpeg(np.full((48, 64, 3), 200, np.uint8))
AS_LARGE = simplejpeg.encode_jpeg(np.full((64, 144, 3), 200, np.uint8))


class Scene:
    """What capture and execute would publish, and a predict that reads it."""

    def __init__(self, cell: LoadedCell, runtime: Path) -> None:
        capacity = cell.cell.cameras["front"].jpeg_capacity
        self.frames = TopicWriter(topic_path(runtime, "frames/front"), frames_dtype(capacity), TOPICS["frames/*"].slots)
        self.joints = TopicWriter(topic_path(runtime, "joints"), joints_dtype(6), TOPICS["joints"].slots)
        self.predict = Predict(cell, runtime)
        self.chunks = TopicReader(topic_path(runtime, "chunks"))

    def close(self) -> None:
        self.predict.close()
        self.frames.close()
        self.joints.close()

    def frame(self, t_ns: int, size: tuple[int, int] = (96, 96), jpeg: bytes | None = None, red: int = 40) -> None:
        picture = np.zeros((*size, 3), np.uint8)
        picture[..., 0] = red
        data = jpeg if jpeg is not None else simplejpeg.encode_jpeg(picture, quality=95)
        with self.frames.slot() as record:
            record["t_ns"], record["sequence"] = t_ns, 0
            record["width"], record["height"], record["size"] = size[1], size[0], len(data)
            record["data"][: len(data)] = np.frombuffer(data, np.uint8)

    def position(self, t_ns: int, position: float) -> None:
        with self.joints.slot() as record:
            record[...] = np.zeros((), joints_dtype(6))
            record["t_ns"], record["position"], record["valid"] = t_ns, position, 1


def cell_with(bundle: Bundle, tmp_path: Path) -> LoadedCell:
    text = VIRTUAL_CELL.read_text().replace('bundle = "bundle"', f'bundle = "{bundle.path}"')
    text = text.replace('"calibration.json"', f'"{VIRTUAL_CELL.parent / "calibration.json"}"')
    (tmp_path / "cell.toml").write_text(text)
    return load_cell(tmp_path / "cell.toml")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(cell_with(write_tiny_bundle(tmp_path / "tiny"), tmp_path), tmp_path / "run")
    yield scene
    scene.close()


def test_a_chunk_carries_the_frames_time_and_the_joints_at_that_time(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.position(now - 40 * MS, 10.0)
    scene.position(now - 20 * MS, 20.0)
    scene.frame(now - 35 * MS)
    assert scene.predict.step()
    chunk = scene.chunks.latest()
    assert chunk is not None
    assert chunk["t_obs_ns"] == now - 35 * MS
    assert chunk["dt_ns"] == round(1e9 / 30)
    assert chunk["count"] == 4
    assert chunk["t_ns"] > now
    np.testing.assert_allclose(scene.predict._engine.inputs[STATE], 12.5, atol=1e-4)
    assert abs(int(scene.predict._engine.inputs[FRONT][..., 0].mean()) - 40) < 3


def test_it_never_infers_twice_on_the_same_frame(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.position(now - 60 * MS, 0.0)
    scene.position(now, 0.0)
    scene.frame(now - 30 * MS)
    assert scene.predict.step()
    assert not scene.predict.step(0.05)


@pytest.mark.parametrize(
    ("age_ms", "size", "jpeg", "says"),
    [
        (400, (96, 96), None, "ms old"),
        (10, (48, 64), None, "gives 64x48, the policy takes 96x96"),
        (10, (96, 96), b"\xff\xd8 this is no picture", "no JPEG"),
        (10, (96, 96), SMALLER, "a JPEG of 64x48 in a frame of 96x96"),
        (10, (96, 96), AS_LARGE, "a JPEG of 144x64 in a frame of 96x96"),
    ],
)
def test_a_frame_that_is_no_observation_leads_to_no_chunk(
    scene: Scene, age_ms: int, size: tuple[int, int], jpeg: bytes | None, says: str
) -> None:
    now = time.monotonic_ns()
    scene.position(now - 1000 * MS, 0.0)
    scene.position(now, 0.0)
    scene.frame(now - age_ms * MS, size, jpeg)
    assert not scene.predict.step(0.05)
    assert says in str(scene.predict._cameras.trouble)
    assert scene.chunks.latest() is None
    scene.position(time.monotonic_ns() + 5000 * MS, 0.0)
    scene.frame(time.monotonic_ns())
    assert scene.predict.step(), "and it goes on with the next good one"


def test_a_frame_that_is_no_observation_is_looked_at_once(scene: Scene) -> None:
    scene.frame(time.monotonic_ns(), jpeg=b"\xff\xd8 this is no picture")
    scene.position(time.monotonic_ns() + 5000 * MS, 0.0)
    assert not scene.predict.step(0.05)
    assert "no JPEG" in str(scene.predict._cameras.trouble)
    assert not scene.predict.step(0.05)
    assert "no new frame" in str(scene.predict._cameras.trouble)


def test_without_joints_at_the_frames_time_there_is_no_chunk(scene: Scene) -> None:
    scene.frame(time.monotonic_ns())
    assert not scene.predict.step(0.05)
    assert scene.chunks.latest() is None


def test_a_joint_state_that_is_not_finite_leads_to_no_chunk(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.position(now - 60 * MS, float("nan"))
    scene.position(now, float("nan"))
    scene.frame(now - 30 * MS)
    assert not scene.predict.step(0.05)
    assert scene.chunks.latest() is None


def test_an_engine_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(network())
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.full((4, 1), 9.0, np.float32), "steps"))
    bundle = write_tiny_bundle(tmp_path / "tiny", model=model.SerializeToString())
    with pytest.raises(EngineError, match="differs from the reference"):
        Predict(cell_with(bundle, tmp_path), tmp_path / "run")


def test_a_policy_without_cameras_has_nothing_that_sets_its_time(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny", cameras=[])
    with pytest.raises(BundleError, match="has no camera, whose frames"):
        Predict(cell_with(bundle, tmp_path), tmp_path / "run")


def test_a_joint_state_that_is_not_finite_is_no_observation_whatever_the_policy_makes_of_it(scene: Scene) -> None:
    """A network that clips its inputs would answer numbers that look like motion."""
    now = time.monotonic_ns()
    scene.position(now - 60 * MS, float("nan"))
    scene.position(now, float("nan"))
    scene.frame(now - 30 * MS)
    assert scene.predict._cameras.next(0.05) is not None
    assert not scene.predict._fill_state(now - 30 * MS)


def test_chunks_that_are_over_when_they_come_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cell = cell_with(write_tiny_bundle(tmp_path / "tiny"), tmp_path)
    scene = Scene(cell, tmp_path / "run")
    try:
        now = time.monotonic_ns()
        scene.position(now - 1000 * MS, 0.0)
        scene.position(now + 60_000 * MS, 0.0)
        for number in range(5):  # four actions at 30 Hz are over after 100 ms
            scene.frame(now - (140 - number) * MS)
            scene.predict._cameras._max_age_ns = 60_000 * MS
            assert scene.predict.step()
        told = [record.message for record in caplog.records if record.name == "predict"]
        assert len(told) == 1
        assert told[0].startswith("chunks.late reason=")
        assert "is of use for 100 ms: the arm holds" in told[0]
    finally:
        scene.close()


@pytest.mark.parametrize(
    ("changes", "staleness_s", "expected_ns"),
    [({}, 0.5, 100 * MS), ({}, 0.05, 50 * MS), ({"family": "cloning", "chunk_size": 1}, 0.5, 500 * MS)],
)
def test_a_chunk_is_of_use_until_its_last_action_and_while_it_is_fresh(
    changes: dict[str, object], staleness_s: float, expected_ns: int, tmp_path: Path
) -> None:
    manifest = Bundle.open(write_tiny_bundle(tmp_path / "tiny").path).manifest.model_copy(update=changes)
    assert useful_ns(manifest, staleness_s) == expected_ns


def test_frames_that_go_backwards_lead_to_no_chunk(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.position(now - 1000 * MS, 0.0)
    scene.position(now + 60_000 * MS, 0.0)
    scene.frame(now - 30 * MS)
    assert scene.predict.step()
    for before_ms in (31, 100, 30):
        scene.frame(now - before_ms * MS, red=200)
        assert not scene.predict.step(0.02)
    scene.frame(now - 10 * MS)
    assert scene.predict.step()
    chunk = scene.chunks.latest()
    assert chunk is not None
    assert (chunk["chunk_id"], chunk["t_obs_ns"]) == (2, now - 10 * MS)
