"""The `execute` role: read all joints, choose a goal, guard it, write all goals, at a steady rate, for months.

One process, no second thread, garbage collector off, absolute schedule. It publishes `joints`, `goals` and `ticks`, and
takes requests from a datagram socket between ticks. When chunks stop coming the arm decelerates and holds; when the bus
goes away it holds (the servos do so by themselves) and comes back in fault; when this process dies the servos hold too,
and its successor starts from the goals that it finds in them, so that nothing moves. All decisions about motion are in
device/controller.py, the bus is in device/arm.py; here is the traffic between them and the topics.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from device import realtime
from device.arm import Arm, servo_port
from device.bundle import Bundle
from device.config import LoadedCell
from device.controller import Controller, Decision
from device.ensemble import ACT_COEFFICIENT, ChunkEnsemble
from device.errors import DeviceUnavailableError
from device.log import Once, event
from device.messages import TICKS, TOPICS, Mode, goals_dtype, joints_dtype
from device.request_socket import RequestSocket
from device.topic import TopicReader, TopicWriter, topic_path

logger = logging.getLogger("execute")

_FIRST_READ_S = 3.0
_VIRTUAL_SERVOS_START_S = 20.0
_LONGEST_BRAKING_S = 2.0


def run(cell: LoadedCell, runtime: Path, stop: Callable[[], bool]) -> None:
    """Run the role until `stop()`, then brake. Raises DeviceUnavailableError when the arm cannot be had at start."""
    execute = Execute(cell, runtime)
    try:
        execute.start()
        while not stop():
            execute.tick()
        execute.brake()
    finally:
        execute.close()


class Execute:
    """The loop's state: arm, topics, clock and controller."""

    def __init__(self, cell: LoadedCell, runtime: Path) -> None:
        self._cell = cell
        self._names = cell.cell.joint_names
        joints = len(self._names)
        bundle = _open_bundle(cell)
        self._policy = None if bundle is None else bundle.digest
        self.controller = Controller(cell, None if bundle is None else ensemble_for(cell, bundle))
        port = servo_port(cell, runtime)
        if cell.cell.is_virtual:
            _wait_for(Path(port))
        self._arm = Arm(cell, port)
        self._joints = _writer(runtime, "joints", joints_dtype(joints))
        self._goals = _writer(runtime, "goals", goals_dtype(joints))
        self._ticks = _writer(runtime, "ticks", TICKS)
        self._feed = ChunkFeed(topic_path(runtime, "chunks"), self.controller.ensemble, self._policy)
        self._requests = RequestSocket(runtime, "execute", self._on_request)
        self._mode_before = self.controller.mode
        self._clock: realtime.PeriodicClock | None = None

    def start(self) -> None:
        """First contact: every servo answers, and holds where it is. Nothing moves."""
        self._wait_for_all_servos()
        self._hold_where_it_is()
        control = self._cell.cell.control
        for refusal in realtime.prepare(control.priority, control.cpu):
            event(logger, "realtime.refused", level=logging.WARNING, reason=refusal)
        self._feed.skip()  # what was meant for another time
        event(logger, "execute.ready", rate_hz=control.rate_hz, joints=len(self._names), policy=self._policy)
        self._clock = realtime.PeriodicClock(control.rate_hz)

    def tick(self) -> None:
        """Wait for the next period and do one tick."""
        clock = self._clock
        if clock is None:
            raise RuntimeError("start() comes before tick()")
        t_ns, lateness_ns = clock.wait()
        began_ns = time.monotonic_ns()
        read = self._arm.read(t_ns, clock.tick)
        if read:
            self.controller.observe(t_ns, self._arm.reading)
        else:
            self.controller.bus_is_gone()
        read_ns = time.monotonic_ns() - began_ns
        self._feed.take()
        self._requests.poll()
        decision = self.controller.step(t_ns)
        before_write_ns = time.monotonic_ns()
        guard = self.controller.guard
        self._arm.send(t_ns, decision.goal, decision.to, guard.returned, self.controller.torque_on)
        write_ns = time.monotonic_ns() - before_write_ns
        self._publish(t_ns, clock.tick, decision, read)
        self._ticks.publish(
            t_ns=t_ns,
            tick=clock.tick,
            lateness_ns=lateness_ns,
            read_ns=read_ns,
            write_ns=write_ns,
            work_ns=time.monotonic_ns() - began_ns,
            missed=clock.missed,
            unsent=self._arm.unsent,
            bus_errors=self._arm.bus_errors,
            holds=self.controller.holds,
            chunks_refused=self._feed.refused,
            mode=self.controller.mode,
            fault=(self.controller.fault or "").encode()[:96],
        )
        self._note_mode()

    def brake(self) -> None:
        """Tick on until the arm stands: a stop in mid-motion decelerates like any other."""
        self._requests.close()
        self.controller.stop()
        for _ in range(round(_LONGEST_BRAKING_S * self._cell.cell.control.rate_hz)):
            if self.controller.at_rest:
                return
            self.tick()

    def close(self) -> None:
        """Leave the arm as it is: holding its last goal, or limp."""
        self._requests.close()
        self._arm.close()
        for topic in (self._joints, self._goals, self._ticks):
            topic.close()

    def _wait_for_all_servos(self) -> None:
        """Read until every servo has answered; raises DeviceUnavailableError naming the ones that do not."""
        deadline = time.monotonic() + _FIRST_READ_S
        answered = np.zeros(len(self._names), dtype=bool)
        while not answered.all():
            if time.monotonic() > deadline:
                silent = ", ".join(name for name, there in zip(self._names, answered, strict=True) if not there)
                raise DeviceUnavailableError(f"no answer from {silent}: check power and cables")
            if self._arm.read(0, 0):
                answered |= self._arm.reading["valid"].astype(bool)

    def _hold_where_it_is(self) -> None:
        """Torque on without motion: servos that already hold keep their goal, the others get their position as goal."""
        found, position = self._arm.found, np.array(self._arm.reading["position"])
        goals = self._cell.units.from_raw(found.goal_raw)
        near = np.abs(goals - position) < self.controller.guard.limits.follow_error
        start = np.where(found.torque_on & near, goals, position)
        self.controller.guard.rest_at(start)
        self._arm.hold(start)

    def _publish(self, t_ns: int, tick: int, decision: Decision, read: bool) -> None:
        if read:
            with self._joints.slot() as record:
                record[...] = self._arm.reading
        choice = decision.choice
        with self._goals.slot() as record:
            record["t_ns"] = t_ns
            record["tick"] = tick
            record["requested"] = decision.requested
            record["goal"] = decision.goal
            record["mode"] = self.controller.mode
            record["holding"] = decision.holding
            record["interventions"] = self.controller.guard.interventions
            record["chunk_age_ns"] = -1 if choice is None else choice.age_ns
            record["live_chunks"] = 0 if choice is None else choice.live
            record["boundary"] = 0 if choice is None else choice.changed
            record["disagreement"] = 0.0 if choice is None else choice.disagreement

    def _on_request(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self.controller.request(request, time.monotonic_ns())
        if not answer["ok"]:
            event(logger, "request.refused", verb=str(request["verb"]), reason=str(answer["why"]))
        return answer

    def _note_mode(self) -> None:
        mode = self.controller.mode
        if mode is not self._mode_before:
            level = logging.ERROR if mode is Mode.FAULT else logging.INFO
            event(logger, "mode.changed", level=level, mode=mode.name.lower(), reason=self.controller.fault)
            self._mode_before = mode


class ChunkFeed:
    """Takes what predict publishes into the ensemble. Whatever stands in predict's file never ends the loop.

    Attributes: refused (chunks of another policy than the cell's, or that the ensemble could not use).
    """

    def __init__(self, path: Path, ensemble: ChunkEnsemble | None, policy: str | None) -> None:
        self._path = path
        self._ensemble = ensemble
        self._policy = (policy or "").encode()
        self._reader: TopicReader | None = None
        self._cursor = 0
        self._foreign = 0
        self._trouble = Once(
            lambda reason: event(logger, "chunks.unusable", level=logging.WARNING, reason=reason),
            lambda: event(logger, "chunks.usable"),
        )

    @property
    def refused(self) -> int:
        return self._foreign + (0 if self._ensemble is None else self._ensemble.rejected)

    def skip(self) -> None:
        """Forget what has been published so far."""
        self._since()

    def take(self) -> None:
        """Give the ensemble what is new."""
        if self._ensemble is None:
            return
        trouble = None
        for chunk in self._since():
            try:
                trouble = self._add(self._ensemble, chunk)
            except (ValueError, IndexError, OverflowError) as error:  # a record without our fields, or with nonsense
                trouble = f"{self._path}: not a chunk: {error}"
        if trouble is not None:
            self._foreign += 1
            self._trouble.update(True, trouble)

    def _add(self, ensemble: ChunkEnsemble, chunk: Any) -> str | None:
        policy = bytes(chunk["policy"])
        if policy != self._policy:
            theirs = policy.decode("ascii", "replace")
            return f"a chunk of policy {theirs[:12]}, the cell's is {self._policy.decode()[:12]}"
        actions = chunk["actions"][: chunk["count"]]
        ensemble.add(time.monotonic_ns(), int(chunk["t_obs_ns"]), int(chunk["dt_ns"]), actions)
        self._trouble.update(False)
        return None

    def _since(self) -> Any:
        try:
            if self._reader is None:
                self._reader = TopicReader(self._path)
            chunks, self._cursor, _ = self._reader.since(self._cursor)
        except (OSError, ValueError) as error:  # TopicError among them: no topic, or of another version
            self._reader = None
            self._cursor = 0
            self._trouble.update(True, str(error))
            return ()
        return chunks


def _wait_for(port: Path) -> None:
    """The virtual cell's servos are started together with this role; a real adapter is there or is a fault."""
    deadline = time.monotonic() + _VIRTUAL_SERVOS_START_S
    while not port.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _writer(runtime: Path, name: str, dtype: np.dtype[np.void]) -> TopicWriter:
    return TopicWriter(topic_path(runtime, name), dtype, TOPICS[name].slots)


def _open_bundle(cell: LoadedCell) -> Bundle | None:
    """The cell's bundle, checked; None where it names none."""
    path = cell.bundle_path
    if path is None:
        return None
    bundle = Bundle.open(path)
    bundle.check_fits(cell)
    return bundle


def ensemble_for(cell: LoadedCell, bundle: Bundle) -> ChunkEnsemble:
    """The ensemble as the bundle recommends and the cell overrides."""
    manifest, policy = bundle.manifest, cell.cell.policy
    names = cell.cell.joint_names
    return ChunkEnsemble(
        len(names),
        manifest.chunk_size,
        method=policy.handoff or manifest.handoff.method,
        m=ACT_COEFFICIENT if manifest.handoff.m is None else manifest.handoff.m,
        staleness_ns=round(policy.staleness_s * 1e9),
        two_state=tuple(names.index(name) for name in manifest.two_state_joints),
    )
