"""Topics: how the roles of a cell exchange data, lock-free, through one memory-mapped file each.

One writer, any number of readers, a ring of fixed-size slots. The writer never waits; a reader never blocks the
writer (it maps the file read-only), never accepts a torn slot, and follows a writer that is restarted, with another
layout too. Every role uses this module with the dtypes of device/messages.py; device/topic_file.py makes the files.
Records are numbered, and go on being numbered from one writer to the next, so that a cursor never goes backwards.

Slot protocol. Record n lives in slot n % slots. The writer does `seq = 2n-1; FENCE; payload; FENCE; seq = 2n; FENCE;
head = n; wake`; the reader does `n = head; FENCE; copy; FENCE; seq == 2n?`. Seeing head = n, the reader's first fence
pairs with the writer's last one: seq was 2n before the copy began. If the copy saw one byte of the slot's next record,
the reader's second fence pairs with the writer's first one of that record: seq is found past 2n, and it only grows.
Without the fence after the odd store ARM64 may show the payload before it, since a release store does not order later
stores (Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from device.atomics import fence, futex_wait, futex_waker
from device.topic_file import HEAD, Record, Ring, TopicError, create

__all__ = ["TopicError", "TopicReader", "TopicWriter", "topic_path"]

_TRIES = 4  # copies of one record before a reader gives up; in a ring of 4 slots or more the first one holds
_SLICE_S = 0.25  # how long a waiter may sleep on a file that was replaced in the moment before it fell asleep
_ATTACH_POLL_S = 0.02  # there is no futex to sleep on before there is a file
_UNKNOWN = np.dtype([("t_ns", "<i8")])  # of no records at all, while there is no file to say it
_NO_OUT = (np.empty((), _UNKNOWN), np.empty(0, np.uint8))


def topic_path(runtime: Path, name: str) -> Path:
    """Where the topic `name` of a cell lives; `frames/front` is a file in a subdirectory."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name, re.ASCII):
        raise TopicError(f"topic name {name!r}: expected letters, digits, _ . - and single slashes between words")
    return runtime / name


class TopicWriter:
    """The one writer of a topic; `head` is the number of the newest record."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, slots: int) -> None:
        """Creates `path` (and its folder) with room for `slots` records of the structured `dtype`.

        A dead writer's file is replaced, and its readers follow. Raises TopicError if another writer lives, if the
        file system is full, or if `path` is something else than a topic.
        """
        self.path = Path(path)
        records = np.dtype(dtype)
        if records.names is None or records.hasobject or slots < 1:
            raise TopicError(
                f"{path}: expected a structured dtype without objects and at least 1 slot, got {records} and {slots}"
            )
        self._fd, self._ring = create(self.path, records, slots)
        self.head = self._ring.first
        self._fields = frozenset(records.names)
        self._slot: _Slot | None = _Slot(self, self._ring)

    def slot(self) -> _Slot:
        """`with writer.slot() as record:` fill the record in place; it is published on exit.

        The view (0-d structured array) holds an older record's bytes: fill every field that a reader looks at, and
        let go of it after the block. An exception that leaves the block publishes nothing.
        """
        if self._slot is None:
            raise TopicError(f"{self.path}: this writer is closed")
        return self._slot

    def publish(self, **fields: Any) -> int:
        """Publishes a record of exactly the dtype's fields; returns its number. Raises TypeError for other fields."""
        if fields.keys() != self._fields:
            raise TypeError(f"{self.path}: expected the fields {sorted(self._fields)}, got {sorted(fields)}")
        with self.slot() as record:
            for name, value in fields.items():
                record[name] = value
        return self.head

    def close(self) -> None:
        """Gives the topic up and leaves the file: readers keep the last records, another writer may follow."""
        if self._slot is not None:
            self._slot = None
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # not left to close(): mmap duplicates the descriptor
            os.close(self._fd)
            self._ring.close()

    def unlink(self) -> None:
        """Closes and removes the file, unless it is another writer's by now; its readers are detached."""
        if not self._ring.replaced(str(self.path)):
            self.path.unlink()
        self.close()


class _Slot:
    """What TopicWriter.slot() returns; one object for all records, since a control loop should not allocate."""

    def __init__(self, writer: TopicWriter, ring: Ring) -> None:
        self._writer = writer
        self._ring = ring
        self._views: list[Record | None] = [None] * ring.slots
        self._open = False
        self._wake = futex_waker(ring.head_address)

    def __enter__(self) -> Record:
        if self._open:
            raise TopicError(f"{self._writer.path}: a slot is being filled already; leave its block first")
        ring = self._ring
        n = self._writer.head + 1
        at = n % ring.slots
        view = self._views[at]
        if view is None:
            view = self._views[at] = ring.records[at : at + 1].reshape(())
        self._open = True
        ring.words[ring.seq_word(n)] = 2 * n - 1
        fence()
        return view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        if kind is not None:
            return  # seq stays odd: the slot is nobody's until the next record, which gets the same number
        ring = self._ring
        n = self._writer.head + 1
        fence()
        ring.words[ring.seq_word(n)] = 2 * n
        fence()
        ring.words[HEAD] = self._writer.head = n
        # Always: a count of waiters, by which one might skip this, would be the readers' to write, and they map the
        # file read-only. It costs 1 us. No wake-up is lost: the kernel compares head again before it puts one to sleep.
        self._wake()


class TopicReader:
    """A reader of a topic whose writer may not have come yet, may die, and may come back with another layout.

    `retries` counts the copies thrown away because the writer came round meanwhile: a health figure, 0 in a sound cell.
    The constructor and every call raise TopicError if the file is no topic, or not of the `dtype` that is expected.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike | None = None) -> None:
        self.path = Path(path)
        self.retries = 0
        self._name = str(path)
        self._expected = None if dtype is None else np.dtype(dtype)
        self._ring: Ring | None = None
        self._head = -1  # at the last look
        self._out: tuple[Record, npt.NDArray[np.uint8]] = _NO_OUT
        self._series: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[Any]]] = {}
        self._follow()

    @property
    def attached(self) -> bool:
        """Whether a writer's file is there (the writer itself may be dead: judge by the records' t_ns)."""
        return self._follow() is not None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The records' dtype as the file has it; None while detached."""
        ring = self._follow()
        return None if ring is None else ring.dtype

    @property
    def cursor(self) -> int:
        """The number of the newest record at the last call that looked: for `wait`, without missing what came since."""
        return max(self._head, 0)

    def latest(self, out: Record | None = None) -> np.void | None:
        """The newest record, a copy (into `out`, 0-d of the topic's dtype, if given).

        None if there is none yet, or if the writer overwrote it while it was copied, several times running.
        """
        for _ in range(_TRIES):
            ring = self._look()
            if ring is None or self._head == ring.first:
                return None
            n = self._head
            fence()
            if ring.whole(n):  # else it would be a copy for nothing
                target, raw = self._target(ring, out)
                np.copyto(raw, ring.bytes[n % ring.slots])
                fence()
                if ring.whole(n):
                    return cast(np.void, target[()])  # numpy's stubs take it for an array
            self.retries += 1
        return None

    def since(self, cursor: int) -> tuple[Record, int, int]:
        """All records after `cursor`, oldest first; the cursor to go on from; how many in between were overwritten.

        Cursor 0 is "the oldest still held" and loses nothing. What a dead writer left is handed out before its
        successor's records, never both at once (their dtypes may differ); records of writers that came and went
        between two calls count as lost. Where a file was removed in between, what it held is not known, nor counted.
        The cursor never decreases. Raises TopicError for a cursor that the topic has not reached.
        """
        ring = self._ring
        if ring is None or ring.words[HEAD] <= max(cursor, ring.first):
            ring = self._follow()
        if ring is None:
            return np.empty(0, _UNKNOWN if self._expected is None else self._expected), cursor, 0
        head = ring.words[HEAD]
        fence()
        if cursor > head:
            raise TopicError(f"{self.path}: cursor {cursor} is beyond the newest record, {head}; another topic's?")
        start = max(ring.oldest(head), cursor + 1)
        records = np.empty(head + 1 - start, ring.dtype)
        _unroll(ring.bytes, start, records.view(np.uint8).reshape(len(records), ring.dtype.itemsize))
        fence()
        # The writer overwrites oldest first: everything up to the last torn one is gone.
        whole = next((n for n in range(start, head + 1) if ring.whole(n)), head + 1)
        records = records[whole - start :]
        lost = head - len(records) - max(cursor, ring.origin) if cursor else 0
        return records, head, lost

    def at(self, t_ns: int, field: str) -> npt.NDArray[np.float64] | None:
        """The float `field` at the time `t_ns` (CLOCK_MONOTONIC), float64 of the field's shape.

        Linear between the two records around it, by their `t_ns`, which must not decrease from record to record.
        None outside of the history: never extrapolates. Raises TopicError if the topic has no such float field.
        """
        for _ in range(_TRIES):
            ring = self._look()
            if ring is None:
                return None
            times, values = self._history(ring, field)
            head = self._head
            around = _around(ring, times, head, t_ns)
            if around is None:
                return None
            oldest, before, after = around
            t0_ns, t1_ns = times.item(before % ring.slots), times.item(after % ring.slots)
            v0, v1 = (np.array(values[n % ring.slots], np.float64) for n in (before, after))
            fence()
            # Two whole records around t_ns prove the search right, whatever the writer did to the others meanwhile.
            if ring.whole(before) and ring.whole(after):
                if t_ns == t1_ns:
                    return v1
                if t0_ns < t_ns < t1_ns:
                    part = (t_ns - t0_ns) / (t1_ns - t0_ns)
                    return np.asarray(v0 * (1.0 - part) + v1 * part)
                if (t_ns > t1_ns and after == head) or (t_ns < t0_ns and before == oldest):
                    return None
            self.retries += 1
        return None

    def nearest(self, t_ns: int) -> np.void | None:
        """The record whose `t_ns` is nearest to the given one, the older of two that are as near; a copy.

        Records' `t_ns` must not decrease. None if there is none, or if the writer came round several times running.
        Raises TopicError if the topic's records have no time.
        """
        for _ in range(_TRIES):
            ring = self._look()
            if ring is None:
                return None
            if "t_ns" not in (ring.dtype.names or ()):
                raise TopicError(f"{self.path}: records of {ring.dtype} have no t_ns to be found by")
            times = ring.records["t_ns"]
            head = self._head
            around = _around(ring, times, head, t_ns)
            if around is None:
                return None
            oldest, before, after = around
            t0_ns, t1_ns = times.item(before % ring.slots), times.item(after % ring.slots)
            nearest = after if abs(t1_ns - t_ns) < abs(t_ns - t0_ns) else before
            target, raw = self._target(ring, None)
            np.copyto(raw, ring.bytes[nearest % ring.slots])
            fence()
            # As in `at`: two whole records around t_ns, or the end of the history before it.
            right = t0_ns <= t_ns <= t1_ns or (t_ns > t1_ns and after == head) or (t_ns < t0_ns and before == oldest)
            if right and ring.whole(before) and ring.whole(after):
                return cast(np.void, target[()])
            self.retries += 1
        return None

    def wait(self, timeout_s: float, cursor: int | None = None) -> bool:
        """Sleeps until there is a record after `cursor` (None: after this call); False if `timeout_s` passed first.

        Sleeps on the futex in the file; a writer that is restarted meanwhile wakes it with its first record too.
        """
        deadline = time.monotonic() + timeout_s
        if cursor is None:
            ring = self._follow()
            cursor = 0 if ring is None else ring.words[HEAD]
        while True:
            if self._ring is not None and self._ring.words[HEAD] > max(cursor, self._ring.first):
                return True
            ring = self._follow()
            head = 0 if ring is None else ring.words[HEAD]
            if ring is not None and head > max(cursor, ring.first):
                return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if ring is None:
                time.sleep(min(left_s, _ATTACH_POLL_S))
            else:
                futex_wait(ring.head_address, head, min(left_s, _SLICE_S))

    def close(self) -> None:
        """Lets the file go. A later call attaches again."""
        self._series.clear()
        self._out = _NO_OUT
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _look(self) -> Ring | None:
        """The ring to read, its head in `_head`.

        A head that stands still is the occasion to look whether the file was replaced: the stat costs 2 us, a live
        topic never pays it, and a restarted writer is noticed at the second look at the latest.
        """
        ring = self._ring
        if ring is None or ring.words[HEAD] == self._head:
            ring = self._follow()
        if ring is not None:
            self._head = ring.words[HEAD]
        return ring

    def _follow(self) -> Ring | None:
        """The ring of the file that has the topic's name now."""
        if self._ring is not None:
            if not self._ring.replaced(self._name):
                return self._ring
            self.close()
        try:
            fd = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            ring = Ring(self.path, fd, mmap.PROT_READ)
        finally:
            os.close(fd)
        if self._expected is not None and ring.dtype != self._expected:
            found = ring.dtype
            ring.close()
            raise TopicError(
                f"{self.path} holds records of {found}, this reader expects {self._expected}: writer and reader run "
                "from different cell files or versions; restart both from one"
            )
        self._ring = ring
        return ring

    def _target(self, ring: Ring, out: Record | None) -> tuple[Record, npt.NDArray[np.uint8]]:
        """The record to fill, and its memory as bytes. Checked once for an `out` that is given again and again:

        to compare two structured dtypes costs more than all the rest of a look."""
        if out is not None and out is self._out[0]:
            return self._out
        if out is None:
            record: Record = np.empty((), ring.dtype)
            return record, record.reshape(1).view(np.uint8)
        if out.dtype != ring.dtype or out.shape != ():
            raise TopicError(f"{self.path} holds records of {ring.dtype}; `out` has {out.dtype} and shape {out.shape}")
        self._out = (out, out.reshape(1).view(np.uint8))
        return self._out

    def _history(self, ring: Ring, field: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        series = self._series.get(field)
        if series is None:
            fields = ring.dtype.fields
            if fields is None or "t_ns" not in fields or field not in fields or fields[field][0].base.kind != "f":
                raise TopicError(f"{self.path}: cannot interpolate {field!r} by t_ns in records of {ring.dtype}")
            series = self._series[field] = (ring.records["t_ns"], ring.records[field])
        return series


def _unroll(ring: npt.NDArray[Any], start: int, out: npt.NDArray[Any]) -> None:
    """Copies len(out) slots from number `start` on, round the end of the ring."""
    at = start % len(ring)
    split = min(len(out), len(ring) - at)
    np.copyto(out[:split], ring[at : at + split])
    if split < len(out):
        np.copyto(out[split:], ring[: len(out) - split])


def _around(ring: Ring, times: npt.NDArray[np.int64], head: int, t_ns: int) -> tuple[int, int, int] | None:
    """Numbers of the oldest record, and of the two around t_ns (the same one twice outside the history).

    None if there is no record. Only whole records around t_ns, found so afterwards, prove that the search was right.
    """
    fence()
    oldest = ring.oldest(head)
    if not ring.whole(oldest):  # there is none, or the writer is at it
        oldest += 1
    if oldest > head:
        return None
    after = _first_not_before(t_ns, times, oldest, head, ring.slots)
    return oldest, max(after - 1, oldest), min(after, head)


def _first_not_before(t_ns: int, times: npt.NDArray[np.int64], oldest: int, head: int, slots: int) -> int:
    """The first record n of oldest..head with times[n % slots] >= t_ns; head + 1 if there is none."""
    low, high = oldest, head + 1
    while low < high:
        middle = (low + high) // 2
        if times.item(middle % slots) < t_ns:
            low = middle + 1
        else:
            high = middle
    return low
