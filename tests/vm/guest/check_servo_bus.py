"""The servo bus over a USB serial adapter: transactions at control rate, the adapter pulled out and plugged in again.

firmware_bridge's own ServoBus talks to the virtual servos through the kernel's cdc_acm driver, as it does to a real
arm. `Arm` is the least that a control loop does with a bus: read, write, and on BusLost reopen until it is back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from device.messages import Mode
from firmware_bridge.bus import BusLost, PortUnavailable, ServoBus
from tests.vm.guest.adapter import BAUDRATE, BY_ID, Adapter
from tests.vm.guest.checks import check, wait_for_path
from tests.vm.guest.role import Role, write_cell

WORK = Path("/run/check-servo-bus")
IDS = (1, 2, 3, 4, 5, 6)
PERIOD_S = 1 / 60
BUS_EVENTS = ["bus.lost", "bus.back"]
# A single emulated processor runs servos, adapter and loop in turn; on hardware the default is wire time and 5 ms.
TIMEOUT_S = 0.05


@dataclass
class Arm:
    """A control loop at 60 Hz that survives its adapter."""

    bus: ServoBus
    goal: int = 2048
    ticks: int = 0
    complete: int = 0
    lost: list[float] = field(default_factory=list)  # when BusLost was raised
    back: list[float] = field(default_factory=list)  # when reopen succeeded
    reason: str = ""
    durations_ms: list[float] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        due = time.monotonic()
        while due < end:
            self._tick()
            due = max(due + PERIOD_S, time.monotonic() - PERIOD_S)
            time.sleep(max(0.0, due - time.monotonic()))

    def _tick(self) -> None:
        self.ticks += 1
        try:
            if len(self.lost) > len(self.back):
                self.bus.reopen()
                self.back.append(time.monotonic())
            start = time.monotonic()
            state = self.bus.read()
            self.bus.write_goals(np.full(len(IDS), self.goal))
            self.durations_ms.append((time.monotonic() - start) * 1e3)
            self.complete += bool(state.valid.all())
        except BusLost as error:
            self.lost.append(time.monotonic())
            self.reason = str(error)
        except PortUnavailable:
            pass  # not back yet


def check_transactions(arm: Arm) -> None:
    with check("six servos at 60 Hz over the adapter: one read and one write a tick") as row:
        arm.run(3)
        row.note(f"{arm.complete} of {arm.ticks} ticks complete")
        row.note(f"read and write {np.median(arm.durations_ms):.1f} ms, worst {max(arm.durations_ms):.1f} ms")
        counters = arm.bus.counters
        row.note(f"{counters.timeouts} timeouts, {counters.checksum_errors} checksum errors")
        row.expect(arm.complete > 0.95 * arm.ticks, "replies are missing")
        row.expect(counters.checksum_errors == 0, "replies are damaged")
        row.expect(not arm.lost, f"lost: {arm.reason}")
    with check("the servos go where they are told") as row:
        reached = move(arm, 2300)
        row.note(f"told 2300, at {reached}")
        row.expect(all(abs(position - 2300) < 30 for position in reached), "they do not")


def move(arm: Arm, goal: int) -> list[int]:
    arm.goal = goal
    arm.run(2)
    return [int(position) for position in arm.bus.state.position_raw]


def check_replug(arm: Arm, adapter: Adapter) -> None:
    with check("adapter pulled out in mid-motion, plugged in again 2 s later") as row:
        arm.goal = 1900
        arm.run(0.1)
        pulled_s = time.monotonic()
        adapter.pull_out()
        arm.run(2)
        row.expect(len(arm.lost) == 1, f"BusLost {len(arm.lost)} times, after {arm.ticks} ticks")
        row.note(f"BusLost after {(arm.lost[0] - pulled_s) * 1e3:.0f} ms: {arm.reason}")
        ticks = arm.ticks
        adapter.plug_in()
        plugged_s = time.monotonic()
        arm.run(1.5)
        row.expect(len(arm.back) == 1, "reopen has not succeeded")
        row.note(f"reopened {(arm.back[0] - plugged_s) * 1e3:.0f} ms after its name")
        row.note(f"{arm.ticks - ticks} ticks meanwhile")
        row.expect(len(arm.lost) == 1, f"lost again: {arm.reason}")
    with check("the arm goes on: positions come, goals are followed") as row:
        reached = move(arm, 2100)
        row.note(f"told 2100, at {reached}; {arm.bus.counters.reopens} reopen")
        row.expect(bool(arm.bus.state.valid.all()), "servos are silent")
        row.expect(all(abs(position - 2100) < 30 for position in reached), "they do not move")


def check_absent(adapter: Adapter) -> None:
    with check("opened while it is out: a sentence, no traceback") as row:
        adapter.pull_out()
        wait_for_path(BY_ID, present=False)
        try:
            ServoBus(BY_ID, IDS, BAUDRATE).close()
            sentence = ""
        except PortUnavailable as error:
            sentence = error.strerror or str(error)
        row.note(sentence)
        row.expect("does not exist" in sentence, "was opened, or does not say what is wrong")
        adapter.plug_in()
    with check("pulled out and plugged in five times in a row") as row:
        with ServoBus(BY_ID, IDS, BAUDRATE, TIMEOUT_S) as bus:
            arm = Arm(bus)
            for _ in range(5):
                arm.run(0.2)
                adapter.pull_out()
                arm.run(0.2)
                adapter.plug_in()
            arm.run(1)
            ticks, complete = arm.ticks, arm.complete
            arm.run(1)
        row.note(f"{len(arm.lost)} times lost, {len(arm.back)} times reopened")
        row.note(f"afterwards {arm.complete - complete} of {arm.ticks - ticks} ticks complete")
        row.expect(len(arm.lost) == 5, "not every pull was noticed")
        row.expect(arm.complete - complete > 0.9 * (arm.ticks - ticks), "replies are missing")


def check_execute(adapter: Adapter) -> None:
    """The real control loop: it keeps its ticks while the bus is away, says so once, and takes the arm again."""
    name = "the execute role: adapter pulled out for 2 s, ticks go on, bus back"
    with check(name) as row, Role("execute", write_cell(WORK / "cell", {}, port=BY_ID)) as role:
        role.wait_for_event("execute.ready")
        ticks, joints = role.topic("ticks"), role.topic("joints")
        time.sleep(1)
        before, (_, cursor, _) = len(role.events), ticks.since(0)
        adapter.pull_out()
        lost = role.wait_for_event("bus.lost", before)
        time.sleep(2)
        adapter.plug_in()
        back = role.wait_for_event("bus.back", before)
        time.sleep(1)
        made, _, _ = ticks.since(cursor)
        pause_s = float(np.diff(made["t_ns"]).max()) / 1e9
        newest = joints.latest()
        row.note(f"away {back.t_s - lost.t_s:.1f} s, {len(made)} ticks, longest pause {pause_s * 1e3:.0f} ms")
        row.note(f"mode then {Mode(int(made['mode'][-1])).name.lower()}")
        row.expect([name for name in role.names(before) if name.startswith("bus.")] == BUS_EVENTS, f"{role.names()}")
        row.expect(pause_s < 0.5, "the loop has stood still")
        row.expect(newest is not None and bool(newest["valid"].all()), "joints are silent afterwards")
        row.expect(made["mode"][-1] == Mode.FAULT, "the arm moves on without being asked")


def main() -> None:
    adapter = Adapter("1-6", WORK)
    try:
        with check("adapter plugged in") as row:
            row.note(f"{BY_ID} after {adapter.plug_in():.1f} s")
        with ServoBus(BY_ID, IDS, BAUDRATE, TIMEOUT_S) as bus:
            arm = Arm(bus)
            check_transactions(arm)
            check_replug(arm, adapter)
        check_absent(adapter)
        check_execute(adapter)
    finally:
        adapter.close()


if __name__ == "__main__":
    main()
