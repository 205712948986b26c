"""The capture role without a camera: its rules as functions, its loop with a source at the lowest seam.

The V4L2 side is tested against real drivers in tests/vm.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from device import capture
from device.camera import Frame, FreezeWatch, YuyvEncoder, jpeg_size
from device.camera_v4l2 import V4l2Source
from device.config import CameraConfig
from device.errors import ConfigError, DeviceUnavailableError
from device.messages import frames_dtype
from device.topic import TopicReader, TopicWriter

WIDTH, HEIGHT, FPS = 64, 48, 30
CONFIG = CameraConfig(device="/dev/v4l/by-id/test", width=WIDTH, height=HEIGHT, fps=FPS)
SECOND = 1_000_000_000


def picture(number: int = 0, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    rng = np.random.default_rng(number)
    return bytes(simplejpeg.encode_jpeg(rng.integers(0, 255, (height, width, 3), np.uint8), colorsubsampling="422"))


def frame(number: int, data: bytes | None = None, **kwargs: object) -> Frame:
    jpeg = picture(number) if data is None else data
    return Frame(jpeg, 1_000_000 * number, number, WIDTH, HEIGHT, **kwargs)  # type: ignore[arg-type]


class Script:
    """A camera that delivers what the script says: frames, None for a time-out, or an error to raise."""

    description = "scripted camera"
    has_noise = True

    def __init__(self, steps: list[Frame | OSError | None]) -> None:
        self._steps = iter(steps)
        self.ended = False
        self.closed = False

    def next(self, timeout_s: float) -> Frame | None:
        step = next(self._steps, StopIteration)
        if step is StopIteration:
            self.ended = True
            return None
        if isinstance(step, OSError):
            raise step
        assert step is None or isinstance(step, Frame)
        return step

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[TopicWriter]:
    topic = TopicWriter(tmp_path / "frames" / "front", frames_dtype(CONFIG.jpeg_capacity), 64)
    yield topic
    topic.close()


@pytest.fixture
def play(
    writer: TopicWriter, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[capture.Capture, np.ndarray[tuple[int], np.dtype[np.void]]]]:
    """Runs capture over a sequence of openings (a script, or an error that opening raises) to the end of the last."""
    monkeypatch.setattr(capture, "LOOK_S", 0.0)

    def run(*openings: list[Frame | OSError | None] | OSError):  # type: ignore[no-untyped-def]
        sources = [opening if isinstance(opening, OSError) else Script(opening) for opening in openings]
        coming = iter(sources)

        def opener() -> Script:
            source = next(coming)
            if isinstance(source, OSError):
                raise source
            return source

        last = sources[-1]
        assert isinstance(last, Script)
        role = capture.Capture(CONFIG, opener, lambda: True, writer)
        role.run(lambda: last.ended)
        assert all(source.closed for source in sources if isinstance(source, Script))
        records, _, _ = TopicReader(writer.path).since(0)
        return role, records

    return run


def names(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split()[0] for record in caplog.records if record.name == "capture"]


# What is published


def test_a_frame_is_published_as_the_camera_made_it(play) -> None:  # type: ignore[no-untyped-def]
    role, records = play([frame(7)])
    (record,) = records
    assert (record["t_ns"], record["sequence"]) == (7_000_000, 7)
    assert (record["width"], record["height"]) == (WIDTH, HEIGHT)
    assert record["data"][: record["size"]].tobytes() == picture(7)
    assert role.counters.published == 1


def test_padding_behind_the_end_marker_is_not_published(play) -> None:  # type: ignore[no-untyped-def]
    _, records = play([frame(0, picture(0) + bytes(3000))])
    assert records[0]["size"] == len(picture(0))


def test_a_short_frame_after_a_long_one_has_nothing_of_it(play, writer) -> None:  # type: ignore[no-untyped-def]
    long, short = picture(1), bytes(simplejpeg.encode_jpeg(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
    _, records = play([frame(n, long) for n in range(64)] + [frame(64, short)])
    assert records[-1]["data"][: records[-1]["size"]].tobytes() == short


@pytest.mark.parametrize("cut", [0, 1, 2, 100, -1])
def test_a_truncated_frame_is_dropped_and_counted(play, cut: int, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO)
    role, records = play([frame(0), frame(1, picture(1)[:cut]), frame(2)])
    assert list(records["sequence"]) == [0, 2]
    assert role.counters.truncated == 1
    assert names(caplog) == ["camera.started", "camera.damaged", "camera.stopped"]


def test_a_frame_without_a_start_marker_is_dropped(play) -> None:  # type: ignore[no-untyped-def]
    role, records = play([frame(0, picture(0)[2:])])
    assert len(records) == 0
    assert role.counters.truncated == 1


def test_a_frame_that_the_driver_marks_as_damaged_is_dropped_and_counted(play) -> None:  # type: ignore[no-untyped-def]
    role, records = play([frame(0), frame(1, error=True), frame(2)])
    assert list(records["sequence"]) == [0, 2]
    assert (role.counters.flagged, role.counters.missed) == (1, 0)


def test_a_frame_larger_than_a_slot_is_dropped_and_counted(play) -> None:  # type: ignore[no-untyped-def]
    jpeg = picture(0)
    role, records = play([frame(0, jpeg[:-2] + bytes(CONFIG.jpeg_capacity) + jpeg[-2:])])
    assert len(records) == 0
    assert role.counters.oversized == 1


def test_frames_lost_before_us_are_counted_by_the_drivers_own_counter(play) -> None:  # type: ignore[no-untyped-def]
    role, _ = play([frame(0), frame(1), frame(5)])
    assert role.counters.missed == 3


def test_a_driver_that_counts_from_zero_again_after_reopening_has_lost_nothing(play) -> None:  # type: ignore[no-untyped-def]
    role, records = play([frame(90), OSError(errno.ENODEV, "gone")], [frame(0)])
    assert role.counters.missed == 0
    assert list(records["sequence"]) == [90, 0]


# Loss and return


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EIO, errno.EINVAL])
def test_an_unplugged_camera_is_reported_once_and_its_return_once(play, caplog, number: int) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO)
    absent = DeviceUnavailableError(errno.ENOENT, "cameras.front: /dev/x does not exist; no camera is connected")
    role, records = play([frame(0), OSError(number, "trouble")], *[absent] * 20, [None, frame(1), frame(2)])
    assert names(caplog) == ["camera.started", "camera.lost", "camera.back", "camera.stopped"]
    assert list(records["sequence"]) == [0, 1, 2]
    assert role.counters.lost == 1


def test_a_camera_missing_at_start_is_reported_with_the_sentence_and_awaited(play, caplog) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO)
    sentence = "cameras.front: /dev/x does not exist; connected cameras are /dev/video0 (C920)"
    play(*[DeviceUnavailableError(errno.ENOENT, sentence)] * 3, [frame(0)])
    assert names(caplog) == ["camera.lost", "camera.started", "camera.back", "camera.stopped"]
    assert sentence in caplog.text


def test_a_camera_that_goes_again_before_it_delivers_is_no_second_loss(play, caplog) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO)
    gone = OSError(errno.ENODEV, "gone")
    play([frame(0), gone], [None, gone], [gone], [frame(1)])
    assert names(caplog) == ["camera.started", "camera.lost", "camera.back", "camera.stopped"]


def test_a_run_of_damage_is_one_event_and_its_end_says_how_much(play, caplog, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(capture, "CLEAN_AFTER_S", 0.0)
    bad = [frame(n, b"\xff\xd8 no end") for n in range(3)]
    play([*bad, frame(3), None])
    assert names(caplog).count("camera.damaged") >= 1
    assert names(caplog).count("camera.damaged") == names(caplog).count("camera.clean")


def test_frames_of_a_frozen_camera_are_withheld_and_it_is_reported_once(play, caplog, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(FreezeWatch, "SAME_PICTURE_NS", 0)
    same = [frame(n, picture(0)) for n in range(10)]
    role, records = play([*same, frame(10), frame(11)])
    assert names(caplog) == ["camera.started", "camera.frozen", "camera.back", "camera.stopped"]
    assert role.counters.withheld + len(records) == 12
    assert role.counters.withheld >= 6
    assert list(records["sequence"])[-2:] == [10, 11]


def test_a_missing_camera_is_awaited_by_its_name_and_opened_only_when_it_is_there(writer, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(capture, "LOOK_S", 0.0)
    looks = iter([False] * 50 + [True])
    last = Script([frame(0)])
    openings: list[Script | OSError] = [OSError(errno.ENOENT, "not there"), last]

    def opener() -> Script:
        opening = openings.pop(0)
        if isinstance(opening, OSError):
            raise opening
        return opening

    role = capture.Capture(CONFIG, opener, lambda: next(looks), writer)
    role.run(lambda: last.ended)
    assert openings == []
    assert next(looks, None) is None


# What the V4L2 side says, as far as that goes without a camera


def test_a_missing_camera_is_named_with_those_that_are_connected() -> None:
    with pytest.raises(DeviceUnavailableError) as caught:
        V4l2Source("front", CONFIG)
    sentence = str(caught.value.strerror)
    assert sentence.startswith("cameras.front: /dev/v4l/by-id/test does not exist; ")
    assert "connected" in sentence


def test_a_path_that_is_no_video_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^cameras\.front: /dev/null is no video device; "):
        V4l2Source("front", CONFIG.model_copy(update={"device": "/dev/null"}))


# Frozen: a function of frames and times


def watch(has_noise: bool = True, fps: float = FPS) -> FreezeWatch:
    return FreezeWatch(fps, has_noise, now_ns=0)


def test_a_camera_may_take_three_seconds_to_its_first_frame() -> None:
    assert watch().frozen(3 * SECOND) is None
    assert watch().frozen(3 * SECOND + 1) == "no frames"


@pytest.mark.parametrize(("fps", "silence_s"), [(30, 1.0), (120, 1.0), (5, 2.0)])
def test_silence_is_ten_periods_and_at_least_a_second(fps: float, silence_s: float) -> None:
    eyes = watch(fps=fps)
    eyes.saw(b"a", SECOND)
    assert eyes.frozen(SECOND + int(silence_s * SECOND)) is None
    assert eyes.frozen(SECOND + int(silence_s * SECOND) + 1) == "no frames"
    eyes.saw(b"b", 9 * SECOND)
    assert eyes.frozen(9 * SECOND) is None


def test_the_same_picture_for_more_than_two_seconds_is_frozen() -> None:
    eyes = watch()
    times = range(0, 4 * SECOND, SECOND // FPS)
    frozen_at = []
    for t_ns in times:
        eyes.saw(b"same", t_ns)
        if eyes.frozen(t_ns):
            frozen_at.append(t_ns)
    assert 2 * SECOND < frozen_at[0] < 2 * SECOND + 4 * SECOND // FPS
    eyes.saw(b"diff", 5 * SECOND)
    assert eyes.frozen(5 * SECOND) is None


@given(st.lists(st.binary(min_size=3, max_size=3), min_size=2, max_size=200))
def test_pictures_that_change_within_two_seconds_are_never_frozen(contents: list[bytes]) -> None:
    eyes, run, previous = watch(), 0, b""
    for number, content in enumerate(contents):
        run = run + 1 if content == previous else 0
        previous = content
        t_ns = number * SECOND // FPS
        eyes.saw(content, t_ns)
        if run < 2 * FPS:
            assert eyes.frozen(t_ns) is None


def test_a_rendered_picture_may_stay_the_same() -> None:
    eyes = watch(has_noise=False)
    for t_ns in range(0, 10 * SECOND, SECOND // FPS):
        eyes.saw(b"same", t_ns)
        assert eyes.frozen(t_ns) is None


# JPEG


@given(st.integers(0, 4000), st.integers(0, 20))
def test_jpeg_size_is_the_jpegs_own_whatever_is_behind_it(padding: int, number: int) -> None:
    jpeg = picture(number)
    assert jpeg_size(jpeg + bytes(padding)) == len(jpeg)
    assert jpeg_size(memoryview(jpeg + bytes(padding))) == len(jpeg)


@given(st.data())
def test_no_cut_of_a_jpeg_is_taken_for_a_whole_one(data: st.DataObject) -> None:
    jpeg = picture(1)
    assert jpeg_size(jpeg[: data.draw(st.integers(0, len(jpeg) - 1))]) == 0


def yuyv(rgb: tuple[int, int, int], width: int, height: int, stride: int) -> bytes:
    """A plain picture in packed YUYV, BT.601 full range as JPEG has it, lines `stride` bytes apart."""
    r, g, b = rgb
    y = 0.299 * r + 0.587 * g + 0.114 * b
    u, v = 128 + 0.564 * (b - y), 128 + 0.713 * (r - y)
    line = bytes([round(y), round(u), round(y), round(v)]) * (width // 2)
    return (line + bytes(stride - len(line))) * height


@pytest.mark.parametrize("padding", [0, 32])
@pytest.mark.parametrize("rgb", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (30, 90, 150)])
def test_a_yuyv_picture_keeps_its_colours(rgb: tuple[int, int, int], padding: int) -> None:
    encoder = YuyvEncoder(WIDTH, HEIGHT, 2 * WIDTH + padding)
    encoder.take(yuyv(rgb, WIDTH, HEIGHT, 2 * WIDTH + padding))
    jpeg = encoder.encode()
    assert simplejpeg.decode_jpeg_header(jpeg) == (HEIGHT, WIDTH, "YCbCr", "422")
    error = simplejpeg.decode_jpeg(jpeg).astype(int) - rgb
    assert np.abs(error).max() <= 3


def test_a_yuyv_picture_keeps_its_place() -> None:
    data = np.frombuffer(yuyv((0, 0, 0), WIDTH, HEIGHT, 2 * WIDTH), np.uint8).reshape(HEIGHT, 2 * WIDTH).copy()
    data[8:16, 2 * 32 : 2 * 48 : 2] = 235
    encoder = YuyvEncoder(WIDTH, HEIGHT, 2 * WIDTH)
    encoder.take(data.tobytes())
    bright = simplejpeg.decode_jpeg(encoder.encode())[:, :, 1] > 120
    rows, columns = np.nonzero(bright)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 32, 47)


def test_a_yuyv_picture_that_is_too_short_is_refused() -> None:
    encoder = YuyvEncoder(WIDTH, HEIGHT, 2 * WIDTH)
    with pytest.raises(ValueError, match=f"expected {2 * WIDTH * HEIGHT}"):
        encoder.take(bytes(2 * WIDTH * HEIGHT - 1))


def test_an_encoded_picture_is_independent_of_the_drivers_buffer() -> None:
    encoder = YuyvEncoder(WIDTH, HEIGHT, 2 * WIDTH)
    buffer = bytearray(yuyv((30, 90, 150), WIDTH, HEIGHT, 2 * WIDTH))
    view = memoryview(buffer)
    encoder.take(view)
    view.release()
    buffer[:] = bytes(len(buffer))
    assert np.abs(simplejpeg.decode_jpeg(encoder.encode()).astype(int) - (30, 90, 150)).max() <= 3


def test_a_jpeg_without_huffman_tables_decodes_to_the_same_picture() -> None:
    """Some UVC cameras leave them out; libjpeg-turbo falls back to the tables of ITU T.81 K.3."""
    jpeg = picture(3)
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", jpeg, at + 2)
        kept += b"" if jpeg[at + 1] == 0xC4 else jpeg[at : at + 2 + length]
        at += 2 + length
    bare = kept + jpeg[at:]
    assert len(bare) < len(jpeg)
    assert jpeg_size(bare) == len(bare)
    np.testing.assert_array_equal(simplejpeg.decode_jpeg(bare), simplejpeg.decode_jpeg(jpeg))
