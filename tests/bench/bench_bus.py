"""Servo transaction of a tick (read 6 joints, write 6 goals): our bus against the maker's SDK.

They talk in turns in one run to the same emulated servos, a process of its own that keeps to the wire's speed at
1 Mbaud. Wall time is what a tick waits, CPU time what it burns meanwhile. On a busy machine the servos' process
wakes up late and caches are cold, for all of them: the last line of the table is what nobody can go below.
Before each tick of the SDK the input is emptied for it, outside the measurement: by itself it takes a late reply to
the last request for the reply to this one, and from then on runs one tick behind, which would flatter it.
`python -m tests.bench.bench_bus [TICKS]` prints the table.
"""

import os
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scservo_sdk

from firmware_bridge import packets, registers
from firmware_bridge.bus import ServoBus
from firmware_bridge.serial_port import close_port, open_port

IDS = (1, 2, 3, 4, 5, 6)
BAUDRATE = 1_000_000
GOAL_RAW = 2048
TICKS = 1000

SERVE = """
import contextlib, os
from firmware_bridge.virtual_servos import serve
with contextlib.suppress(PermissionError):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))  # hardware does not wait for a CPU
serve(range(1, 7))
"""


class SdkBus:
    """The same transaction as LeRobot and the SDK's examples do it."""

    def __init__(self, port: str) -> None:
        self._port, packet_handler = scservo_sdk.PortHandler(port), scservo_sdk.PacketHandler(0)
        self._port.openPort()
        self._port.setBaudRate(BAUDRATE)
        address, size = registers.FEEDBACK_ADDRESS, registers.FEEDBACK_SIZE
        self._reader = scservo_sdk.GroupSyncRead(self._port, packet_handler, address, size)
        self._writer = scservo_sdk.GroupSyncWrite(self._port, packet_handler, registers.GOAL_POSITION.address, 2)
        for servo_id in IDS:
            self._reader.addParam(servo_id)

    def tick(self) -> bool:
        result = self._reader.txRxPacket()
        for servo_id in IDS:
            for name in ("Present_Position", "Present_Velocity", "Present_Load", "Present_Current"):
                register = registers.register(name)
                self._reader.getData(servo_id, register.address, register.size)
        self._writer.clearParam()
        for servo_id in IDS:
            self._writer.addParam(servo_id, [GOAL_RAW & 0xFF, GOAL_RAW >> 8])
        self._writer.txPacket()
        return bool(result == scservo_sdk.COMM_SUCCESS)

    def drop_late_bytes(self) -> None:
        self._port.ser.reset_input_buffer()

    def close(self) -> None:
        self._port.closePort()


class OurBus:
    def __init__(self, port: str) -> None:
        self._bus = ServoBus(port, IDS, BAUDRATE, timeout_s=0.05)  # as patient as the SDK
        self._goals = np.full(len(IDS), GOAL_RAW, np.int32)

    def tick(self) -> bool:
        good = bool(self._bus.read().valid.all())
        self._bus.write_goals(self._goals)
        return good

    def drop_late_bytes(self) -> None:
        """It does so by itself."""

    def close(self) -> None:
        self._bus.close()


def wire_ms() -> float:
    """What the bytes of one tick's read take on the wire; the write is on its way when a tick ends."""
    request = packets.sync_read(IDS, registers.FEEDBACK_ADDRESS, registers.FEEDBACK_SIZE)
    replies = len(IDS) * (registers.FEEDBACK_SIZE + packets.OVERHEAD)
    return packets.wire_time_s(len(request) + replies, BAUDRATE) * 1e3


def measure(make: Callable[[str], Any], path: str, ticks: int) -> dict[str, list[float]]:
    """Wall and CPU milliseconds of each good tick."""
    bus = make(path)
    wall, cpu = [], []
    for _ in range(ticks):
        time.sleep(0.003)  # the goals of the tick before are off the wire
        bus.drop_late_bytes()
        cpu_ns, wall_ns = time.process_time_ns(), time.perf_counter_ns()
        good = bus.tick()
        wall_ns, cpu_ns = time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns
        if good:
            wall.append(wall_ns / 1e6)
            cpu.append(cpu_ns / 1e6)
    bus.close()
    return {"wall": wall, "cpu": cpu}


class BareBus:
    """The same bytes with nothing around them: a write, reads until all is there, a write. What the system costs."""

    def __init__(self, port: str) -> None:
        self._port = open_port(port, BAUDRATE)
        os.set_blocking(self._port, True)
        self._request = packets.sync_read(IDS, registers.FEEDBACK_ADDRESS, registers.FEEDBACK_SIZE)
        goal = registers.GOAL_POSITION.encode(GOAL_RAW)
        self._goals = packets.sync_write(IDS, registers.GOAL_POSITION.address, [goal] * len(IDS))

    def tick(self) -> bool:
        os.write(self._port, self._request)
        missing = len(IDS) * (registers.FEEDBACK_SIZE + packets.OVERHEAD)
        while missing > 0:
            missing -= len(os.read(self._port, 4096))
        os.write(self._port, self._goals)
        return missing == 0

    def drop_late_bytes(self) -> None:
        termios.tcflush(self._port, termios.TCIFLUSH)

    def close(self) -> None:
        close_port(self._port)


BUSES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "ours": ("firmware_bridge.ServoBus", OurBus),
    "sdk": ("SDK GroupSyncRead/Write", SdkBus),
    "bare": ("system calls, nothing else", BareBus),
}


def run(ticks: int = TICKS) -> dict[str, Any]:
    """Measure; returns milliseconds and the ratio of CPU times."""
    rounds = 5
    results: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in BUSES}
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            path = server.stdout.readline().strip()
            for _round in range(rounds):  # in turns, so that all see the same machine
                for name, (_, make) in BUSES.items():
                    for key, values in measure(make, path, ticks // rounds).items():
                        results[name][key] += values
        finally:
            server.terminate()
    figures: dict[str, Any] = {"ticks": ticks, "wire_ms": wire_ms()}
    for name, kept in results.items():
        figures[name] = {
            "wall_ms": summary(kept["wall"]),
            "cpu_ms": summary(kept["cpu"]),
            "cpu_mean_ms": float(np.mean(kept["cpu"])),
            "good": len(kept["wall"]) / ticks,
        }
    figures["cpu_ratio"] = figures["ours"]["cpu_mean_ms"] / figures["sdk"]["cpu_mean_ms"]
    figures["wall_over_wire_ms"] = figures["ours"]["wall_ms"]["p50"] - figures["wire_ms"]
    return figures


def summary(values: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print(f"servo transaction, {len(IDS)} joints, {figures['ticks']} ticks, wire time {figures['wire_ms']:.2f} ms\n")
    print(f"| {'':26} | wall p50 ms | wall p99 ms | CPU mean ms | CPU p99 ms | good ticks |")
    print(f"|{'-' * 28}|------------:|------------:|------------:|-----------:|-----------:|")
    for name, (label, _) in BUSES.items():
        row = figures[name]
        wall, cpu = row["wall_ms"], row["cpu_ms"]
        print(
            f"| {label:26} | {wall['p50']:11.2f} | {wall['p99']:11.2f} | {row['cpu_mean_ms']:11.3f} "
            f"| {cpu['p99']:10.3f} | {row['good']:10.1%} |"
        )
    print(
        f"\nCPU: {figures['cpu_ratio']:.2f} of the SDK's; wall p50: wire time + {figures['wall_over_wire_ms']:.2f} ms"
    )


if __name__ == "__main__":
    show(run(int(sys.argv[1]) if len(sys.argv) > 1 else TICKS))
