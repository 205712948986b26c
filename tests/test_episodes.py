"""Recorded episodes: what every layout gives, and what each of them is refused for."""

from __future__ import annotations

import json
import re
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.episodes import Episodes, ImageSize, open_episodes
from export.episodes.parquet import read_pictures
from export.episodes.video import OPEN_FILES, Video, Videos
from export.errors import ExportError
from fixtures.recordings import (
    ACTION,
    CODEC_ERROR,
    ENVIRONMENT,
    FRONT,
    HEIGHT,
    KEY_FRAME_EVERY,
    LENGTHS,
    STATE,
    WIDTH,
    WRIST,
    arrays_of,
    joints,
    numbers_of,
    picture,
    pictures,
    png,
    write_arrays,
    write_shard,
    write_v21,
    write_v30,
    write_video,
)
from real_lerobot import lerobot_python

FIXTURES = Path(__file__).parent / "fixtures"
SIZE = ImageSize(HEIGHT, WIDTH)

Array = np.ndarray[Any, np.dtype[Any]]


def difference(a: Array, b: Array) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# What every layout gives


WRITERS: dict[str, tuple[Callable[[Path], Path], dict[str, int]]] = {  # cameras, and how far ahead each looks
    "LeRobotDataset v3.0": (write_v30, {FRONT: 0, WRIST: 3}),
    "LeRobotDataset v2.1": (write_v21, {FRONT: 0, WRIST: 3}),
    "shards of the recipe": (write_shard, {FRONT: 0, "observation.images.wrist": 3}),
    "one .npz an episode": (write_arrays, {FRONT: 0}),
}


@pytest.fixture(params=WRITERS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_layout_gives_the_same_episodes(layout: str, tmp_path: Path) -> None:
    write, cameras = WRITERS[layout]
    episodes = open_episodes(write(tmp_path / "recording"))
    assert (episodes.layout, episodes.rate_hz) == (layout, 30.0)
    assert dict(episodes.cameras) == dict.fromkeys(cameras, SIZE)
    assert [episode.length for episode in episodes] == list(LENGTHS)
    assert (episodes.state_size, episodes.action_size, episodes.environment_size) == (6, 6, None)
    for i, episode in enumerate(episodes):
        numbers = numbers_of(i)
        assert episode.states.dtype == episode.actions.dtype == np.float32
        np.testing.assert_array_equal(episode.states, joints(numbers))
        np.testing.assert_array_equal(episode.actions, joints(numbers) + 1)
        for camera, ahead in cameras.items():
            seen = episode.frames(camera, range(episode.length))
            assert seen.dtype == np.uint8
            assert difference(seen, pictures(n + ahead for n in numbers)) <= CODEC_ERROR


def test_frames_come_in_the_order_asked_for_with_repeats(layout: str, tmp_path: Path) -> None:
    write, cameras = WRITERS[layout]
    episode = open_episodes(write(tmp_path / "recording"))[1]
    asked = [7, 0, 8, 8, 3]
    for camera in cameras:
        np.testing.assert_array_equal(episode.frames(camera, asked), episode.frames(camera, range(9))[asked])
        assert episode.frames(camera, []).shape == (0, HEIGHT, WIDTH, 3)


def test_a_camera_that_was_not_recorded_is_named_with_those_that_were(layout: str, tmp_path: Path) -> None:
    episode = open_episodes(WRITERS[layout][0](tmp_path / "recording"))[0]
    with pytest.raises(
        ExportError, match=r"has no observation\.images\.top; its cameras are observation\.images\.front"
    ):
        episode.frames("observation.images.top", [0])


@pytest.mark.parametrize("index", [-1, LENGTHS[0]])
def test_frames_beyond_the_episode_are_not_the_neighbours(layout: str, tmp_path: Path, index: int) -> None:
    episode = open_episodes(WRITERS[layout][0](tmp_path / "recording"))[0]
    with pytest.raises(IndexError, match="has frames 0 to 4"):
        episode.frames(FRONT, [index])


def test_reading_says_how_far_it_is(tmp_path: Path) -> None:
    lines: list[str] = []
    open_episodes(write_v21(tmp_path / "recording"), lines.append)
    assert lines == [f"reading episodes: file {i} of 3" for i in (1, 2, 3)]


def test_a_part_of_a_recording_is_a_recording(tmp_path: Path) -> None:
    episodes = open_episodes(write_arrays(tmp_path))
    assert isinstance(episodes[1:], Episodes)
    assert [episode.name for episode in episodes[1:]] == ["0001", "0002"]
    assert [episode.name for episode in episodes.select([2, 0])] == ["0002", "0000"]


# LeRobot's own datasets


def assert_as_lerobot_reads_it(root: Path, answers: Path) -> None:
    """Numbers equal; pictures within what two builds of FFmpeg's colour conversion may differ by."""
    episodes, expected = open_episodes(root), np.load(answers)
    assert dict(episodes.cameras) == {FRONT: ImageSize(64, 96), WRIST: ImageSize(24, 32)}
    begin = 0
    for number, episode in enumerate(episodes):
        rows = slice(begin, begin + episode.length)
        assert set(expected["episode_index"][rows].ravel()) == {number}
        np.testing.assert_array_equal(episode.states, expected[STATE][rows])
        np.testing.assert_array_equal(episode.actions, expected[ACTION][rows])
        for camera, tolerance in ((FRONT, 2), (WRIST, 0)):
            seen = episode.frames(camera, range(episode.length))[:, ::8, ::8]
            assert difference(seen, expected[camera][rows]) <= tolerance
        begin += episode.length
    assert begin == len(expected[STATE])


def test_a_dataset_recorded_with_lerobot_0_4_4_reads_as_lerobot_reads_it() -> None:
    assert_as_lerobot_reads_it(FIXTURES / "lerobot_v30", FIXTURES / "lerobot_v30.npz")


def test_what_the_real_lerobot_records_now_reads_as_it_reads_it(tmp_path: Path) -> None:
    script, root = str(FIXTURES / "record_dataset.py"), tmp_path / "recorded"
    done = subprocess.run(
        [lerobot_python(), script, str(root), "--untouched"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_as_lerobot_reads_it(root, root.with_suffix(".npz"))


# Videos


@pytest.fixture(scope="module", params=["libx264", "libx265"])
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Video, Array]:
    """A video of forty frames, and its pictures as they are from beginning to end."""
    path = write_video(tmp_path_factory.mktemp("video") / "video.mp4", range(40), codec=request.param)
    return Video(path), np.stack(list(Video(path).frames([i / 30 for i in range(40)], 1 / 120)))


def test_a_video_read_from_beginning_to_end_holds_every_frame_once(video: tuple[Video, Array]) -> None:
    assert difference(video[1], pictures(range(40))) <= CODEC_ERROR


@settings(deadline=None)
@given(asked=st.lists(st.integers(0, 39), max_size=6))
def test_a_frame_is_the_same_whatever_was_read_before(video: tuple[Video, Array], asked: list[int]) -> None:
    for i, seen in zip(asked, video[0].frames([i / 30 for i in asked], 1 / 120), strict=True):
        np.testing.assert_array_equal(seen, video[1][i])


class Counting(Video):
    """Knows how many frames it has decoded."""

    decoded = 0

    def _next(self) -> Any:
        self.decoded += 1
        return super()._next()


def test_a_frame_costs_no_more_than_the_pictures_since_a_key_frame(video: tuple[Video, Array]) -> None:
    for i in range(40):
        fresh = Counting(video[0].path)
        list(fresh.frames([0.0, i / 30], 1 / 120))
        assert fresh.decoded <= 1 + KEY_FRAME_EVERY


def test_reading_on_decodes_nothing_twice(video: tuple[Video, Array]) -> None:
    fresh = Counting(video[0].path)
    list(fresh.frames([i / 30 for i in range(40)], 1 / 120))
    assert fresh.decoded == 40


@pytest.mark.parametrize("time_s", [0.5 / 30, 40 / 30, -1 / 30])
def test_a_time_between_or_beyond_the_frames_has_none(video: tuple[Video, Array], time_s: float) -> None:
    with pytest.raises(ExportError, match="has no frame at"):
        list(video[0].frames([time_s], 1 / 120))
    np.testing.assert_array_equal(next(iter(video[0].frames([0.1], 1 / 120))), video[1][3])  # and goes on


def test_only_a_few_videos_stay_open(tmp_path: Path) -> None:
    videos = Videos()
    paths = [write_video(tmp_path / f"{i}.mp4", [i]) for i in range(OPEN_FILES + 2)]
    for _ in range(2):
        for i, path in enumerate(paths):
            assert difference(next(iter(videos[path].frames([0.0], 0.01))), picture(i)) <= CODEC_ERROR
    assert len(videos) == OPEN_FILES


def test_pictures_are_found_across_batches_and_row_groups(tmp_path: Path) -> None:
    column = pa.array([{"bytes": bytes([i]), "path": None} for i in range(100)])
    pq.write_table(pa.table({FRONT: column}), tmp_path / "rows.parquet", row_group_size=40)
    rows = [0, 15, 16, 39, 40, 77, 99]
    assert list(read_pictures(tmp_path / "rows.parquet", FRONT, rows, tmp_path)) == [bytes([i]) for i in rows]


def test_pictures_may_lie_beside_the_rows(tmp_path: Path) -> None:
    root = write_v21(tmp_path)
    (root / "images").mkdir()
    (root / "images" / "one.png").write_bytes(png(picture(5)))
    change_rows(root, WRIST, pa.array([{"bytes": None, "path": "images/one.png"}] * LENGTHS[1]))
    np.testing.assert_array_equal(open_episodes(root)[1].frames(WRIST, [8])[0], picture(5))
    change_rows(root, WRIST, pa.array([{"bytes": None, "path": "images/two.png"}] * LENGTHS[1]))
    refuses(root, r"two\.png, which cannot be read")


# .npz episodes


@pytest.mark.parametrize("compressed", [False, True])
def test_one_picture_costs_the_memory_of_one(tmp_path: Path, compressed: bool) -> None:
    write_arrays(tmp_path, compressed=compressed, **{
        STATE: joints(range(300)), ACTION: joints(range(300)), FRONT: pictures(range(300)),
    })  # fmt: skip
    episode = open_episodes(tmp_path)[1]
    tracemalloc.start()
    np.testing.assert_array_equal(episode.frames(FRONT, [299])[0], picture(299))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * HEIGHT * WIDTH * 3 / 3


def test_rate_and_environment_are_read_and_other_arrays_left_alone(tmp_path: Path) -> None:
    for i in range(2):
        environment = np.full((LENGTHS[i], 2), 0.5)
        more: dict[str, Any] = {ENVIRONMENT: environment, "rate_hz": 50.0, "next.reward": np.array(["any"])}
        np.savez(tmp_path / f"{i}.npz", **arrays_of(i), **more)
    episodes = open_episodes(tmp_path)
    assert (episodes.rate_hz, episodes.environment_size) == (50.0, 2)
    environment = episodes[0].environment
    assert environment is not None and environment.dtype == np.float32


def test_a_recording_without_cameras_is_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", **{STATE: joints(range(3)), ACTION: joints(range(3))})
    assert open_episodes(tmp_path).cameras == {}


# What is refused


def refuses(folder: Path, why: str) -> None:
    """Opening the folder, or else looking at all that it holds, ends with one sentence."""
    with pytest.raises(ExportError, match=why) as refusal:
        for episode in open_episodes(folder):
            for camera in episode.cameras:
                episode.frames(camera, range(episode.length))
    assert "\n" not in str(refusal.value)


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_folder_of_something_else_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    refuses(tmp_path, r"holds no episodes; looked for a LeRobotDataset \(meta/info.json\), .*shard.*, one \.npz")
    refuses(tmp_path / "notes.txt", "is a file; give the episodes' folder")
    refuses(tmp_path / "nowhere", "does not exist")


def test_a_folder_one_level_off_is_told_the_right_one(tmp_path: Path) -> None:
    root = write_v21(tmp_path / "recording")
    refuses(root / "meta", f"was {re.escape(str(root))} meant")
    refuses(tmp_path, f"was {re.escape(str(root))} meant")


@pytest.mark.parametrize("version", ["v1.6", "v4.0", None])
def test_other_versions_of_the_format_are_refused(tmp_path: Path, version: str | None) -> None:
    change_info(write_v30(tmp_path), codebase_version=version)
    refuses(tmp_path, f"codebase_version {version} is not supported; known are v2.0, v2.1, v3.0")


def change_info(root: Path, **changes: Any) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_rows(root: Path, name: str, values: pa.Array) -> None:
    """Other values in a column of the second episode of a v2.1 dataset."""
    path = root / "data" / "chunk-000" / "episode_000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("data/chunk-000/file-000.parquet", "file-000.parquet is damaged, as after a recording that was cut off"),
        ("meta/episodes/chunk-000/file-000.parquet", "file-000.parquet is damaged"),
        (f"videos/{FRONT}/chunk-000/file-000.mp4", "file-000.mp4 is damaged or no video"),
        ("meta/info.json", "info.json cannot be read as JSON"),
    ],
)
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, file: str, why: str) -> None:
    cut(write_v30(tmp_path) / file)
    refuses(tmp_path, why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"chunks_size": 0}, "chunks_size 0"),
        ({"shape": [1_000_000_000, 96, 3]}, "pictures of 1000000000x96"),
        ({"shape": [-1, 96, 3]}, "pictures of -1x96"),
        ({"shape": [3]}, "info.json should describe fps, features and data_path"),
    ],
)
def test_sizes_that_no_recording_has_are_refused_before_memory_is_taken(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    info = write_v30(tmp_path) / "meta/info.json"
    document = json.loads(info.read_text())
    (document["features"][FRONT] if "shape" in changes else document).update(changes)
    info.write_text(json.dumps(document))
    refuses(tmp_path, why)


def test_a_recording_without_its_index_was_cut_off(tmp_path: Path) -> None:
    (write_v30(tmp_path) / "meta/episodes/chunk-000/file-000.parquet").unlink()
    refuses(tmp_path, "holds no parquet file: the recording ended before LeRobot had written its index")


@pytest.mark.parametrize("write", [write_v30, write_v21])
def test_a_video_that_is_not_there_is_missed_at_once(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    sorted(write(tmp_path).glob("videos/**/*.mp4"))[0].unlink()
    with pytest.raises(ExportError, match=r"mp4 is missing: observation\.images\.front of episode 0"):
        open_episodes(tmp_path)


def test_a_camera_that_the_rows_do_not_hold_is_named(tmp_path: Path) -> None:
    path = write_v30(tmp_path) / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns([WRIST]), path)
    refuses(tmp_path, r"should hold observation\.images\.wrist_left; it holds observation\.state, action")


def test_a_video_that_is_shorter_than_its_rows_is_refused(tmp_path: Path) -> None:
    ends = {f"videos/{FRONT}/to_timestamp": [5 / 30, 13 / 30, 18 / 30]}
    with pytest.raises(ExportError, match=r"episode 1: observation\.images\.front has 8 frames, 9 rows"):
        open_episodes(write_v30(tmp_path / "v30", **ends))
    root = write_v21(tmp_path / "v21")
    write_video(next(root.glob("videos/**/episode_000001.mp4")), range(8))
    refuses(root, r"has no frame at 0\.2667 s, it ends before; the video does not belong to these rows")


def test_an_index_that_speaks_of_other_rows_is_refused(tmp_path: Path) -> None:
    refuses(write_v30(tmp_path, length=[5, 8, 4]), "episode 1 should be 8 rows in one piece, found 9")


def test_a_codec_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = next(write_v30(tmp_path).glob("videos/**/*.mp4"))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zz9x"))
    refuses(tmp_path, "its video codec is unknown to FFmpeg here; convert it to H.264 or AV1")


def test_pictures_of_another_size_than_declared_are_refused(tmp_path: Path) -> None:
    root = write_v21(tmp_path)
    document = json.loads((root / "meta" / "info.json").read_text())
    document["features"][FRONT]["shape"] = [48, WIDTH, 3]
    change_info(root, features=document["features"])
    refuses(root, r"episode 0: observation\.images\.front should be 48x96, frame 0 is 64x96")


def test_damaged_pictures_in_the_rows_are_named_by_their_frame(tmp_path: Path) -> None:
    for content, why in (
        (b"GIF89a", "should be a PNG or JPEG picture"),
        (b"\x89PNG\r\n\x1a\n", "PNG picture is damaged"),
    ):
        root = write_v21(tmp_path / content[:3].hex())
        change_rows(root, WRIST, pa.array([{"bytes": content, "path": ""}] * LENGTHS[1]))
        refuses(root, rf"wrist_left, frame 0 of episode 1.* {why}")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (joints(range(9))[:, :5].tolist(), "observation.state should hold 6 values in every row, found 5"),
        ([None] * 9, "observation.state should hold 6 values in every row, found none"),
        ([["a"] * 6] * 9, "observation.state should be numbers, found string"),
        ([[None] * 6] * 9, "observation.state has no value in 54 places|should be numbers, found null"),
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, values: list[Any], why: str) -> None:
    kinds = {str: pa.string(), float: pa.float32()}
    inner = next((kinds.get(type(value)) for row in values if row for value in row), None) or pa.float32()
    change_rows(write_v21(tmp_path), STATE, pa.array(values, pa.list_(inner)))
    refuses(tmp_path, why)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/{episode_index}.parquet"])
def test_a_dataset_cannot_point_outside_of_itself(tmp_path: Path, path: str) -> None:
    change_info(write_v21(tmp_path), data_path=path)
    refuses(tmp_path, "outside of the recording")


@pytest.mark.parametrize("path", ["data/{nothing}.parquet", "data/{episode_index!x}", "{"])
def test_a_path_that_cannot_be_filled_in_is_refused(tmp_path: Path, path: str) -> None:
    change_info(write_v21(tmp_path), data_path=path)
    refuses(tmp_path, "is no path for episode_chunk, episode_index")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("name", [STATE, ACTION])
def test_numbers_that_are_none_are_named_by_their_frame(tmp_path: Path, name: str, value: float) -> None:
    values = joints(numbers_of(1)).astype(np.float64)
    values[4, 2] = value
    refuses(write_arrays(tmp_path / "arrays", **{name: values}), f"0001: {name} is (nan|inf) at frame 4, value 2")
    root = write_v21(tmp_path / "v21")
    change_rows(root, name, pa.array(values.tolist(), pa.list_(pa.float64())))
    refuses(root, f"episode 1: {name} is (nan|inf) at frame 4, value 2")


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        (ACTION, joints(range(8)), r"same frames, at least one; observation\.state has 9 frames, action 8"),
        (FRONT, pictures(range(8)), r"front has 8 frames, observation\.state 9"),
        (FRONT, pictures(range(9)).astype(np.float32) / 255, r"uint8 \[frames, height, width, 3\], found float32"),
        (FRONT, pictures(range(9)).transpose(0, 3, 1, 2), r"found uint8 \[9, 3, 64, 96\]"),
        (FRONT, pictures(range(9))[:, :32], "cameras should be .*front 64x96 as in 0000.npz, found .*front 32x96"),
        (WRIST, pictures(range(9)), "cameras should be"),
        (STATE, joints(range(9))[:, 0], r"should be numbers \[frames, values\], found float32 \[9\]"),
        (STATE, joints(range(9))[:, :5], "one number of values everywhere, found 5, and 6 in 0000"),
        (ENVIRONMENT, joints(range(9)), "environment_state should be in every episode or in none"),
        (STATE, np.asfortranarray(joints(range(9))), "is stored by columns"),
        ("rate_hz", np.array(25.0), "rate_hz should be 30 as in 0000.npz, found 25"),
        ("rate_hz", np.array(-1.0), "rate_hz should be one number above 0"),
        ("rate_hz", np.array("fast"), "rate_hz should be one number above 0"),
    ],
)
def test_an_episode_that_does_not_fit_the_others_or_itself(tmp_path: Path, name: str, values: Array, why: str) -> None:
    refuses(write_arrays(tmp_path, **{name: values}), why)


def test_an_episode_that_lacks_an_array_says_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", state=joints(range(3)))
    refuses(tmp_path, r"0\.npz should hold observation\.state; it holds state")


@pytest.mark.parametrize("write", [write_arrays, write_shard])
def test_an_npz_file_that_was_cut_off_is_named(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = next(write(tmp_path).glob("*.npz"))
    cut(path)
    refuses(tmp_path, f"{path.name} is damaged or no .npz file")


class Trap:
    """Would leave a file behind if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    objects = np.array([[Trap(tmp_path / "sprung")] * 6] * 9, dtype=object)
    refuses(write_arrays(tmp_path / "recording", **{STATE: objects}), "holds Python objects, which are not read")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("jpeg_end", lambda ends: ends[:-1], "jpeg_end should cut jpeg into 2 pictures for each of 18 frames"),
        ("jpeg_end", lambda ends: ends + 1, "jpeg_end should cut jpeg"),
        ("episode_end", lambda ends: ends - 1, "state, action and episode_end should agree; state has 18 frames"),
        ("action", lambda action: action[:-1], "state has 18 frames, action 17"),
        ("state", lambda state: state * np.nan, r"shard_100000/0: observation\.state is nan at frame 0, value 0"),
        ("jpeg", lambda jpeg: jpeg * 0, "front, frame 0 of an episode should be a PNG or JPEG picture"),
        ("image_hw", lambda size: size + 1, r"front should be 65x97, frame 0 is 64x96"),
        ("image_hw", lambda size: size / 2, "image_hw should be integers"),
    ],
)
def test_a_shard_that_contradicts_itself(tmp_path: Path, name: str, change: Callable[[Any], Any], why: str) -> None:
    path = write_shard(tmp_path) / "shard_100000.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: change(arrays[name])})
    refuses(tmp_path, why)


def test_a_shard_that_lacks_an_array_says_which(tmp_path: Path) -> None:
    np.savez(tmp_path / "shard_1.npz", state=joints(range(3)), action=joints(range(3)))
    refuses(tmp_path, "jpeg, jpeg_end, episode_end, image_hw missing")
