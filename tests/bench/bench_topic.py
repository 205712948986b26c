"""What a topic costs beside a pipe and a queue: latency, throughput and processor time between two processes.

`python -m tests.bench.bench_topic` prints the table; `run()` returns the same figures for the budgets and the page of
benchmarks. Every way carries the same frames (640x480x3 bytes, each filled with its number) and the same joint
records, in turns within one run, so that whatever else the machine does hits all of them. A latency is from the moment
before the writer begins to publish to the moment at which the reader holds its own copy, in us; processor time is both
processes' user and system time together. Every frame received is looked at whole: `torn` counts those of two colours.
With `--fifo` (root) writer and reader of the paced exchanges run under SCHED_FIFO, as `execute` does in a cell: that is
what the ways themselves cost, where the figures without it are also the machine's other work.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from device.messages import joints_dtype
from device.topic import TopicReader, TopicWriter

SHAPE = (480, 640, 3)
FRAME = np.dtype([("t_ns", "<i8"), ("number", "<u8"), ("data", "u1", SHAPE)], align=True)
JOINTS = joints_dtype(6)
ROUNDS = 3
FRAMES = 60  # a round, at FRAME_HZ
FRAME_HZ = 30.0
RECORDS = 400  # a round, at RECORD_HZ
RECORD_HZ = 200.0
BURST_S = 1.5  # a writer without a pause
SPAWN = multiprocessing.get_context("spawn")

Summary = dict[str, float]


def run(fifo: bool = False) -> dict[str, Any]:
    """All figures, by name: latencies in us, processor time in us a message, rates in 1/s and GB/s.

    Raises PermissionError if `fifo` is asked for and this user may not have it.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder)
        figures: dict[str, Any] = {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "fifo": fifo}
        for name, dtype, count, rate in (
            ("frame", FRAME, FRAMES, FRAME_HZ),
            ("joints", JOINTS, RECORDS, RECORD_HZ),
        ):
            ways = {"topic": _topic, "pipe": _pipe, "queue": _queue}
            samples: dict[str, list[tuple[list[float], float, int]]] = {way: [] for way in ways}
            with _scheduled(fifo):  # the writers inherit it
                for _ in range(ROUNDS):
                    for way, exchange in ways.items():
                        samples[way].append(exchange(path, dtype, count, rate))
            figures[name] = {way: _summary(rounds) for way, rounds in samples.items()}
        figures["burst"] = {
            "frame": _burst(path, FRAME, 8),
            "joints": _burst(path, JOINTS, 1024),
        }
        figures["calls_us"] = _calls(path)
        figures["torn"] = int(
            sum(way["torn"] for way in figures["frame"].values()) + sum(b["torn"] for b in figures["burst"].values())
        )
        return figures


@contextlib.contextmanager
def _scheduled(fifo: bool) -> Iterator[None]:
    if not fifo:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _summary(rounds: list[tuple[list[float], float, int]]) -> Summary:
    latencies = np.concatenate([latencies for latencies, _, _ in rounds])
    p50, p99 = np.percentile(latencies, (50, 99))
    return {
        "p50_us": float(p50),
        "p99_us": float(p99),
        "max_us": float(latencies.max()),
        "cpu_us": sum(cpu_s for _, cpu_s, _ in rounds) * 1e6 / len(latencies),
        "messages": len(latencies),
        "torn": sum(torn for _, _, torn in rounds),
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _paced(dtype: np.dtype[Any], count: int, rate_hz: float) -> Iterator[npt.NDArray[np.void]]:
    """`count` records on an absolute schedule, each stamped at the last moment."""
    record = np.zeros((), dtype)
    begin = time.monotonic() + 0.05
    for number in range(1, count + 1):
        if "data" in (dtype.names or ()):
            record["data"] = number % 251
            record["number"] = number
        time.sleep(max(0.0, begin + number / rate_hz - time.monotonic()))
        record["t_ns"] = time.monotonic_ns()
        yield record


def _received(record: Any, latencies: list[float]) -> int:
    """Notes the latency of a record just received; 1 if it is torn."""
    latencies.append((time.monotonic_ns() - int(record["t_ns"])) / 1000)
    return int("data" in record.dtype.names and bool((record["data"] != int(record["number"]) % 251).any()))


class _Meter:
    """Processor time of the exchange alone: what is spent on making and checking the frames is taken off."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def __enter__(self) -> None:
        self._begin_s = time.thread_time()

    def __exit__(self, *exception: object) -> None:
        self.spent_s += time.thread_time() - self._begin_s


# --- the three ways, each (path, dtype, count, rate) -> (latencies in us, processor time in s, torn)


def _topic_writer(path: Path, dtype: np.dtype[Any], count: int, rate_hz: float, report: Connection) -> None:
    writer = TopicWriter(path, dtype, 8)
    report.send("ready")
    report.recv()
    meter = _Meter()
    for message in _paced(dtype, count, rate_hz):
        with meter, writer.slot() as record:
            record.reshape(1).view(np.uint8)[:] = message.reshape(1).view(np.uint8)
    report.send(meter.spent_s)


def _topic(folder: Path, dtype: np.dtype[Any], count: int, rate_hz: float) -> tuple[list[float], float, int]:
    path = folder / "topic"
    report, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_topic_writer, args=(path, dtype, count, rate_hz, theirs))
    process.start()
    report.recv()
    reader, copy, meter = TopicReader(path, dtype), np.empty((), dtype), _Meter()
    copy.fill(np.zeros((), dtype))  # its pages are there, as in a role that runs
    _, cursor, _ = reader.since(0)
    latencies: list[float] = []
    torn = 0
    report.send("go")
    end = cursor + count
    while cursor < end:
        with meter:
            reader.wait(5.0, cursor)
            reader.latest(copy)
        cursor += 1
        torn += _received(copy, latencies)
    cpu_s = meter.spent_s + report.recv()
    process.join()
    reader.close()
    return latencies, cpu_s, torn


def _pipe_writer(pipe: Connection, dtype: np.dtype[Any], count: int, rate_hz: float, report: Connection) -> None:
    report.send("ready")
    report.recv()
    meter = _Meter()
    for message in _paced(dtype, count, rate_hz):
        with meter:
            pipe.send_bytes(message.reshape(1).view(np.uint8).data)
    report.send(meter.spent_s)


def _pipe(folder: Path, dtype: np.dtype[Any], count: int, rate_hz: float) -> tuple[list[float], float, int]:
    source, sink = SPAWN.Pipe(duplex=False)
    report, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_pipe_writer, args=(sink, dtype, count, rate_hz, theirs))
    process.start()
    report.recv()
    copy, meter = np.zeros((), dtype), _Meter()
    latencies: list[float] = []
    torn = 0
    report.send("go")
    for _ in range(count):
        with meter:
            source.recv_bytes_into(copy.reshape(1).view(np.uint8))
        torn += _received(copy, latencies)
    cpu_s = meter.spent_s + report.recv()
    process.join()
    return latencies, cpu_s, torn


def _queue_writer(queue: Any, dtype: np.dtype[Any], count: int, rate_hz: float, report: Connection) -> None:
    report.send("ready")
    report.recv()
    before_s = _cpu_s()
    making = _Meter()
    messages = _paced(dtype, count, rate_hz)
    for _ in range(count):
        with making:
            message = next(messages)
        queue.put(message.copy())  # its thread pickles it later, when `message` is the next one
    queue.close()
    queue.join_thread()
    report.send(_cpu_s() - before_s - making.spent_s)


def _queue(folder: Path, dtype: np.dtype[Any], count: int, rate_hz: float) -> tuple[list[float], float, int]:
    queue = SPAWN.Queue()
    report, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_queue_writer, args=(queue, dtype, count, rate_hz, theirs))
    process.start()
    report.recv()
    meter = _Meter()
    latencies: list[float] = []
    torn = 0
    report.send("go")
    for _ in range(count):
        with meter:
            message = queue.get()
        torn += _received(message, latencies)
    cpu_s = meter.spent_s + report.recv()
    process.join()
    return latencies, cpu_s, torn


# --- as fast as it goes


def _burst_writer(path: Path, dtype: np.dtype[Any], slots: int, report: Connection) -> None:
    writer = TopicWriter(path, dtype, slots)
    message = np.zeros((), dtype)
    raw = message.reshape(1).view(np.uint8)
    first, begin = writer.head, time.monotonic()
    report.send("ready")
    while time.monotonic() < begin + BURST_S:
        for _ in range(8):
            number = writer.head + 1
            message["t_ns"] = number
            with writer.slot() as record:
                if "data" in (dtype.names or ()):
                    record["number"] = number
                    record["data"] = number % 251
                else:
                    record.reshape(1).view(np.uint8)[:] = raw
    report.send((writer.head - first) / (time.monotonic() - begin))


def _burst(folder: Path, dtype: np.dtype[Any], slots: int) -> Summary:
    """A writer without a pause, and a reader that takes all that it can."""
    path = folder / "burst"
    report, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_burst_writer, args=(path, dtype, slots, theirs))
    process.start()
    report.recv()
    reader = TopicReader(path, dtype)
    _, cursor, _ = reader.since(0)
    received = lost_total = torn = 0
    begin = time.monotonic()
    while not report.poll():
        if reader.wait(0.1, cursor):
            records, cursor, lost = reader.since(cursor)
            received += len(records)
            lost_total += lost
            if "data" in (dtype.names or ()):
                torn += sum(bool((record["data"] != int(record["number"]) % 251).any()) for record in records)
    seconds = time.monotonic() - begin
    rate = report.recv()
    process.join()
    reader.close()
    return {
        "published_per_s": rate,
        "published_gb_per_s": rate * dtype.itemsize / 1e9,
        "received_per_s": received / seconds,
        "received_gb_per_s": received * dtype.itemsize / seconds / 1e9,
        "lost": lost_total,
        "torn": torn,
    }


def _calls(folder: Path) -> Summary:
    """What one call costs in a loop, in us: the least of several tries, since the machine is shared."""
    writer = TopicWriter(folder / "calls", JOINTS, 1024)
    reader, copy = TopicReader(folder / "calls"), np.empty((), JOINTS)
    names = [name for name in JOINTS.names or () if name != "t_ns"]
    fields = {name: np.zeros(()) if name == "tick" else np.zeros(6) for name in names}

    def slot() -> None:
        with writer.slot() as record:
            record["tick"] = 1

    for t_ns in range(2048):
        writer.publish(t_ns=t_ns, **fields)
    calls: dict[str, Callable[[], object]] = {
        "publish, 10 fields": lambda: writer.publish(t_ns=5000, **fields),
        "slot, 1 field": slot,
        "latest": lambda: reader.latest(copy),
        "since, 1 record": lambda: reader.since(writer.head - 1),
        "since, 1000 records": lambda: reader.since(writer.head - 1000),
    }
    history = TopicWriter(folder / "history", JOINTS, 1024)
    for t_ns in range(2048):
        history.publish(t_ns=t_ns, **fields)
    past = TopicReader(folder / "history")
    calls["at, 1024 records"] = lambda: past.at(1500, "position")
    return {name: _least_us(call) for name, call in calls.items()}


def _least_us(call: Callable[[], object], count: int = 1000, tries: int = 7) -> float:
    least = float("inf")
    for _ in range(tries):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        least = min(least, (time.perf_counter() - begin) / count * 1e6)
    return least


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    policy = "SCHED_FIFO" if figures["fifo"] else "SCHED_OTHER"
    print(f"{figures['cores']} cores, {policy}, load {figures['load_average']:.1f}, Python {sys.version.split()[0]}")
    for name, title in (
        ("frame", f"640x480x3 frame ({FRAME.itemsize} B) at {FRAME_HZ:.0f} Hz"),
        ("joints", f"joints record ({JOINTS.itemsize} B) at {RECORD_HZ:.0f} Hz"),
    ):
        print(f"\n{title:<46}{'p50 us':>9}{'p99 us':>9}{'max us':>9}{'CPU us':>9}{'torn':>6}")
        for way, row in figures[name].items():
            print(
                f"  {way:<44}{row['p50_us']:>9.0f}{row['p99_us']:>9.0f}{row['max_us']:>9.0f}"
                f"{row['cpu_us']:>9.0f}{row['torn']:>6}"
            )
    print(f"\n{'without a pause':<34}{'written/s':>11}{'GB/s':>7}{'read/s':>11}{'GB/s':>7}{'torn':>6}")
    for name, row in figures["burst"].items():
        print(
            f"  {name:<32}{row['published_per_s']:>11.0f}{row['published_gb_per_s']:>7.2f}"
            f"{row['received_per_s']:>11.0f}{row['received_gb_per_s']:>7.2f}{row['torn']:>6}"
        )
    print(f"\n{'one call':<46}{'us':>9}")
    for name, cost_us in figures["calls_us"].items():
        print(f"  {name:<44}{cost_us:>9.1f}")


if __name__ == "__main__":
    show(run("--fifo" in sys.argv[1:]))
