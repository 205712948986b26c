"""Set-up and diagnosis of single servos, through Feetech's own SDK.

`understudy provision servos` and `understudy doctor` use this: find servos, read and write any register by
name, change ids and baud rates. It is for a person who waits: one servo at a time, milliseconds each, every
EEPROM write unlocked, read back and locked again. The control loop has its own transactions (`bus`), because
the SDK keeps a core busy while it waits; the two must not use a port at the same time, and cannot.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import scservo_sdk

from firmware_bridge import registers
from firmware_bridge.registers import Register
from firmware_bridge.serial_port import PortUnavailable, close_port, open_port

# The maker's order is by speed; servos of an arm are nearly always at the first.
SCAN_BAUDRATES = registers.BAUDRATES
# A person's time is cheap against a false alarm: a register is asked for so often before its servo is called silent.
ATTEMPTS = 3
LATE_REPLY_S = 0.05


class ServoError(OSError):
    """A servo did not do what it was asked; the message names port, servo and register."""


class ServoSilentError(ServoError):
    """A servo did not answer, or not intelligibly."""


@dataclass(frozen=True)
class FoundServo:
    """A servo that answered a scan."""

    id: int
    baudrate: int
    model: int  # 777 is the STS3215
    firmware: str
    error: int  # error byte of its answer: registers.ERROR_*


class ServoTool:
    """One port, used servo by servo. A context manager; closes the port at its end."""

    def __init__(self, port: str, baudrate: int = 1_000_000) -> None:
        """Raises PortUnavailable with a sentence where the port cannot be had."""
        self.port = port
        close_port(open_port(port, baudrate))  # our sentences about a missing, busy or foreign port
        self._handler = scservo_sdk.PortHandler(port)
        self._packets = scservo_sdk.PacketHandler(0)  # 0: little-endian, the STS series
        self._open(baudrate)
        self.last_error = 0

    @property
    def baudrate(self) -> int:
        return int(self._handler.getBaudRate())

    def set_port_baudrate(self, baudrate: int) -> None:
        """Talk at another speed from now on; no servo is changed."""
        if baudrate != self.baudrate:
            self._open(baudrate)

    def ping(self, servo_id: int) -> int | None:
        """The servo's model number, or None if it does not answer."""
        model, result, self.last_error = self._packets.ping(self._handler, servo_id)
        return int(model) if result == scservo_sdk.COMM_SUCCESS else None

    def scan(
        self, ids: Iterable[int] = range(registers.MAX_ID + 1), baudrates: Iterable[int] = (1_000_000,)
    ) -> Iterator[FoundServo]:
        """Yield the servos that answer, as they are found. A silent id takes about 40 ms."""
        ids = list(ids)
        before = self.baudrate
        try:
            for baudrate in baudrates:
                self.set_port_baudrate(baudrate)
                for servo_id in ids:
                    model = self.ping(servo_id)
                    if model is not None:
                        error = self.last_error
                        yield FoundServo(servo_id, baudrate, model, self._firmware(servo_id), error)
        finally:
            self.set_port_baudrate(before)

    def read(self, servo_id: int, name: str) -> int:
        """A register's signed value. Its servo's error byte is in `last_error`. Raises ServoSilentError."""
        register = registers.register(name)
        data: list[int] = []

        def attempt() -> int:
            nonlocal data
            data, result, self.last_error = self._packets.readTxRx(
                self._handler, servo_id, register.address, register.size
            )
            return int(result)

        self._try(attempt, servo_id, f"reading {name}", ATTEMPTS)
        if len(data) != register.size:
            raise ServoSilentError(f"{self.port}: servo {servo_id} answered {len(data)} bytes for {name}")
        return register.decode(bytes(data))

    def write(self, servo_id: int, name: str, value: int) -> None:
        """Write a register and make sure that it holds the value. EEPROM is unlocked for it, and locked again.

        Raises ServoSilentError, ServoError where the servo keeps another value, ValueError for a value out of range.
        """
        register = registers.register(name)
        if not register.writable:
            raise ValueError(f"{name} is read-only")
        data = register.encode(value)
        if register.in_eeprom:
            with self._unlocked(servo_id):
                self._write(servo_id, register, data)
                self._verify(servo_id, name, value)
            return
        self._write(servo_id, register, data)
        if name != "Torque_Enable" or value != registers.TORQUE_ENABLE_CALIBRATE_MIDDLE:
            self._verify(servo_id, name, value)

    def set_id(self, servo_id: int, new_id: int) -> None:
        """Give a servo another id, kept over power-off. ServoError if the new id is taken already."""
        if new_id == servo_id:
            return
        if self.ping(new_id) is not None:
            raise ServoError(f"{self.port}: id {new_id} is taken; connect only the servo that is to get it")
        with self._unlocked(servo_id, id_afterwards=new_id):
            self._write(servo_id, registers.register("ID"), registers.register("ID").encode(new_id))

    def set_baudrate(self, servo_id: int, baudrate: int) -> None:
        """Let a servo talk at another speed, kept over power-off; the port follows it."""
        if baudrate not in registers.BAUDRATES:
            raise ValueError(f"a servo talks at {registers.BAUDRATES} baud, not at {baudrate}")
        register = registers.register("Baud_Rate")
        self._write(servo_id, registers.register("Lock"), b"\0")
        self._write(servo_id, register, register.encode(registers.BAUDRATES.index(baudrate)))
        self.set_port_baudrate(baudrate)
        self._write(servo_id, registers.register("Lock"), b"\1")

    def close(self) -> None:
        if self._handler.is_open:
            self._handler.closePort()

    def __enter__(self) -> "ServoTool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, baudrate: int) -> None:
        self._handler.is_using = False
        try:
            opened = self._handler.setBaudRate(baudrate)
        except OSError as error:  # pyserial's SerialException is one
            raise PortUnavailable(error.errno, f"{self.port} cannot be opened: {error}") from error
        if not opened:
            raise PortUnavailable(22, f"{self.port}: the SDK cannot talk at {baudrate} baud")
        fcntl.flock(self._handler.ser.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)

    @contextlib.contextmanager
    def _unlocked(self, servo_id: int, id_afterwards: int | None = None) -> Iterator[None]:
        self.write(servo_id, "Lock", 0)
        yield
        self.write(servo_id if id_afterwards is None else id_afterwards, "Lock", 1)

    def _firmware(self, servo_id: int) -> str:
        try:
            major, minor = (self.read(servo_id, f"Firmware_{part}_Version") for part in ("Major", "Minor"))
        except ServoSilentError:
            return "?"
        return f"{major}.{minor}"

    def _verify(self, servo_id: int, name: str, value: int) -> None:
        kept = self.read(servo_id, name)
        if kept != value:
            raise ServoError(f"{self.port}: servo {servo_id} keeps {kept} in {name} instead of {value}")

    def _write(self, servo_id: int, register: Register, data: bytes) -> None:
        def attempt() -> int:
            result, self.last_error = self._packets.writeTxRx(
                self._handler, servo_id, register.address, register.size, list(data)
            )
            return int(result)

        # A servo that has obeyed a change of id or speed, unheard, would not answer a second time.
        attempts = 1 if register.name in ("ID", "Baud_Rate") else ATTEMPTS
        self._try(attempt, servo_id, f"writing {register.name}", attempts)

    def _try(self, attempt: Callable[[], int], servo_id: int, doing: str, attempts: int) -> None:
        result = 0
        for _ in range(attempts):
            result = attempt()
            if result == scservo_sdk.COMM_SUCCESS:
                return
            # Replies carry no number: one that comes late would be taken for the answer to the next question.
            time.sleep(LATE_REPLY_S)
            self._handler.ser.reset_input_buffer()
        reason = self._packets.getTxRxResult(result).split("] ", 1)[-1]
        raise ServoSilentError(f"{self.port}: servo {servo_id} at {self.baudrate} baud, {doing}: {reason}")
