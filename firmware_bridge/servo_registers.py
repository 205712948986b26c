"""The memory of emulated servos: control tables, and the EEPROM behind them.

`ServoBank` (servo_model) keeps the registers of all its servos in one `RegisterFile`, a byte array that can be
read servo by servo, as the wire does, and register by register over all servos, as the physics does. EEPROM
follows the memory table's Lock (55): a write while it is 1 works, and is forgotten at the next power-up.
"""

import numpy as np
import numpy.typing as npt

from firmware_bridge.registers import CONTROL_TABLE, EEPROM_END, REGISTERS, TABLE_SIZE, Register

FloatArray = npt.NDArray[np.float64]
UInt8Array = npt.NDArray[np.uint8]

_FACTORY_BLOCK = 80
_LOCK = REGISTERS["Lock"].address
_WRITABLE = frozenset(r.address + k for r in CONTROL_TABLE if r.writable for k in range(r.size))


class RegisterFile:
    """The registers of J servos; `index` is a servo's place among them."""

    def __init__(self, ids: list[int]) -> None:
        self._table: UInt8Array = np.zeros((len(ids), TABLE_SIZE), np.uint8)
        self._saved: UInt8Array = np.zeros((len(ids), EEPROM_END), np.uint8)
        for index, servo_id in enumerate(ids):
            for register in CONTROL_TABLE:
                self.put(index, register, servo_id if register.name == "ID" else register.default)
            self._saved[index] = self._table[index, :EEPROM_END]

    def power_up(self, index: int) -> None:
        """What a servo wakes up with: EEPROM as it was saved, and RAM from the factory."""
        for register in CONTROL_TABLE:
            if EEPROM_END <= register.address < _FACTORY_BLOCK:
                self.put(index, register, register.default)
        self._table[index, :EEPROM_END] = self._saved[index]
        self.copy(index, REGISTERS["Max_Torque_Limit"], REGISTERS["Torque_Limit"])  # memory table, 16 and 48

    def read(self, index: int, address: int, size: int) -> bytes:
        """`size` bytes from `address`; zeros beyond the table's end."""
        data = self._table[index, address : address + size].tobytes()
        return data + bytes(size - len(data))

    def write(self, index: int, address: int, data: bytes) -> set[int]:
        """Write what is writable of `data`; returns the addresses written."""
        touched = set(range(address, min(address + len(data), TABLE_SIZE))) & _WRITABLE
        for at in touched:
            self._table[index, at] = data[at - address]
        if not self._table[index, _LOCK]:
            for at in touched:
                if at < EEPROM_END:
                    self._saved[index, at] = self._table[index, at]
        return touched

    def put(self, index: int, register: Register, value: int) -> None:
        """Set a register from inside the servo, with no regard to access and EEPROM."""
        data = np.frombuffer(register.encode(value), np.uint8)
        self._table[index, register.address : register.address + register.size] = data

    def copy(self, index: int, source: Register, target: Register) -> None:
        """Set a register to the value of another of the same size."""
        data = self._table[index, source.address : source.address + source.size]
        self._table[index, target.address : target.address + target.size] = data

    def column(self, name: str) -> UInt8Array:
        """The low byte of a register of all servos: [J], and writable."""
        return self._table[:, REGISTERS[name].address]

    def values(self, name: str) -> FloatArray:
        """A register of all servos, sign decoded: float64 [J]."""
        register = REGISTERS[name]
        words = self.column(name).astype(np.int64)
        if register.size == 2:
            words |= self._table[:, register.address + 1].astype(np.int64) << 8
        if register.sign_bit is not None:
            magnitude = words & (1 << register.sign_bit) - 1
            words = np.where(words >> register.sign_bit & 1, -magnitude, magnitude)
        return words.astype(np.float64)

    def store(self, name: str, values: FloatArray) -> None:
        """Set a two-byte signed register of all servos, [J]; what does not fit is limited."""
        register = REGISTERS[name]
        sign = 1 << (register.sign_bit or 15)
        magnitude = np.minimum(np.abs(values), sign - 1).astype(np.uint16)
        words = magnitude | np.where(values < 0, sign, 0).astype(np.uint16)
        self._table[:, register.address] = words & 0xFF
        self._table[:, register.address + 1] = words >> 8
