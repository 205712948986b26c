"""Topics: torn records are never read, whatever the writer does, dies of, or is replaced by.

The writers and readers that race are real processes that share nothing but the file. No assertion is about time: a loop
ends by what it has seen, and its deadline only says that the machine is stuck.
"""

from __future__ import annotations

import fcntl
import itertools
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import device.atomics
import device.topic
from device.errors import UnderstudyError
from device.messages import EVENTS, TICKS, chunks_dtype, frames_dtype, goals_dtype, joints_dtype, world_dtype
from device.topic import TopicError, TopicReader, TopicWriter, topic_path
from device.topic_file import HEAD

ROOT = Path(__file__).resolve().parents[1]
STUCK_S = 60.0
SMALL = np.dtype([("t_ns", "<i8"), ("number", "<u8")])
LARGE = np.dtype([("t_ns", "<i8"), ("value", "<f8", (4096,))])  # takes long enough to copy for a writer to get at it

PREAMBLE = """
import os, sys, time
from pathlib import Path
import numpy as np
from device.topic import TopicError, TopicReader, TopicWriter
SMALL = np.dtype([("t_ns", "<i8"), ("number", "<u8")])
LARGE = np.dtype([("t_ns", "<i8"), ("value", "<f8", (4096,))])
path = Path(sys.argv[1])
def say(*words):
    print(*words, flush=True)
"""


class Process:
    """A Python process that runs `code` with the topic's path, and talks by lines."""

    def __init__(self, code: str, path: Path, *arguments: object) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(path), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def hear(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def tell(self, line: str = "") -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    return topic_path(folder, "joints")


@pytest.fixture
def start(path: Path) -> Iterator[Any]:
    """start(code, *arguments) -> Process on the topic `path`; all are killed at the end."""
    processes: list[Process] = []

    def begin(code: str, *arguments: object) -> Process:
        processes.append(Process(code, path, *arguments))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


def publish(writer: TopicWriter, *numbers: int) -> None:
    for number in numbers:
        writer.publish(t_ns=10 * number, number=number)


def is_torn(record: Any) -> bool:
    """In a whole record of the tight writer every word is the record's time in us."""
    return bool((record["value"] != record["t_ns"] / 1000).any())


# --- races between processes

TIGHT_WRITER = """
    writer = TopicWriter(path, LARGE, int(sys.argv[2]))
    for number in range(1, 1 << 40):
        with writer.slot() as record:
            record["t_ns"] = number * 1000
            record["value"] = number
        if number == 1:
            say("writing")
"""


def test_torn_slots_do_happen_where_nothing_is_checked(path: Path, start: Any) -> None:
    start(TIGHT_WRITER, 1).hear()
    reader = TopicReader(path, LARGE)
    ring = reader._ring
    assert ring is not None
    copy = np.empty((), LARGE)
    deadline = time.monotonic() + STUCK_S
    torn = 0
    while torn < 3 and time.monotonic() < deadline:
        np.copyto(copy.reshape(1).view(np.uint8), ring.bytes[0])
        torn += is_torn(copy)
    assert torn >= 3


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_no_torn_slot_is_ever_accepted_from_a_tight_writer(path: Path, start: Any, slots: int) -> None:
    start(TIGHT_WRITER, slots).hear()
    reader = TopicReader(path, LARGE)
    copy = np.empty((), LARGE)
    distinct, reads, last_ns = 0, 0, 0
    deadline = time.monotonic() + STUCK_S
    enough = 20 if slots == 1 else 500
    while (distinct < enough or (slots == 1 and reader.retries == 0)) and time.monotonic() < deadline:
        reads += 1
        record = reader.latest(copy)
        if record is not None:
            assert not is_torn(record)
            assert record["t_ns"] >= last_ns, "went back in time"
            distinct += bool(record["t_ns"] > last_ns)
            last_ns = int(record["t_ns"])
    assert distinct >= enough, f"{distinct} accepted of {reads} reads"
    if slots == 1:
        assert reader.retries > 0, "the check never had anything to do: this test proves nothing"


def test_since_returns_whole_records_in_order_and_counts_the_others(path: Path, start: Any) -> None:
    start(TIGHT_WRITER, 8).hear()
    reader = TopicReader(path, LARGE)
    assert reader._ring is not None
    first = reader._ring.first
    _, begin, _ = reader.since(0)
    cursor, read, lost = begin, 0, 0
    deadline = time.monotonic() + STUCK_S
    while (read < 2000 or lost == 0) and time.monotonic() < deadline:
        records, cursor, missed = reader.since(cursor)
        read, lost = read + len(records), lost + missed
        assert not any(is_torn(record) for record in records)
        assert records["t_ns"].tolist() == [1000 * (n - first) for n in range(cursor - len(records) + 1, cursor + 1)]
        assert read + lost == cursor - begin
    assert read >= 2000
    assert lost > 0


def test_at_interpolates_whole_records_while_the_writer_goes_on(path: Path, start: Any) -> None:
    start(TIGHT_WRITER, 64).hear()
    reader = TopicReader(path, LARGE)
    deadline = time.monotonic() + STUCK_S
    found = 0
    while found < 1000 and time.monotonic() < deadline:
        newest = reader.latest()
        if newest is None:
            continue
        t_ns = int(newest["t_ns"]) - 1000 * (found % 40) - found % 1000
        value = reader.at(t_ns, "value")
        if value is not None:
            np.testing.assert_allclose(value, t_ns / 1000, rtol=1e-12)
            found += 1
    assert found == 1000


PING = """
    import device.topic
    device.topic._SLICE_S = 1e6  # so that nothing but the futex can end a wait
    ours, theirs = TopicWriter(path.with_name("pong"), SMALL, 4), TopicReader(path)
    cursor, seen = 0, 0
    say("ready")
    while seen < int(sys.argv[2]):
        assert theirs.wait(30.0, cursor), "lost wake-up"
        records, cursor, _ = theirs.since(cursor)
        seen = int(records["number"][-1])
        ours.publish(t_ns=0, number=seen)
"""


def test_no_wake_up_is_lost_in_a_thousand_exchanges(path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.topic, "_SLICE_S", 1e6)
    exchanges = 1000
    writer = TopicWriter(path, SMALL, 4)
    assert start(PING, exchanges).hear() == "ready"
    theirs = TopicReader(path.with_name("pong"))
    cursor = 0
    for number in range(1, exchanges + 1):
        publish(writer, number)
        assert theirs.wait(30.0, cursor)
        records, cursor, lost = theirs.since(cursor)
        assert (records["number"].tolist(), lost) == ([number], 0)


READ_ALL = """
    reader, cursor, got = TopicReader(path, SMALL), 0, []
    say("ready")
    while not got or got[-1] != 200:
        assert reader.wait(30.0, cursor)
        records, cursor, lost = reader.since(cursor)
        got += records["number"].tolist()
        assert lost == 0
    say(got == list(range(1, 201)))
"""


def test_two_readers_each_get_every_record(path: Path, start: Any) -> None:
    writer = TopicWriter(path, SMALL, 256)
    readers = [start(READ_ALL), start(READ_ALL)]
    assert [reader.hear() for reader in readers] == ["ready", "ready"]
    publish(writer, *range(1, 201))
    assert [reader.hear() for reader in readers] == ["True", "True"]


# --- writers that die and writers that come back

STOPS_IN_MID_SLOT = """
    writer = TopicWriter(path, LARGE, int(sys.argv[2]))
    for number in (1, 2, 3, 4, 5):
        writer.publish(t_ns=number * 1000, value=number)
    with writer.slot() as record:
        record["t_ns"] = 6000
        record["value"][:2048] = 6
        say("half written")
        sys.stdin.readline()
"""


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_a_writer_killed_in_mid_slot_is_never_read(path: Path, start: Any, slots: int) -> None:
    process = start(STOPS_IN_MID_SLOT, slots)
    reader = TopicReader(path, LARGE)
    assert process.hear() == "half written"
    reader.wait(STUCK_S, 0)
    for _ in ("stopped in mid-slot", "killed"):
        record = reader.latest()
        assert record is not None
        assert record["t_ns"] == 5000
        records, cursor, _ = reader.since(0)
        held = list(range(5, 5 - min(slots - 1, 5), -1))[::-1]  # the half-written slot was the oldest record's
        assert (records["t_ns"] // 1000).tolist() == held
        assert not any(is_torn(record) for record in records)
        assert reader.at(6000, "value") is None
        assert reader.at(5500, "value") is None
        assert reader.at(500, "value") is None
        assert reader.retries == 0
        process.kill()
    writer = TopicWriter(path, LARGE, slots)
    writer.publish(t_ns=7000, value=7)
    records, _, lost = reader.since(cursor)
    assert ((records["t_ns"] // 1000).tolist(), lost) == ([7], 0)


def test_the_only_slot_half_written_is_nothing_to_read(path: Path, start: Any) -> None:
    process = start(STOPS_IN_MID_SLOT, 1)
    assert process.hear() == "half written"
    process.kill()
    reader = TopicReader(path, LARGE)
    assert reader.latest() is None
    assert len(reader.since(0)[0]) == 0


RESTARTS = """
    for number in (1, 2, 3):
        writer = TopicWriter(path, SMALL, 4)
        writer.publish(t_ns=number, number=number)
        writer.close()
        say("written")
        sys.stdin.readline()
"""


def test_a_waiting_reader_follows_a_restarted_writer(path: Path, start: Any) -> None:
    process = start(RESTARTS)
    reader = TopicReader(path)
    cursor = 0
    for number in (1, 2, 3):
        assert reader.wait(STUCK_S, cursor)
        records, cursor, lost = reader.since(cursor)
        assert (records["number"].tolist(), lost) == ([number], 0)
        assert process.hear() == "written"
        process.tell()


def test_a_reader_follows_a_writer_with_another_layout(path: Path) -> None:
    reader = TopicReader(path)
    first = TopicWriter(path, SMALL, 4)
    publish(first, 1, 2)
    latest = reader.latest()
    assert latest is not None
    assert latest["number"] == 2
    _, cursor, _ = reader.since(0)
    publish(first, 3)
    first.close()
    second = TopicWriter(path, TICKS, 16)
    with second.slot() as record:
        record["tick"] = 77
    left, cursor, lost = reader.since(cursor)
    assert (left.dtype, left["number"].tolist(), lost) == (SMALL, [3], 0)
    new, cursor, lost = reader.since(cursor)
    assert (new.dtype, new["tick"].tolist(), lost) == (TICKS, [77], 0)
    latest = reader.latest()
    assert latest is not None
    assert latest["tick"] == 77
    assert reader.dtype == TICKS


def test_polling_latest_notices_a_new_writer_at_the_second_look(path: Path) -> None:
    reader = TopicReader(path)
    first = TopicWriter(path, SMALL, 4)
    publish(first, 1)
    reader.latest()
    publish(first, 2)
    first.close()
    second = TopicWriter(path, SMALL, 4)
    publish(second, 3)
    assert [record["number"] for record in (reader.latest(), reader.latest()) if record is not None] == [2, 3]


def test_records_of_a_writer_that_came_and_went_unseen_count_as_lost(path: Path) -> None:
    reader = TopicReader(path)
    numbers = iter(range(1, 100))
    for count in (2, 3, 1):
        writer = TopicWriter(path, SMALL, 8)
        publish(writer, *(next(numbers) for _ in range(count)))
        writer.close()
        if count == 2:
            _, cursor, _ = reader.since(0)
    records, cursor, lost = reader.since(cursor)
    assert (records["number"].tolist(), lost) == ([6], 3)


def test_numbers_grow_even_where_the_file_was_removed(path: Path) -> None:
    reader = TopicReader(path)
    first = TopicWriter(path, SMALL, 4)
    publish(first, 1, 2)
    _, cursor, _ = reader.since(0)
    path.unlink()  # as systemd does with a RuntimeDirectory
    second = TopicWriter(path, SMALL, 4)
    publish(second, 3)
    assert second.head > cursor
    records, after, lost = reader.since(cursor)
    assert (records["number"].tolist(), lost) == ([3], 0)
    assert after == second.head


def test_closing_leaves_the_last_record_and_unlinking_detaches(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    publish(writer, 1)
    writer.close()
    assert reader.attached
    assert reader.latest() is not None
    with pytest.raises(TopicError, match="closed"):
        publish(writer, 2)
    writer.unlink()
    assert not reader.attached
    assert reader.latest() is None
    assert reader.at(0, "number") is None
    assert not list(path.parent.iterdir())


def test_a_closed_writer_does_not_remove_its_successors_file(path: Path) -> None:
    first = TopicWriter(path, SMALL, 4)
    first.close()
    second = TopicWriter(path, SMALL, 4)
    first.unlink()
    assert path.exists()
    second.unlink()
    assert not path.exists()


# --- one writer

SECOND_WRITER = """
    try:
        TopicWriter(path, SMALL, 4)
    except TopicError as error:
        say(error)
"""


def test_a_second_writer_is_refused_while_the_first_lives(path: Path, start: Any) -> None:
    writer = TopicWriter(path, SMALL, 4)
    sentence = start(SECOND_WRITER).hear()
    assert str(path) in sentence
    assert "has a writer already" in sentence
    with pytest.raises(TopicError, match="has a writer already"):
        TopicWriter(path, SMALL, 4)
    reader = TopicReader(path)
    publish(writer, 1)
    assert reader.latest() is not None, "the refused writer has harmed the first one"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


STARTS_AT_ONCE = """
    say("ready")
    sys.stdin.readline()
    try:
        writer = TopicWriter(path, SMALL, 4)
        say("writer")
    except TopicError:
        say("refused")
    sys.stdin.readline()
"""


def test_of_several_writers_that_start_at_once_one_is_let_in(path: Path, start: Any) -> None:
    processes = [start(STARTS_AT_ONCE) for _ in range(4)]
    assert [process.hear() for process in processes] == ["ready"] * 4
    for process in processes:
        process.tell()
    assert sorted(process.hear() for process in processes) == ["refused"] * 3 + ["writer"]


def test_a_starting_writer_never_builds_over_the_file_of_one_that_was_quicker(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TopicReader(path)
    lock, rivals = fcntl.flock, [True]

    def rival_is_quicker(fd: int, operation: int) -> None:
        if rivals:  # the file that is being built is open and not locked yet
            rivals.pop()
            rival = TopicWriter(path, SMALL, 8)
            publish(rival, 1, 2)
            reader.latest()
            rival.close()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", rival_is_quicker)
    publish(TopicWriter(path, SMALL, 8), 3)
    first, cursor, _ = reader.since(0)
    second, _, lost = reader.since(cursor)
    assert (first["number"].tolist(), second["number"].tolist(), lost) == ([1, 2], [3], 0)


# --- one process, every step by hand

NAMES = st.sampled_from(["publish", "read", "restart"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(NAMES, st.integers(1, 12)), max_size=30), st.integers(1, 6))
def test_what_is_read_and_what_is_lost_is_all_that_was_published(steps: list[tuple[str, int]], slots: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "topic"
        writer, reader = TopicWriter(path, SMALL, slots), TopicReader(path)
        _, cursor, _ = reader.since(0)
        published = accounted = 0
        for step, count in [*steps, ("read", 1), ("read", 1)]:
            if step == "publish":
                publish(writer, *range(published + 1, published + count + 1))
                published += count
            elif step == "restart":
                writer.close()
                writer = TopicWriter(path, SMALL, slots)
            else:
                before = cursor
                records, cursor, lost = reader.since(cursor)
                assert cursor >= before
                first = accounted + lost + 1
                assert records["number"].tolist() == list(range(first, first + len(records)))
                accounted += lost + len(records)
        assert accounted == published
        writer.close()
        reader.close()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 64), st.data())
def test_at_is_numpys_interpolation_inside_the_history_and_none_outside(
    steps: list[int], slots: int, data: st.DataObject
) -> None:
    dtype = np.dtype([("t_ns", "<i8"), ("position", "<f8", (3,)), ("load", "<f4")])
    times = 5 * 10**15 + np.cumsum(steps)
    rng = np.random.default_rng(len(steps))
    positions = rng.normal(0.0, 90.0, (len(times), 3))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        writer, reader = TopicWriter(Path(name) / "joints", dtype, slots), TopicReader(Path(name) / "joints")
        for t_ns, position in zip(times.tolist(), positions, strict=True):
            writer.publish(t_ns=t_ns, position=position, load=position[0])
        held = slice(max(0, len(times) - slots), None)
        oldest, newest = int(times[held][0]), int(times[-1])
        asked = data.draw(st.lists(st.integers(oldest - 5, newest + 5), max_size=20)) + times.tolist()
        for t_ns in asked:
            found = reader.at(t_ns, "position")
            if oldest <= t_ns <= newest:
                assert found is not None
                expected = [np.interp(t_ns - oldest, times[held] - oldest, positions[held, i]) for i in range(3)]
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
                load = reader.at(t_ns, "load")
                assert load is not None
                assert load.dtype == np.float64
                np.testing.assert_allclose(load, expected[0], rtol=1e-4, atol=1e-4)
            else:
                assert found is None
        for t_ns, position in zip(times[held].tolist(), positions[held], strict=True):
            np.testing.assert_array_equal(reader.at(t_ns, "position"), position)
        writer.close()
        reader.close()


def test_the_writer_fences_after_odd_before_even_and_before_head(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TopicWriter(path, SMALL, 4)
    ring = writer._ring
    publish(writer, 1)
    begin = writer.head
    seen: list[tuple[int, int, int]] = []

    def look() -> None:
        word = ring.words[ring.seq_word(begin + 1)]
        number = int(ring.records["number"][(begin + 1) % 4])
        seen.append((word - 2 * begin, number, ring.words[HEAD] - begin))

    monkeypatch.setattr(device.topic, "fence", look)
    publish(writer, 2)
    #               seq   payload  head
    assert seen == [(1, 0, 0), (1, 2, 0), (2, 2, 0)]
    assert ring.words[HEAD] == begin + 1


def hook_fence(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None]) -> None:
    """Has `action` done at the count-th fence from now: 1 is a reader's before its copy, 2 the one after it."""
    fences = itertools.count(1)
    monkeypatch.setattr(device.topic, "fence", lambda: action() if next(fences) == count else None)


@pytest.mark.parametrize("overwritten", [1, 3, 4, 5, 50])
def test_a_copy_that_the_writer_came_round_on_is_thrown_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, overwritten: int
) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    publish(writer, 1, 2, 3, 4, 5)
    hook_fence(monkeypatch, 2, lambda: publish(writer, *range(6, 6 + overwritten)))
    record = reader.latest()
    assert record is not None
    assert record["number"] == (5 if overwritten < 4 else 5 + overwritten)
    assert reader.retries == (0 if overwritten < 4 else 1)


@pytest.mark.parametrize("overwritten", [1, 2, 3, 4, 5, 50])
def test_of_several_records_those_overwritten_while_copied_are_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch, overwritten: int
) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    publish(writer, 1)
    _, cursor, _ = reader.since(0)
    publish(writer, 2, 3, 4)
    hook_fence(monkeypatch, 2, lambda: publish(writer, *range(5, 5 + overwritten)))
    records, cursor, lost = reader.since(cursor)
    kept = [number for number in (2, 3, 4) if number > overwritten]
    assert (records["number"].tolist(), lost) == (kept, 3 - len(kept))
    records, _, lost = reader.since(cursor)
    assert len(records) + lost == overwritten


@pytest.mark.parametrize("overwritten", [0, 1, 2, 3, 8, 50])
def test_at_holds_while_the_history_moves_under_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, overwritten: int
) -> None:
    dtype = np.dtype([("t_ns", "<i8"), ("value", "<f8")])
    writer, reader = TopicWriter(path, dtype, 8), TopicReader(path)
    for number in range(1, 9):
        writer.publish(t_ns=10 * number, value=number)

    def move() -> None:
        for number in range(9, 9 + overwritten):
            writer.publish(t_ns=10 * number, value=number)

    hook_fence(monkeypatch, 1, move)  # between the choice of the newest record and the search
    value = reader.at(35, "value")
    if overwritten < 3:  # records 3 and 4 are there
        assert value == 3.5
    else:
        assert value is None


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    slots=st.integers(2, 8),
    asked=st.lists(st.integers(-20, 500), min_size=1, max_size=8),
)
def test_nearest_is_the_held_record_whose_time_is_nearest(gaps: list[int], slots: int, asked: list[int]) -> None:
    times = list(itertools.accumulate(gaps))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        writer = TopicWriter(topic_path(Path(folder), "frames"), SMALL, slots)
        for number, t_ns in enumerate(times):
            writer.publish(t_ns=t_ns, number=number)
        reader = TopicReader(writer.path)
        for t_ns in asked:
            found = reader.nearest(t_ns)
            assert found is not None
            assert abs(int(found["t_ns"]) - t_ns) == min(abs(held - t_ns) for held in times[-slots:])
            assert times[int(found["number"])] == found["t_ns"]
        assert reader.retries == 0
        writer.close()


def test_nearest_of_nothing_is_nothing_and_of_two_as_near_the_older(path: Path) -> None:
    assert TopicReader(path).nearest(5) is None
    writer = TopicWriter(path, SMALL, 4)
    assert TopicReader(path).nearest(5) is None
    publish(writer, 1, 2)
    found = TopicReader(path).nearest(15)
    assert found is not None
    assert found["number"] == 1
    writer.close()


def test_nearest_returns_whole_records_while_the_writer_goes_on(path: Path, start: Any) -> None:
    start(TIGHT_WRITER, 8).hear()
    reader = TopicReader(path, LARGE)
    found = 0
    deadline = time.monotonic() + STUCK_S
    while found < 200 and time.monotonic() < deadline:
        newest = reader.latest()
        record = None if newest is None else reader.nearest(int(newest["t_ns"]) - 2000)
        if record is not None:
            assert not is_torn(record)
            found += 1
    assert found >= 200


def test_records_without_a_time_have_no_nearest(path: Path) -> None:
    writer = TopicWriter(path, np.dtype([("number", "<u8")]), 2)
    with pytest.raises(TopicError, match="have no t_ns"):
        TopicReader(path).nearest(0)
    writer.close()


def test_an_exception_in_the_block_publishes_nothing(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 2), TopicReader(path)
    publish(writer, 1, 2)
    _, cursor, _ = reader.since(0)
    with pytest.raises(ZeroDivisionError), writer.slot() as record:
        record["number"] = 1 // 0
    latest = reader.latest()
    assert latest is not None
    assert latest["number"] == 2
    assert len(reader.since(cursor)[0]) == 0
    publish(writer, 3)
    records, _, lost = reader.since(cursor)
    assert (records["number"].tolist(), lost) == ([3], 0)


def test_a_slot_in_a_slot_is_refused_and_the_outer_one_is_published(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    with writer.slot() as record:
        record["number"] = 9
        with pytest.raises(TopicError, match="filled already"):
            publish(writer, 1)
    latest = reader.latest()
    assert latest is not None
    assert latest["number"] == 9


@pytest.mark.parametrize("fields", [{"t_ns": 1}, {"t_ns": 1, "number": 2, "other": 3}])
def test_publish_asks_for_every_field_and_no_other(path: Path, fields: dict[str, int]) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    with pytest.raises(TypeError, match=r"expected the fields \['number', 't_ns'\]"):
        writer.publish(**fields)
    assert reader.latest() is None


def test_latest_is_a_copy_and_fills_what_it_is_given(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    out = np.empty((), SMALL)
    publish(writer, 1)
    kept, same = reader.latest(), reader.latest(out)
    publish(writer, *range(2, 20))
    assert kept is not None
    assert same is not None
    assert (kept["number"], same["number"], out["number"]) == (1, 1, 1)
    with pytest.raises(TopicError, match="`out` has"):
        reader.latest(np.empty((), TICKS))
    writer.close()
    with TopicWriter(path, TICKS, 4).slot() as record:
        record["tick"] = 5
    reader.latest()
    with pytest.raises(TopicError, match="`out` has"):
        reader.latest(out)


def test_since_zero_is_what_is_still_held_and_nothing_lost(path: Path) -> None:
    writer = TopicWriter(path, SMALL, 4)
    publish(writer, *range(1, 100))
    records, cursor, lost = TopicReader(path).since(0)
    assert (records["number"].tolist(), cursor, lost) == ([96, 97, 98, 99], writer.head, 0)


def test_a_reader_that_is_far_too_slow_is_told_how_many_it_lost(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 16), TopicReader(path)
    publish(writer, 1)
    _, cursor, _ = reader.since(0)
    publish(writer, *range(2, 1002))
    records, cursor, lost = reader.since(cursor)
    assert records["number"].tolist() == list(range(986, 1002))
    assert lost == 1000 - 16
    assert len(reader.since(cursor)[0]) == 0


def test_a_cursor_that_the_topic_has_not_reached_is_an_error(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    with pytest.raises(TopicError, match="another topic's"):
        reader.since(writer.head + 1)


def test_wait_sees_newer_records_at_once_and_gives_up_in_time(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    assert not reader.wait(0.05)
    assert not reader.wait(0.0, 0)
    publish(writer, 1)
    assert reader.wait(STUCK_S, 0)
    assert not reader.wait(0.05, writer.head)
    assert not reader.wait(0.05), "without a cursor only a record after the call counts"


def test_waiting_with_the_readers_cursor_misses_nothing_since_its_last_look(path: Path) -> None:
    reader = TopicReader(path)
    assert reader.cursor == 0
    writer = TopicWriter(path, SMALL, 4)
    publish(writer, 1)
    assert reader.latest() is not None
    assert reader.cursor == writer.head
    assert not reader.wait(0.05, reader.cursor)
    publish(writer, 2)  # after the look, before the wait
    assert reader.wait(STUCK_S, reader.cursor)


def test_a_reader_may_come_before_its_writer(path: Path) -> None:
    reader = TopicReader(path)
    assert not reader.attached
    assert reader.latest() is None
    assert reader.since(0)[1:] == (0, 0)
    assert reader.at(0, "t_ns") is None
    assert reader.dtype is None
    assert not reader.wait(0.05)
    publish(TopicWriter(path, SMALL, 4), 1)
    assert reader.wait(0.05, 0)
    assert reader.attached


def test_a_reader_cannot_write(path: Path) -> None:
    writer, reader = TopicWriter(path, SMALL, 4), TopicReader(path)
    publish(writer, 1)
    assert reader._ring is not None
    with pytest.raises(TypeError):
        reader._ring.words[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        reader._ring.records[0] = 0


# --- the file

EVERY_DTYPE = [
    frames_dtype(60_000),
    joints_dtype(6),
    goals_dtype(7),
    TICKS,
    chunks_dtype(50, 6),
    EVENTS,
    world_dtype(40),
]


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=lambda dtype: dtype.names[1] + str(dtype.itemsize))
def test_the_file_tells_its_dtype(path: Path, dtype: np.dtype[Any]) -> None:
    writer = TopicWriter(path, dtype, 3)
    filled = np.frombuffer(np.random.default_rng(1).bytes(dtype.itemsize), dtype)[0]
    with writer.slot() as record:
        record[...] = filled
    reader = TopicReader(path)
    latest = reader.latest()
    assert latest is not None
    assert reader.dtype == latest.dtype == dtype
    for name in dtype.names or ():
        assert latest[name].tobytes() == filled[name].tobytes()


def test_another_dtype_than_expected_is_named_with_the_one_found(path: Path) -> None:
    early = TopicReader(path, joints_dtype(7))
    writer = TopicWriter(path, joints_dtype(6), 4)
    for attach in (lambda: TopicReader(path, joints_dtype(7)), early.latest, lambda: early.since(0)):
        with pytest.raises(TopicError, match=r"\(6,\).*expects.*\(7,\)"):
            attach()
    writer.close()
    TopicWriter(path, joints_dtype(7), 4)
    assert early.attached


@pytest.mark.parametrize("field", ["number", "position", "t_ns"])
def test_only_float_fields_are_interpolated(path: Path, field: str) -> None:
    publish(TopicWriter(path, SMALL, 4), 1)
    with pytest.raises(TopicError, match="cannot interpolate"):
        TopicReader(path).at(10, field)


@pytest.mark.parametrize("kept", [0, 8, 100, 4096, -1])
def test_a_truncated_file_is_refused_by_readers_and_replaced_by_a_writer(path: Path, kept: int) -> None:
    TopicWriter(path, SMALL, 4).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(TopicError, match="is not a topic" if kept == 0 else "is truncated") as refusal:
        TopicReader(path)
    assert str(path) in str(refusal.value)
    if kept:
        publish(TopicWriter(path, SMALL, 4), 1)
        assert TopicReader(path).latest() is not None


def test_a_foreign_file_is_neither_read_nor_overwritten(path: Path) -> None:
    path.write_bytes(b"somebody's notes" * 1000)
    for use in (lambda: TopicReader(path), lambda: TopicWriter(path, SMALL, 4)):
        with pytest.raises(TopicError, match="not a topic"):
            use()
    assert path.read_bytes() == b"somebody's notes" * 1000


def test_a_file_of_another_layout_version_is_named(path: Path) -> None:
    TopicWriter(path, SMALL, 4).close()
    content = bytearray(path.read_bytes())
    content[8] = 9
    path.write_bytes(content)
    with pytest.raises(TopicError, match="layout 9"):
        TopicReader(path)
    TopicWriter(path, SMALL, 4)
    assert TopicReader(path).attached


NO_ROOM = """
    import resource
    if sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        TopicWriter(path, SMALL, 1 << 16)
    except TopicError as error:
        say(error)
    say(sorted(os.listdir(path.parent)))
"""


def test_too_little_room_is_an_error_at_start(path: Path, start: Any) -> None:
    process = start(NO_ROOM, "limit")
    sentence = process.hear()
    assert str(path) in sentence
    assert "needs 8392704 bytes" in sentence
    assert process.hear() == "[]"


def test_a_full_tmpfs_is_an_error_at_start(folder: Path) -> None:
    mount = folder / "tmpfs"
    mount.mkdir()
    code = PREAMBLE + textwrap.dedent(NO_ROOM)
    script = (
        f'mount -t tmpfs -o size=1m none {mount} && echo mounted && exec {sys.executable} -c "$0" {mount}/joints full'
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    lines = done.stdout.splitlines()
    if lines[:1] != ["mounted"]:
        pytest.skip(f"no tmpfs of our own can be mounted here: {done.stderr.strip()}")
    assert "No space left on device" in lines[1]
    assert "needs 8392704 bytes" in lines[1]
    assert lines[2] == "[]"


@pytest.mark.parametrize(
    ("dtype", "slots"), [("f8", 4), (SMALL, 0), ([("x", "O")], 4)], ids=["unstructured", "no slots", "objects"]
)
def test_what_cannot_be_a_topic_is_refused(path: Path, dtype: Any, slots: int) -> None:
    with pytest.raises(TopicError, match="structured dtype"):
        TopicWriter(path, dtype, slots)
    assert not list(path.parent.iterdir())


def test_a_name_with_a_slash_is_a_file_in_a_folder(folder: Path) -> None:
    path = topic_path(folder, "frames/front")
    assert path == folder / "frames" / "front"
    publish(TopicWriter(path, SMALL, 4), 1)
    assert TopicReader(path).latest() is not None


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../joints", "frames//front", "frames/", "a b", ".joints"])
def test_a_name_that_leads_elsewhere_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(TopicError, match="topic name"):
        topic_path(folder, name)


# --- what it stands on


def test_without_libatomic_nothing_starts_and_the_package_is_named() -> None:
    with pytest.raises(UnderstudyError, match="apt install libatomic1"):
        device.atomics.load_fence("libatomic.so.0.nowhere")


def test_the_futex_is_known_on_the_machines_that_we_ship_on_and_no_other() -> None:
    assert device.atomics.futex_number("x86_64", "little") == 202
    assert device.atomics.futex_number("aarch64", "little") == 98
    for machine, order in (("riscv64", "little"), ("aarch64", "big")):
        with pytest.raises(UnderstudyError, match="aarch64 or x86_64"):
            device.atomics.futex_number(machine, order)
