"""Predict with a policy of two observation steps: which frames it takes, at which joints, and what it spares."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

from device.bundle import Bundle
from device.config import VIRTUAL_CELL, LoadedCell, load_cell
from device.engine_sampling import SamplingEngine
from device.errors import BundleError
from device.frame_sets import Cameras
from device.messages import TOPICS, frames_dtype, joints_dtype
from device.predict import Predict, advance_ns
from device.topic import TopicReader, TopicWriter, topic_path
from fixtures.recipe import Array
from fixtures.tiny_bundle import document
from fixtures.tiny_diffusion import FRONT, SAMPLE, STATE, sampled, sampler, table, write_tiny_diffusion

MS = 1_000_000
PERIOD_NS = round(1e9 / 30)


def table_without_noise() -> dict[str, Array]:
    """A sampler whose last step takes the network's prediction as it is: the same actions whatever is drawn."""
    rows = np.zeros((3, 9), np.float32)
    rows[:, [2, 3, 4]] = 1.0, 100.0, 1.0  # p_m, clip, k_denoised
    return table(rows)


def cell_with(bundle: Bundle, folder: Path, **replaced: str) -> LoadedCell:
    text = VIRTUAL_CELL.read_text().replace('bundle = "bundle"', f'bundle = "{bundle.path}"')
    text = text.replace('"calibration.json"', f'"{VIRTUAL_CELL.parent / "calibration.json"}"')
    for before, after in replaced.items():
        text = text.replace(before, after)
    (folder / "cell.toml").write_text(text)
    return load_cell(folder / "cell.toml")


class Scene:
    """What capture and execute would publish. The joints move by 1 unit a millisecond from `start_ns` on."""

    def __init__(self, folder: Path) -> None:
        bundle = write_tiny_diffusion(
            folder / "tiny", steps=table_without_noise(), sampler=sampler(draws_noise=False, solver="ddim")
        )
        runtime = folder / "run"
        cell = cell_with(bundle, folder)
        self.bundle = bundle
        self.frames = frames_writer(cell, runtime, "front")
        self.joints = TopicWriter(topic_path(runtime, "joints"), joints_dtype(6), TOPICS["joints"].slots)
        self.predict = Predict(cell, runtime)
        self.chunks = TopicReader(topic_path(runtime, "chunks"))
        self.pictures: dict[int, Array] = {}
        self.start_ns = time.monotonic_ns() - 100 * MS
        for t_ns in (self.start_ns, self.start_ns + 5000 * MS):
            with self.joints.slot() as record:
                record[...] = np.zeros((), joints_dtype(6))
                record["t_ns"], record["position"] = t_ns, self.position_at(t_ns)

    @property
    def encoded(self) -> int:
        engine = self.predict._engine
        assert isinstance(engine, SamplingEngine)
        return engine.encoded

    def position_at(self, t_ns: int) -> float:
        return (t_ns - self.start_ns) / MS

    def frame(self, t_ns: int, red: int, jpeg: bytes | None = None) -> None:
        self.pictures[t_ns] = publish(self.frames, t_ns, red, jpeg)

    def expected(self, *times: int) -> Array:
        """The actions for frames of these times, oldest first, and the joints at these times."""
        state = np.array([[self.position_at(t_ns)] * 6 for t_ns in times], np.float32)
        frames = np.stack([self.pictures[t_ns] for t_ns in times])
        return sampled({STATE: state, FRONT: frames, "noise": np.zeros(SAMPLE)}, table_without_noise())

    def close(self) -> None:
        self.predict.close()
        self.frames.close()
        self.joints.close()


def frames_writer(cell: LoadedCell, runtime: Path, camera: str) -> TopicWriter:
    dtype = frames_dtype(cell.cell.cameras[camera].jpeg_capacity)
    return TopicWriter(topic_path(runtime, f"frames/{camera}"), dtype, TOPICS["frames/*"].slots)


def publish(writer: TopicWriter, t_ns: int, red: int = 40, jpeg: bytes | None = None) -> Array:
    """A frame of one colour; returns the picture as a reader will decode it."""
    picture = np.zeros((96, 96, 3), np.uint8)
    picture[..., 0] = red
    data = jpeg or simplejpeg.encode_jpeg(picture, quality=95)
    with writer.slot() as record:
        record["t_ns"], record["sequence"] = t_ns, 0
        record["width"], record["height"], record["size"] = 96, 96, len(data)
        record["data"][: len(data)] = np.frombuffer(data, np.uint8)
    return picture if jpeg else simplejpeg.decode_jpeg(data, colorspace="RGB")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.close()


def actions_of(scene: Scene) -> Any:
    chunk = scene.chunks.latest()
    assert chunk is not None
    return chunk["actions"]


def test_each_step_has_its_frame_and_the_joints_at_its_time(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.frame(now - PERIOD_NS, red=40)
    scene.frame(now, red=200)
    assert scene.predict.step()
    np.testing.assert_allclose(actions_of(scene), scene.expected(now - PERIOD_NS, now), atol=1e-3)
    chunk = scene.chunks.latest()
    assert chunk is not None
    assert chunk["t_obs_ns"] == now
    assert np.abs(scene.expected(now, now - PERIOD_NS) - scene.expected(now - PERIOD_NS, now)).max() > 1


def test_a_frame_that_is_known_is_neither_decoded_nor_encoded_again(scene: Scene) -> None:
    now = time.monotonic_ns()
    at_start = scene.encoded
    scene.frame(now - 2 * PERIOD_NS, red=40)
    scene.frame(now - PERIOD_NS, red=200)
    assert scene.predict.step()
    assert scene.encoded == at_start + 2
    scene.frame(now, red=90)
    assert scene.predict.step()
    assert scene.encoded == at_start + 3
    np.testing.assert_allclose(actions_of(scene), scene.expected(now - PERIOD_NS, now), atol=1e-3)


def test_of_a_faster_camera_it_takes_the_frame_of_one_action_period_ago(scene: Scene) -> None:
    now = time.monotonic_ns()
    times = [now - round(back * 1e9 / 60) for back in range(4, -1, -1)]
    for red, t_ns in zip((10, 60, 110, 160, 210), times, strict=True):
        scene.frame(t_ns, red)
    assert scene.predict.step()
    np.testing.assert_allclose(actions_of(scene), scene.expected(times[2], times[4]), atol=1e-3)


@pytest.mark.parametrize("before_ms", [None, 5, 12, 55, 66])
def test_without_a_frame_within_half_a_period_of_the_earlier_step_there_is_no_chunk(
    scene: Scene, before_ms: int | None
) -> None:
    now = time.monotonic_ns()
    if before_ms is not None:
        scene.frame(now - before_ms * MS, red=40)
    scene.frame(now, red=40)
    assert not scene.predict.step(0.05)
    assert "front has no frame from 33 ms before its newest" in str(scene.predict._cameras.trouble)
    assert not scene.predict.step(0.05), "and it does not look at the same frame again"
    assert "no new frame" in str(scene.predict._cameras.trouble)
    scene.frame(now + PERIOD_NS, red=40)
    assert scene.predict.step(), "history is there now"


@pytest.mark.parametrize("before_ms", [18, 25, 40, 49])
def test_jitter_of_less_than_half_a_period_is_none(scene: Scene, before_ms: int) -> None:
    now = time.monotonic_ns()
    scene.frame(now - before_ms * MS, red=40)
    scene.frame(now, red=200)
    assert scene.predict.step()
    np.testing.assert_allclose(actions_of(scene), scene.expected(now - before_ms * MS, now), atol=1e-3)


def test_an_earlier_frame_that_is_no_picture_leads_to_no_chunk(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.frame(now - PERIOD_NS, red=0, jpeg=b"\xff\xd8 this is no picture")
    scene.frame(now, red=40)
    assert not scene.predict.step(0.05)
    assert "no JPEG" in str(scene.predict._cameras.trouble)
    scene.frame(now + PERIOD_NS, red=200)
    assert scene.predict.step()
    np.testing.assert_allclose(actions_of(scene), scene.expected(now, now + PERIOD_NS), atol=1e-3)


def test_a_chunk_is_followed_for_its_advance_before_the_next_is_inferred(scene: Scene) -> None:
    scene.predict._advance_ns = advance_ns(scene.bundle.manifest, 3)
    first = time.monotonic_ns() - PERIOD_NS
    chunks = []
    for frame in range(8):
        scene.frame(first + (frame - 1) * PERIOD_NS, red=20 * frame)
        if frame and scene.predict.step(0.05):
            chunks.append(frame)
    assert chunks == [1, 4, 7]
    assert scene.predict._cameras.trouble is None


def test_before_the_joints_there_is_no_observation(scene: Scene) -> None:
    before = scene.start_ns - 5 * MS
    scene.frame(before, red=40)
    scene.frame(before + PERIOD_NS, red=40)
    assert not scene.predict.step(0.05)
    assert scene.chunks.latest() is None


def test_cameras_out_of_step_keep_the_phase_they_have(tmp_path: Path) -> None:
    """Half a period apart, jitter decides which frame is nearest to a common time; each camera's own time is clear."""
    front = document()["cameras"][0]
    wrist = front | {"name": "wrist", "input": "observation.images.wrist"}
    bundle = write_tiny_diffusion(tmp_path / "two", cameras=[front, wrist])
    cell, runtime = cell_with(bundle, tmp_path), tmp_path / "run"
    writers = {name: frames_writer(cell, runtime, name) for name in ("front", "wrist")}
    inputs = {camera.input: np.zeros((96, 96, 3), np.uint8) for camera in bundle.manifest.cameras}
    cameras = Cameras(cell, bundle, inputs, runtime)
    now = time.monotonic_ns() - 100 * MS
    newest = []
    for tick, jitter_ms in enumerate((0, 1, -1, 1)):
        publish(writers["wrist"], now + tick * PERIOD_NS - 17 * MS + jitter_ms * MS)
        publish(writers["front"], now + tick * PERIOD_NS)
        sets = cameras.next(0.05)
        if sets is not None:
            assert [found.key for found in sets[:-1]] == newest[-1:], "the earlier set was the newest then"
            newest.append(sets[-1].key)
        else:
            newest.append((now + tick * PERIOD_NS, now + tick * PERIOD_NS - 17 * MS + jitter_ms * MS))
    assert len(newest) == 4
    for writer in writers.values():
        writer.close()


@pytest.mark.parametrize(
    ("changes", "fps", "says"),
    [
        ({}, 20, "takes 20 frames/s of camera 'front'; set cameras.front.fps to 30 or more"),
        ({"action_rate_hz": 2.0}, 30, "looks back 0.5 s, but at 30 frames/s of camera 'front' 0.43 s are held"),
    ],
)
def test_a_cell_that_cannot_give_the_history_is_refused(
    changes: dict[str, float], fps: int, says: str, tmp_path: Path
) -> None:
    bundle = write_tiny_diffusion(tmp_path / "tiny", **changes)
    cell = cell_with(bundle, tmp_path, **{"[cameras.front]": f"[cameras.front]\nfps = {fps}"})
    with pytest.raises(BundleError) as caught:
        bundle.check_fits(cell)
    assert says in str(caught.value)


def test_a_camera_that_was_away_has_no_history_until_it_has_given_two_frames(tmp_path: Path, scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.frame(now - 3 * PERIOD_NS, red=40)
    scene.frame(now - 2 * PERIOD_NS, red=200)
    assert scene.predict.step()
    scene.frames.close()
    scene.frames = frames_writer(load_cell(tmp_path / "cell.toml"), tmp_path / "run", "front")
    scene.frame(now - PERIOD_NS, red=90)
    assert not scene.predict.step(0.05), "what the camera saw before it went away is not one period ago"
    scene.frame(now, red=10)
    assert scene.predict.step()
    np.testing.assert_allclose(actions_of(scene), scene.expected(now - PERIOD_NS, now), atol=1e-3)


def test_observations_that_are_let_pass_end_a_trouble(scene: Scene) -> None:
    now = time.monotonic_ns()
    scene.frame(now - 2 * PERIOD_NS, red=40)
    assert not scene.predict.step(0.02)
    assert scene.predict._troubled_since is not None
    scene.predict._due_ns = now + 1000 * MS
    scene.frame(now - PERIOD_NS, red=40)
    assert not scene.predict.step(0.02)
    assert scene.predict._troubled_since is None
    assert scene.chunks.latest() is None
