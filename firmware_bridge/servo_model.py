"""The firmware of N emulated STS3215 servos: registers, protocol and protections, without any I/O.

`VirtualServos` puts a `ServoBank` behind a pty; lockstep simulation calls `step` and `handle` itself.
It behaves as the memory table says, and where the table is silent as owners of real servos report:
a locked EEPROM write works until power-off and is then forgotten; writing a goal switches torque on;
switching torque on holds the present position; Torque_Enable = 128 makes the present position 2048.
What is our estimate and no documented fact: the thermal and voltage constants, the boot time, that
overload protection ends with torque off or a goal on the other side.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from firmware_bridge import registers
from firmware_bridge.packets import InstructionScanner
from firmware_bridge.registers import (
    ERROR_CURRENT,
    ERROR_OVERLOAD,
    ERROR_TEMPERATURE,
    ERROR_VOLTAGE,
    MIDDLE_RAW,
    TICKS_PER_TURN,
)
from firmware_bridge.servo_motion import BoolArray, FloatArray, FreePlant, MotionProfile, Plant
from firmware_bridge.servo_protocol import Reply, execute
from firmware_bridge.servo_registers import RegisterFile

RAD_PER_TICK = 2 * np.pi / TICKS_PER_TURN
TICKS_PER_RAD = 1 / RAD_PER_TICK
STALL_CURRENT_A = 2.7  # STS3215 product sheet
SUPPLY_RESISTANCE_OHM = 0.1  # estimate: a daisy chain of thin wires
STALL_HEATING_DEG = 60.0  # estimate: end temperature above ambient at full torque
HEATING_TIME_S = 300.0  # estimate
PROTECTION_PERIOD_S = 0.01  # the protections count in 10 ms (Protection_Time, memory table 35)
BOOT_S = 0.15  # estimate: no answer for so long after a reboot

MODE_POSITION, MODE_VELOCITY = 0, 1
_PHASE_FULL_ANGLE = 16  # Phase bit 4: feedback is not reduced to one turn (memory table, special bytes)
_GOAL_VELOCITY = registers.register("Goal_Velocity").address


class ServoBank:
    """N emulated servos on one bus. Angles in radians are the plant's, `_raw` are register values."""

    def __init__(
        self,
        ids: Sequence[int],
        plant: Plant | None = None,
        encoder_offset_raw: int | Sequence[int] = 0,
        supply_v: float = 7.4,
        ambient_deg: float = 25.0,
    ) -> None:
        """`encoder_offset_raw` is how the horn was mounted: encoder = 2048 + angle * 4096 / (2 pi) + offset."""
        count = len(ids)
        self.plant: Plant = plant if plant is not None else FreePlant(count)
        self.encoder_offset_raw = np.broadcast_to(np.asarray(encoder_offset_raw, np.int64), (count,)).copy()
        self.supply_v = supply_v
        self.ambient_deg = ambient_deg
        self.silent_ends_sync_read = False  # a firmware whose servos wait for their forerunner's reply for ever
        self.time_s = 0.0
        self.temperature_deg: FloatArray = np.full(count, ambient_deg)
        self.forced_error = np.zeros(count, np.uint8)  # faults injected from outside: registers.ERROR_*
        self._registers = RegisterFile(list(ids))
        self._reg_writes: list[tuple[int, bytes] | None] = [None] * count
        self._ready_s: FloatArray = np.zeros(count)
        self._profile = MotionProfile(count)
        self._was_on: BoolArray = np.zeros(count, np.bool_)
        self._overloaded: BoolArray = np.zeros(count, np.bool_)
        self._overload_s: FloatArray = np.zeros(count)
        self._overcurrent_s: FloatArray = np.zeros(count)
        self._overload_side: FloatArray = np.zeros(count)
        self._effort: FloatArray = np.zeros(count)
        self._unprotected_s = 0.0
        self._decode_due = self._feedback_due = True
        self._scanner = InstructionScanner()
        self._decode()

    # -- registers ---------------------------------------------------------------------------------

    @property
    def ids(self) -> list[int]:
        """The servos' ids as they are now, in the order of the plant."""
        return [int(servo_id) for servo_id in self._registers.column("ID")]

    def baudrate(self, index: int) -> int:
        """The baud rate that the servo at `index` listens at."""
        return registers.BAUDRATES[min(int(self._registers.column("Baud_Rate")[index]), len(registers.BAUDRATES) - 1)]

    def read_register(self, servo_id: int, name: str) -> int:
        """A register's signed value, as a read over the wire would give it."""
        register = registers.register(name)
        return register.decode(self.read_bytes(self._index(servo_id), register.address, register.size))

    def write_register(self, servo_id: int, name: str, value: int) -> None:
        """Write a register with all the effects of a write over the wire. ValueError if it is read-only."""
        register = registers.register(name)
        if not register.writable:
            raise ValueError(f"{name} is read-only")
        self.write_bytes(self._index(servo_id), register.address, register.encode(value))

    def reboot(self, servo_id: int) -> None:
        """Cut the servo's power for a moment: RAM is lost, torque off, unsaved EEPROM writes forgotten."""
        self.reboot_at(self._index(servo_id))

    def reboot_at(self, index: int) -> None:
        """As `reboot`, for the servo at that place in the bank."""
        self._registers.power_up(index)
        self._reg_writes[index] = None
        self._overloaded[index] = False
        self._overload_s[index] = self._overcurrent_s[index] = 0.0
        self._decode_due = self._feedback_due = True
        self._ready_s[index] = self.time_s + BOOT_S

    # -- protocol ----------------------------------------------------------------------------------

    def handle(self, data: bytes, deaf: Collection[int] = ()) -> list[Reply]:
        """Take bytes off the wire and return the replies they cause, in the order of their sending.

        `data` may hold part of a packet, or several. Servos whose position in the bank is in `deaf` hear nothing.
        """
        replies: list[Reply] = []
        for packet in self._scanner.feed(data):
            hearing = [i for i in range(len(self.forced_error)) if i not in deaf and self._ready_s[i] <= self.time_s]
            replies += execute(packet, self, hearing)
        return replies

    def forget_partial_packet(self) -> None:
        """Drop the beginning of a packet, after a pause on the wire."""
        self._scanner.clear()

    def read_bytes(self, index: int, address: int, size: int) -> bytes:
        """`size` bytes of the control table of the servo at `index`; zeros beyond its end."""
        if self._feedback_due:
            self._store_feedback()
        return self._registers.read(index, address, size)

    def write_bytes(self, index: int, address: int, data: bytes) -> None:
        """Write into the control table with all effects; read-only bytes in between are left alone."""
        torque = self._registers.column("Torque_Enable")
        was_on = bool(torque[index])
        touched = self._registers.write(index, address, data)
        if registers.TORQUE_ENABLE.address in touched:
            self._switch_torque(index, int(torque[index]), was_on)
        elif registers.GOAL_POSITION.address in touched or (
            _GOAL_VELOCITY in touched and self._registers.column("Operating_Mode")[index] == MODE_VELOCITY
        ):
            torque[index] = 1  # any goal is a motion command
        self._decode_due = self._feedback_due = True

    def request_action(self, index: int, write: tuple[int, bytes] | None) -> tuple[int, bytes] | None:
        """Keep a REG_WRITE until its ACTION; returns the one kept before."""
        kept, self._reg_writes[index] = self._reg_writes[index], write
        self._registers.column("Reg_Write_Flag")[index] = write is not None
        return kept

    def error(self, index: int) -> int:
        """The error byte of the servo's replies."""
        return int(self._registers.column("Status")[index])

    # -- time --------------------------------------------------------------------------------------

    def step(self, dt_s: float) -> None:
        """Advance all servos and the plant by `dt_s`: motion profile, plant, sensors, protections."""
        self.time_s += dt_s
        self._decode()
        turns_raw = self._turns_raw()
        self._step_profile(dt_s, turns_raw)
        limit = getattr(self.plant, "torque_limit", None)
        if limit is not None:
            limit[:] = self._torque_limit()
        setpoint_rad = (self._profile.position + turns_raw + self._zero_raw) * RAD_PER_TICK
        self.plant.step(dt_s, setpoint_rad, self._torque_on)
        self._effort = np.where(self._torque_on, self.plant.effort, 0.0)
        self._unprotected_s += dt_s
        if self._unprotected_s >= PROTECTION_PERIOD_S - 1e-9:
            self._protect(self._unprotected_s)
            self._unprotected_s = 0.0
        self._feedback_due = True

    def _position_raw(self) -> FloatArray:
        """Present position in ticks before it is rounded and reduced to one turn."""
        position: FloatArray = self.plant.position_rad * TICKS_PER_RAD - self._zero_raw
        return position

    def _turns_raw(self) -> FloatArray:
        """Whole turns that the feedback does not show. In position mode the servo sees one turn only: turned past
        its seam it goes the long way back.
        """
        whole = np.floor((self._position_raw() + 0.5) * (1 / TICKS_PER_TURN)) * TICKS_PER_TURN
        return np.where(self._one_turn, whole, 0.0)

    def _step_profile(self, dt_s: float, turns_raw: FloatArray) -> None:
        profile, torque_on = self._profile, self._torque_on
        starting = ~torque_on | (torque_on & ~self._was_on)
        if starting.any():
            profile.reset(self._position_raw() - turns_raw, starting)
        self._was_on = torque_on
        in_velocity_mode = torque_on & (self._mode == MODE_VELOCITY)
        if in_velocity_mode.any():
            profile.step_at(dt_s, self._goal_velocity, self._acceleration, in_velocity_mode)
        in_position_mode = torque_on & (self._mode == MODE_POSITION)
        if in_position_mode.any():
            profile.step_to(dt_s, self._goal_raw, self._speed, self._acceleration, in_position_mode)

    def _torque_limit(self) -> FloatArray:
        """Part of stall torque that each servo may use now, [J]."""
        return np.where(self._overloaded, np.minimum(self._protective_torque, self._limit), self._limit)

    def _protect(self, dt_s: float) -> None:
        """Timers of overload and over-current, temperature, and what they switch off."""
        effort = self._effort
        target_deg = self.ambient_deg + STALL_HEATING_DEG * effort * effort
        self.temperature_deg += (target_deg - self.temperature_deg) * (dt_s / HEATING_TIME_S)

        self._overload_s = np.where(np.abs(effort) >= self._overload_torque, self._overload_s + dt_s, 0.0)
        newly = (self._overload_s >= self._protection_time_s) & ~self._overloaded
        if newly.any():
            self._overloaded |= newly
            self._overload_side = np.where(newly, np.sign(effort), self._overload_side)
        if self._overloaded.any():
            # It lets go when it is told to move away from what it pushes against.
            away = (self._goal_raw - (self._position_raw() - self._turns_raw())) * self._overload_side < -1.0
            self._overloaded &= ~(away & (self._mode == MODE_POSITION)) & self._torque_on

        current_raw = np.abs(effort) * STALL_CURRENT_A / registers.CURRENT_UNIT_A
        over = current_raw >= self._protection_current
        self._overcurrent_s = np.where(over, self._overcurrent_s + dt_s, 0.0)

        status = self._present_status()
        if status.any():
            off = (status & self._unload & (ERROR_TEMPERATURE | ERROR_CURRENT | ERROR_VOLTAGE)) != 0
            if (off & self._torque_on).any():
                self._registers.column("Torque_Enable")[off] = 0
                self._decode_due = True
        self._registers.column("Status")[:] = status

    def _present_status(self) -> npt.NDArray[np.uint8]:
        voltage_raw, temperature = self._voltage_raw(), self._temperature()
        low, high = self._registers.column("Min_Voltage_Limit"), self._registers.column("Max_Voltage_Limit")
        status = np.where((voltage_raw < low) | (voltage_raw > high), ERROR_VOLTAGE, 0)
        status |= np.where(temperature > self._registers.column("Max_Temperature_Limit"), ERROR_TEMPERATURE, 0)
        status |= np.where(self._overcurrent_s >= self._overcurrent_time_s, ERROR_CURRENT, 0)
        status |= np.where(self._overloaded, ERROR_OVERLOAD, 0)
        return status.astype(np.uint8) | self.forced_error

    # -- sensors -----------------------------------------------------------------------------------

    def _voltage_raw(self) -> FloatArray:
        drop_v = SUPPLY_RESISTANCE_OHM * STALL_CURRENT_A * float(np.abs(self._effort).sum())
        measured = np.full(
            len(self.forced_error), round((self.supply_v - drop_v) / registers.VOLTAGE_UNIT_V), np.float64
        )
        forced = (self.forced_error & ERROR_VOLTAGE) != 0
        return np.where(forced, self._registers.column("Min_Voltage_Limit") - 1.0, measured)

    def _temperature(self) -> FloatArray:
        forced = (self.forced_error & ERROR_TEMPERATURE) != 0
        return np.where(forced, self._registers.column("Max_Temperature_Limit") + 1.0, np.rint(self.temperature_deg))

    def _store_feedback(self) -> None:
        """Bring the registers 56..70 up to date; done only when somebody reads."""
        self._decode()
        self._feedback_due = False
        position = np.floor(self._position_raw() + 0.5)
        position = np.where(self._one_turn, np.mod(position, TICKS_PER_TURN), position)
        velocity = np.rint(self.plant.velocity_rad_s * TICKS_PER_RAD)
        load = np.rint(self._effort * 1000)
        current = np.rint(self._effort * (STALL_CURRENT_A / registers.CURRENT_UNIT_A))
        self._registers.store("Present_Position", position)
        self._registers.store("Present_Velocity", velocity)
        self._registers.store("Present_Load", load)
        self._registers.store("Present_Current", current)
        self._registers.store("Goal_Position_2", self._goal_raw)
        self._registers.column("Present_Voltage")[:] = np.clip(self._voltage_raw(), 0, 255)
        self._registers.column("Present_Temperature")[:] = np.clip(self._temperature(), 0, 255)
        unfinished = self._torque_on & (self._profile.velocity != 0)
        threshold = self._registers.column("Moving_Velocity_Threshold") * 50.0
        self._registers.column("Moving")[:] = unfinished | (np.abs(velocity) > threshold)

    # -- what a write changes ----------------------------------------------------------------------

    def _switch_torque(self, index: int, value: int, was_on: bool) -> None:
        if value == registers.TORQUE_ENABLE_CALIBRATE_MIDDLE:
            self._registers.put(index, registers.TORQUE_ENABLE, was_on)
            self._calibrate_middle(index)
            if was_on:
                self._hold_present_position(index)
        elif value == 0:
            self._overloaded[index] = False
            self._overload_s[index] = 0.0
        elif not was_on:
            self._hold_present_position(index)

    def _hold_present_position(self, index: int) -> None:
        self._store_feedback()
        self._registers.copy(index, registers.PRESENT_POSITION, registers.GOAL_POSITION)

    def _calibrate_middle(self, index: int) -> None:
        """Choose the homing offset with which the present position reads 2048."""
        self._decode()
        offset = registers.register("Homing_Offset")
        actual = round(float(self._position_raw()[index])) + int(self._homing_raw[index])
        wanted = actual % TICKS_PER_TURN - MIDDLE_RAW  # so that actual - wanted is 2048
        self._registers.write(index, offset.address, offset.encode(max(-2047, min(2047, wanted))))
        self._decode_due = True

    def _decode(self) -> None:
        """Turn the registers that steer the motion into arrays, if any was written."""
        if not self._decode_due:
            return
        self._decode_due = False
        self._mode = self._registers.values("Operating_Mode").astype(np.int64)
        self._torque_on = self._registers.values("Torque_Enable") != 0
        self._homing_raw = self._registers.values("Homing_Offset")
        # Where the horn's angle is when the present position reads 0, in ticks.
        self._zero_raw = self._homing_raw - MIDDLE_RAW - self.encoder_offset_raw
        self._one_turn = (self._registers.column("Phase") & _PHASE_FULL_ANGLE == 0) & (self._mode == MODE_POSITION)
        low, high = self._registers.values("Min_Position_Limit"), self._registers.values("Max_Position_Limit")
        goal = self._registers.values("Goal_Position")
        unlimited = (low == 0) & (high == 0)  # multi-turn (memory table, 9 and 11)
        self._goal_raw = np.where(unlimited, goal, np.minimum(np.maximum(goal, low), high))
        top = self._registers.values("Maximum_Velocity_Limit") * 50
        self._goal_velocity = np.clip(self._registers.values("Goal_Velocity"), -top, top)
        self._speed = np.where(self._goal_velocity == 0, top, np.abs(self._goal_velocity))
        ramp = np.minimum(self._registers.values("Acceleration"), self._registers.values("Maximum_Acceleration")) * 100
        self._acceleration = np.where(ramp == 0, MotionProfile.UNLIMITED_ACCELERATION, ramp)
        self._limit = np.clip(self._registers.values("Torque_Limit") / 1000, 0.0, 1.0)
        self._protective_torque = self._registers.values("Protective_Torque") / 100
        self._overload_torque = np.maximum(self._registers.values("Overload_Torque") / 100, 1e-9)
        self._protection_time_s = self._registers.values("Protection_Time") * 0.01
        self._protection_current = np.maximum(self._registers.values("Protection_Current"), 1.0)
        self._overcurrent_time_s = np.maximum(self._registers.values("Over_Current_Protection_Time") * 0.01, 1e-9)
        self._unload = self._registers.column("Unloading_Condition").copy()

    def _index(self, servo_id: int) -> int:
        try:
            return self.ids.index(servo_id)
        except ValueError:
            raise KeyError(f"no servo has id {servo_id}; there are {self.ids}") from None
