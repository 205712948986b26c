"""The follower arm as `execute` sees it: read all joints, send goals, be limp, go away and come back.

Owns the bus between first contact and the end. Nothing here decides anything about motion: it sends what the guard let
through, to whom the guard allows. What it adds is what a servo itself must be told: the cap on its own speed, again
whenever it was away, since a servo forgets it with its power, and torque, again and again while the arm shall be limp,
since a packet may get lost. `read` and `send` raise nothing; they say whether the bus was there.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.config import VIRTUAL, LoadedCell
from device.errors import ConfigError, DeviceUnavailableError
from device.first_contact import Found, look_at_servos
from device.log import Once, event
from device.messages import joints_dtype
from firmware_bridge import registers
from firmware_bridge.bus import BusLost, PortUnavailable, ServoBus, ServoState
from firmware_bridge.calibration import UnitMap

logger = logging.getLogger("execute")

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_REOPEN_PERIOD_NS = 500_000_000
_REPEAT_TORQUE_TICKS = 12
_TELL_CAP_TIMES = 3  # a packet may get lost
# Above the guard's own limit, so that it never holds back what the guard let through.
_SPEED_CAP = 1.2


class Arm:
    """Attributes: reading (messages.joints_dtype, updated in place); unsent (goals that did not reach the bus)."""

    def __init__(self, cell: LoadedCell, port: str) -> None:
        """First contact. Raises DeviceUnavailableError or ConfigError with a sentence; nothing moves."""
        self.reading = np.zeros((), joints_dtype(len(cell.servo_ids)))
        self.unsent = 0
        self._cell = cell
        self._port = port
        self._bus = _open_bus(cell, port)
        try:
            self.found: Found = look_at_servos(cell, self._bus)
        except BusLost as error:
            raise DeviceUnavailableError(str(error.strerror)) from error
        self._speed_cap_raw = np.ceil(_SPEED_CAP * cell.joint_array("max_speed") / cell.units.resolution).astype(
            np.int32
        )
        self._away_since_ns: int | None = None
        self._torque_on = True
        self._repeat = 0
        self._uncapped = np.zeros(len(cell.servo_ids), np.int64)  # times that the cap is still to be told
        self._refused = Once(lambda reason: event(logger, "bus.refused", level=logging.ERROR, reason=reason))

    @property
    def bus_errors(self) -> int:
        """Replies that did not come, or came damaged, since the start."""
        return self._bus.counters.timeouts + self._bus.counters.checksum_errors

    def hold(self, goals: Floats) -> None:
        """Before the first tick: cap the servos' own speed, give them goals (joint units), switch torque on."""
        try:
            self._bus.write_speed_limits(self._speed_cap_raw)
            self._bus.write_goals(self._cell.units.to_raw(goals))
            self._bus.write_torque(True)
        except BusLost as error:
            raise DeviceUnavailableError(str(error)) from error

    def read(self, t_ns: int, tick: int) -> bool:
        """Read all joints into `reading`. Returns False while the bus is away."""
        if self._away_since_ns is not None and not self._come_back(t_ns):
            return False
        try:
            self._bus.read()
        except BusLost as error:
            self._lost(t_ns, error)
            return False
        decode(self._bus.state, self._cell.units, self.reading, tick)
        return True

    def send(self, t_ns: int, goal: Floats, to: Bools, returned: Bools, torque_on: bool) -> None:
        """Send goals (joint units) to the servos marked in `to`; `returned` were away and are told their cap first.

        A limp arm is told so again and again, and an arm that shall hold once more for a while after it was limp.
        """
        self._uncapped[returned] = _TELL_CAP_TIMES
        if self._away_since_ns is not None:
            self.unsent += bool(to.any())
            self._torque_on = torque_on
            return
        errors = self._bus.counters.write_errors
        try:
            if self._uncapped.any():
                self._bus.write_speed_limits(self._speed_cap_raw, self._uncapped > 0)
                self._uncapped = np.maximum(self._uncapped - 1, 0)
            self._bus.write_goals(self._cell.units.to_raw(goal), to)
            self._tell_torque(to, torque_on)
        except BusLost as error:
            self.unsent += 1
            self._lost(t_ns, error)
            return
        self.unsent += self._bus.counters.write_errors > errors

    def close(self) -> None:
        """Leave the servos as they are: holding their last goals, or limp."""
        self._bus.close()

    def _tell_torque(self, to: Bools, torque_on: bool) -> None:
        if torque_on is not self._torque_on:
            self._torque_on = torque_on
            self._repeat = _REPEAT_TORQUE_TICKS
        elif torque_on:
            self._repeat = max(self._repeat - 1, 0)
        else:
            self._repeat = (self._repeat - 1) % _REPEAT_TORQUE_TICKS
        if not torque_on and self._repeat in (0, _REPEAT_TORQUE_TICKS):
            self._bus.write_torque(False)
        elif torque_on and self._repeat:
            self._bus.write_torque(True, to)

    def _lost(self, t_ns: int, error: BusLost) -> None:
        self._away_since_ns = t_ns
        event(logger, "bus.lost", level=logging.ERROR, port=self._port, reason=str(error.strerror))

    def _come_back(self, t_ns: int) -> bool:
        """Try the port again, twice a second: it must be the same arm, and every servo must answer."""
        if self._away_since_ns is None or t_ns - self._away_since_ns < _REOPEN_PERIOD_NS:
            return False
        self._away_since_ns = t_ns
        self._bus.close()
        if not Path(self._port).exists():
            return False
        try:
            # Blocks for about a period: nothing else is to be done on an arm without a bus.
            self._bus.reopen()
            look_at_servos(self._cell, self._bus, patience_s=0.0)
            if not self._bus.read().valid.all():
                raise DeviceUnavailableError("not every servo answers: check power and cables")
        except (OSError, ConfigError) as error:
            self._refused.update(True, str(error))
            self._free_if_limp()
            return False
        self._away_since_ns = None
        self._refused.update(False)
        event(logger, "bus.back", port=self._port)
        return True

    def _free_if_limp(self) -> None:
        """Not all servos are back. An arm that shall be limp is freed as far as it can be reached."""
        if self._torque_on:
            return
        with contextlib.suppress(OSError):
            self._bus.reopen()
            self._bus.write_torque(False)


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


def servo_port(cell: LoadedCell, runtime: Path) -> str:
    """The serial port of the follower arm; the virtual cell links its pty into the runtime directory."""
    return str(runtime / "servos") if cell.cell.arm.port == VIRTUAL else cell.cell.arm.port


def _open_bus(cell: LoadedCell, port: str) -> ServoBus:
    timeout_ms = cell.cell.control.read_timeout_ms
    timeout_s = None if timeout_ms is None else timeout_ms / 1e3
    try:
        return ServoBus(port, cell.servo_ids, cell.cell.arm.baudrate, timeout_s)
    except PortUnavailable as error:
        raise DeviceUnavailableError(f"{cell.path}: arm.port: {error.strerror}") from error
