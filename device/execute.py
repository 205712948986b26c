"""The `execute` role: read all joints, choose a goal, guard it, write all goals, at a steady rate, for months.

One process, no second thread, garbage collector off, absolute schedule. It publishes `joints`, `goals` and `ticks`, and
takes requests from a datagram socket between ticks. When chunks stop coming the arm decelerates and holds; when the bus
goes away it holds (the servos do so by themselves) and comes back in fault; when this process dies the servos hold too,
and its successor starts from the goals that it finds in them, so that nothing moves. All decisions about motion are in
device/controller.py; here is only the traffic.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from device import realtime
from device.bundle import Bundle
from device.config import VIRTUAL, LoadedCell
from device.controller import Controller, Decision
from device.ensemble import ACT_COEFFICIENT, ChunkEnsemble
from device.errors import DeviceUnavailableError
from device.first_contact import look_at_servos
from device.log import event
from device.messages import TICKS, TOPICS, Mode, goals_dtype, joints_dtype
from device.request_socket import RequestSocket
from device.topic import TopicReader, TopicWriter, topic_path
from firmware_bridge import registers
from firmware_bridge.bus import BusLost, PortUnavailable, ServoBus, ServoState
from firmware_bridge.calibration import UnitMap

logger = logging.getLogger("execute")

_REOPEN_PERIOD_NS = 500_000_000
_FIRST_READ_S = 3.0
_VIRTUAL_SERVOS_START_S = 20.0


def run(cell: LoadedCell, runtime: Path, stop: Callable[[], bool]) -> None:
    """Run the role until `stop()`. Raises DeviceUnavailableError when the bus cannot be had at start."""
    execute = Execute(cell, runtime)
    try:
        execute.start()
        while not stop():
            execute.tick()
    finally:
        execute.close()


def servo_port(cell: LoadedCell, runtime: Path) -> str:
    """The serial port of the follower arm; the virtual cell links its pty into the runtime directory."""
    return str(runtime / "servos") if cell.cell.arm.port == VIRTUAL else cell.cell.arm.port


class Execute:
    """The loop's state: bus, topics, clock and controller."""

    def __init__(self, cell: LoadedCell, runtime: Path) -> None:
        self._cell = cell
        self._names = cell.cell.joint_names
        joints = len(self._names)
        ensemble, self._policy = _open_policy(cell)
        self.controller = Controller(cell, ensemble)
        port = servo_port(cell, runtime)
        if cell.cell.is_virtual:
            _wait_for(Path(port))
        self._found = look_at_servos(cell, port)
        self._bus = _open_bus(cell, runtime)
        self._reading = np.zeros((), joints_dtype(joints))
        self._joints = _writer(runtime, "joints", joints_dtype(joints))
        self._goals = _writer(runtime, "goals", goals_dtype(joints))
        self._ticks = _writer(runtime, "ticks", TICKS)
        self._chunks = TopicReader(topic_path(runtime, "chunks"))
        self._chunk_cursor = 0
        self._requests = RequestSocket(runtime, "execute", self._on_request)
        self._mode_before = self.controller.mode
        self._bus_lost_ns = 0
        self._unsent = 0
        self._clock: realtime.PeriodicClock | None = None

    def start(self) -> None:
        """First contact: every servo answers, and holds where it is. Nothing moves."""
        self._read_all_once()
        self._hold_where_it_is()
        control = self._cell.cell.control
        for refusal in realtime.prepare(control.priority, control.cpu):
            event(logger, "realtime.refused", level=logging.WARNING, reason=refusal)
        _, self._chunk_cursor, _ = self._chunks.since(self._chunk_cursor)  # what was meant for another time
        event(logger, "execute.ready", rate_hz=control.rate_hz, joints=len(self._names), policy=self._policy)
        self._clock = realtime.PeriodicClock(control.rate_hz)

    def tick(self) -> None:
        """Wait for the next period and do one tick."""
        clock = self._clock
        if clock is None:
            raise RuntimeError("start() comes before tick()")
        t_ns, lateness_ns = clock.wait()
        began_ns = time.monotonic_ns()
        read = self._read(t_ns, clock.tick)
        read_ns = time.monotonic_ns() - began_ns
        self._take_chunks()
        self._requests.poll()
        decision = self.controller.step(t_ns)
        before_write_ns = time.monotonic_ns()
        self._write(decision, read)
        done_ns = time.monotonic_ns()
        self._publish(t_ns, clock.tick, decision, read)
        counters = self._bus.counters
        self._ticks.publish(
            t_ns=t_ns,
            tick=clock.tick,
            lateness_ns=lateness_ns,
            read_ns=read_ns,
            write_ns=done_ns - before_write_ns,
            work_ns=time.monotonic_ns() - began_ns,
            missed=clock.missed,
            unsent=self._unsent,
            bus_errors=counters.timeouts + counters.checksum_errors,
            holds=self.controller.holds,
            mode=self.controller.mode,
            fault=(self.controller.fault or "").encode()[:96],
        )
        self._note_mode()

    def close(self) -> None:
        """Leave the arm holding: torque stays on, the last goal stands."""
        self._requests.close()
        self._bus.close()
        for topic in (self._joints, self._goals, self._ticks):
            topic.close()

    # ---- the bus

    def _read(self, t_ns: int, tick: int) -> bool:
        """Read all joints into the working record. Returns False while the bus is away."""
        if self._bus_lost_ns and not self._reopen(t_ns):
            return False
        try:
            self._bus.read()
        except BusLost as error:
            self._on_bus_lost(t_ns, error)
            return False
        decode(self._bus.state, self._cell.units, self._reading, tick)
        self.controller.observe(t_ns, self._reading)
        return True

    def _write(self, decision: Decision, bus_is_there: bool) -> None:
        if decision.goal is None:
            return
        if not bus_is_there:
            self._unsent += 1
            return
        try:
            errors = self._bus.counters.write_errors
            self._bus.write_goals(self._cell.units.to_raw(decision.goal))
            self._unsent += self._bus.counters.write_errors - errors
        except BusLost as error:
            self._unsent += 1
            self._on_bus_lost(time.monotonic_ns(), error)

    def _on_bus_lost(self, t_ns: int, error: BusLost) -> None:
        self._bus_lost_ns = t_ns
        self.controller.enter_fault("the servo bus is gone")
        event(logger, "bus.lost", level=logging.ERROR, port=self._bus.port, reason=str(error))

    def _reopen(self, t_ns: int) -> bool:
        if t_ns - self._bus_lost_ns < _REOPEN_PERIOD_NS:
            return False
        self._bus_lost_ns = t_ns
        try:
            self._bus.reopen()
            self._bus.read()
        except (BusLost, PortUnavailable):
            return False
        self._bus_lost_ns = 0
        decode(self._bus.state, self._cell.units, self._reading, 0)
        self.controller.bus_is_back(self._reading["position"])
        event(logger, "bus.back", port=self._bus.port)
        return True

    def _read_all_once(self) -> None:
        """Read until every servo has answered; raises DeviceUnavailableError naming the ones that do not."""
        deadline = time.monotonic() + _FIRST_READ_S
        answered = np.zeros(len(self._names), dtype=bool)
        while not answered.all():
            if time.monotonic() > deadline:
                silent = ", ".join(name for name, there in zip(self._names, answered, strict=True) if not there)
                raise DeviceUnavailableError(f"{self._bus.port}: no answer from {silent}: check power and cables")
            try:
                answered |= self._bus.read().valid
            except BusLost as error:
                raise DeviceUnavailableError(str(error)) from error
        decode(self._bus.state, self._cell.units, self._reading, 0)

    def _hold_where_it_is(self) -> None:
        """Torque on without motion: servos that already hold keep their goal, the others get their position as goal."""
        units = self._cell.units
        position = np.array(self._reading["position"])
        goals = units.from_raw(self._found.goal_raw)
        near = np.abs(goals - position) < self.controller.guard.limits.follow_error
        keep = self._found.torque_on & near
        self.controller.guard.rest_at(np.where(keep, goals, position))
        self._bus.write_goals(np.where(keep, self._found.goal_raw, units.to_raw(position)))
        self._bus.write_torque(True)

    # ---- topics and requests

    def _take_chunks(self) -> None:
        ensemble = self.controller.ensemble
        if ensemble is None:
            return
        chunks, self._chunk_cursor, _ = self._chunks.since(self._chunk_cursor)
        for chunk in chunks:
            actions = chunk["actions"][: chunk["count"]]
            now_ns = time.monotonic_ns()
            ensemble.add(now_ns, int(chunk["t_obs_ns"]), int(chunk["dt_ns"]), actions, bytes(chunk["policy"]))

    def _publish(self, t_ns: int, tick: int, decision: Decision, read: bool) -> None:
        if read:
            with self._joints.slot() as record:
                record[...] = self._reading
        choice = decision.choice
        with self._goals.slot() as record:
            record["t_ns"] = t_ns
            record["tick"] = tick
            record["requested"] = decision.requested
            record["goal"] = self.controller.guard.goal
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
        if mode is self._mode_before:
            return
        if Mode.LIMP in (mode, self._mode_before) and not self._bus_lost_ns:
            try:
                self._bus.write_torque(mode is not Mode.LIMP)
            except BusLost as error:
                self._on_bus_lost(time.monotonic_ns(), error)
        level = logging.ERROR if mode is Mode.FAULT else logging.INFO
        event(logger, "mode.changed", level=level, mode=mode.name.lower(), reason=self.controller.fault)
        self._mode_before = mode


def decode(state: ServoState, units: UnitMap, record: Any, tick: int) -> None:
    """Fill a record of messages.joints_dtype from what the bus said."""
    record["t_ns"] = state.t_ns
    record["tick"] = tick
    record["position"] = units.from_raw(state.position_raw)
    record["velocity"] = state.velocity_raw * units.resolution
    record["load"] = state.load_raw * registers.LOAD_UNIT
    record["current_a"] = state.current_raw * registers.CURRENT_UNIT_A
    record["voltage_v"] = state.voltage_raw * registers.VOLTAGE_UNIT_V
    record["temperature_c"] = state.temperature_raw
    record["error"] = state.error
    record["valid"] = state.valid


def _wait_for(port: Path) -> None:
    """The virtual cell's servos are started together with this role; a real adapter is there or is a fault."""
    deadline = time.monotonic() + _VIRTUAL_SERVOS_START_S
    while not port.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def _writer(runtime: Path, name: str, dtype: np.dtype[np.void]) -> TopicWriter:
    return TopicWriter(topic_path(runtime, name), dtype, TOPICS[name].slots)


def _open_bus(cell: LoadedCell, runtime: Path) -> ServoBus:
    timeout_ms = cell.cell.control.read_timeout_ms
    try:
        return ServoBus(
            servo_port(cell, runtime),
            cell.servo_ids,
            cell.cell.arm.baudrate,
            None if timeout_ms is None else timeout_ms / 1e3,
        )
    except PortUnavailable as error:
        raise DeviceUnavailableError(f"{cell.path}: arm.port: {error}") from error


def _open_policy(cell: LoadedCell) -> tuple[ChunkEnsemble | None, str | None]:
    """The ensemble for the cell's bundle, and the bundle's digest; None without a bundle."""
    path = cell.bundle_path
    if path is None:
        return None, None
    bundle = Bundle.open(path)
    bundle.check_fits(cell)
    return ensemble_for(cell, bundle), bundle.digest


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
