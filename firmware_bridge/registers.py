"""The control table of the Feetech STS3215, as one table.

Everything that names a register takes its address, size, sign bit and unit from here: the bus, the
diagnosis tools, the emulated firmware and the tests. Names are LeRobot's, so that whoever knows its
code finds the same words. Source: Feetech "ST3215 memory table" (SMS/STS series e-manual); the
sign-magnitude bits and the factory block (80 and up) as LeRobot 0.4.4 `motors/feetech/tables.py`
uses them on real arms. Two-byte values are little-endian.
"""

from dataclasses import dataclass

EEPROM_END = 40  # addresses 0..39 are EEPROM, 40 and up are RAM (memory table, "storage area")
TABLE_SIZE = 128

BROADCAST_ID = 0xFE
MAX_ID = 253
MODEL_NUMBER_STS3215 = 777  # addresses 3, 4 hold 9, 3
TICKS_PER_TURN = 4096
MIDDLE_RAW = 2048
TORQUE_ENABLE_CALIBRATE_MIDDLE = 128  # written to Torque_Enable: "current position becomes 2048"
CURRENT_UNIT_A = 0.0065
VOLTAGE_UNIT_V = 0.1
LOAD_UNIT = 0.001  # of full PWM

# Baud_Rate (6): the register's value is the index. The memory table's values; LeRobot's table calls
# 5, 6, 7 57600, 38400, 19200, which disagrees with the maker for those three.
BAUDRATES = (1_000_000, 500_000, 250_000, 128_000, 115_200, 76_800, 57_600, 38_400)

# Error byte of a status packet, Status (65), Unloading_Condition (19) and LED_Alarm_Condition (20)
# share these bits.
ERROR_VOLTAGE = 0x01
ERROR_SENSOR = 0x02
ERROR_TEMPERATURE = 0x04
ERROR_CURRENT = 0x08
ERROR_ANGLE = 0x10
ERROR_OVERLOAD = 0x20
ERROR_NAMES = {
    ERROR_VOLTAGE: "voltage",
    ERROR_SENSOR: "sensor",
    ERROR_TEMPERATURE: "temperature",
    ERROR_CURRENT: "current",
    ERROR_ANGLE: "angle",
    ERROR_OVERLOAD: "overload",
}


def error_names(error: int) -> list[str]:
    """The names of the bits set in a status packet's error byte, lowest bit first."""
    return [name for bit, name in ERROR_NAMES.items() if error & bit]


@dataclass(frozen=True)
class Register:
    """One entry of the control table.

    `sign_bit` is the index of the sign-magnitude bit, or None where the value has no sign.
    `default` is the value of a new 7.4 V servo; for RAM, the value after power-up.
    """

    name: str
    address: int
    size: int
    unit: str
    default: int
    writable: bool = True
    sign_bit: int | None = None

    @property
    def in_eeprom(self) -> bool:
        return self.address < EEPROM_END

    def encode(self, value: int) -> bytes:
        """The register's bytes for a signed value; ValueError where it does not fit."""
        limit = (1 << (8 * self.size if self.sign_bit is None else self.sign_bit)) - 1
        low = 0 if self.sign_bit is None else -limit
        if not low <= value <= limit:
            raise ValueError(f"{self.name} takes {low} to {limit}, not {value}")
        word = value if value >= 0 else -value | 1 << (self.sign_bit or 0)
        return word.to_bytes(self.size, "little")

    def decode(self, data: bytes) -> int:
        """The signed value of the register's bytes."""
        word = int.from_bytes(data[: self.size], "little")
        if self.sign_bit is None:
            return word
        magnitude = word & (1 << self.sign_bit) - 1
        return -magnitude if word >> self.sign_bit & 1 else magnitude


def _read_only(name: str, address: int, size: int, unit: str, default: int, sign_bit: int | None = None) -> Register:
    return Register(name, address, size, unit, default, writable=False, sign_bit=sign_bit)


CONTROL_TABLE: tuple[Register, ...] = (
    # EEPROM: identity
    _read_only("Firmware_Major_Version", 0, 1, "", 3),
    _read_only("Firmware_Minor_Version", 1, 1, "", 10),
    _read_only("Endianness", 2, 1, "0 = little", 0),
    _read_only("Model_Number", 3, 2, "", MODEL_NUMBER_STS3215),
    Register("ID", 5, 1, "", 1),
    Register("Baud_Rate", 6, 1, "index", 0),
    Register("Return_Delay_Time", 7, 1, "2 us", 0),
    Register("Response_Status_Level", 8, 1, "", 1),
    # EEPROM: limits
    Register("Min_Position_Limit", 9, 2, "tick", 0),
    Register("Max_Position_Limit", 11, 2, "tick", 4095),
    Register("Max_Temperature_Limit", 13, 1, "degC", 70),
    Register("Max_Voltage_Limit", 14, 1, "0.1 V", 80),
    Register("Min_Voltage_Limit", 15, 1, "0.1 V", 40),
    Register("Max_Torque_Limit", 16, 2, "0.1 % of stall", 1000),
    Register("Phase", 18, 1, "bits", 12),
    Register("Unloading_Condition", 19, 1, "error bits", 44),
    Register("LED_Alarm_Condition", 20, 1, "error bits", 47),
    # EEPROM: position loop
    Register("P_Coefficient", 21, 1, "", 32),
    Register("D_Coefficient", 22, 1, "", 32),
    Register("I_Coefficient", 23, 1, "", 0),
    Register("Minimum_Startup_Force", 24, 2, "0.1 % of stall", 16),
    Register("CW_Dead_Zone", 26, 1, "tick", 1),
    Register("CCW_Dead_Zone", 27, 1, "tick", 1),
    Register("Protection_Current", 28, 2, "6.5 mA", 500),
    Register("Angular_Resolution", 30, 1, "", 1),
    Register("Homing_Offset", 31, 2, "tick", 0, sign_bit=11),
    Register("Operating_Mode", 33, 1, "0 position 1 velocity 2 pwm 3 step", 0),
    # EEPROM: protection
    Register("Protective_Torque", 34, 1, "% of stall", 20),
    Register("Protection_Time", 35, 1, "10 ms", 200),
    Register("Overload_Torque", 36, 1, "% of stall", 80),
    Register("Velocity_P_Coefficient", 37, 1, "", 10),
    Register("Over_Current_Protection_Time", 38, 1, "10 ms", 200),
    Register("Velocity_I_Coefficient", 39, 1, "", 10),
    # RAM: commands
    Register("Torque_Enable", 40, 1, "0 off 1 on 128 middle", 0),
    Register("Acceleration", 41, 1, "100 tick/s^2", 0),
    Register("Goal_Position", 42, 2, "tick", 0, sign_bit=15),
    Register("Goal_Time", 44, 2, "0.1 % PWM", 0, sign_bit=10),
    Register("Goal_Velocity", 46, 2, "tick/s", 0, sign_bit=15),
    Register("Torque_Limit", 48, 2, "0.1 % of stall", 1000),
    Register("Lock", 55, 1, "1 = EEPROM writes are not kept", 0),
    # RAM: feedback; the control loop reads 56..70 in one request
    _read_only("Present_Position", 56, 2, "tick", 0, sign_bit=15),
    _read_only("Present_Velocity", 58, 2, "tick/s", 0, sign_bit=15),
    _read_only("Present_Load", 60, 2, "0.1 % PWM", 0, sign_bit=10),
    _read_only("Present_Voltage", 62, 1, "0.1 V", 0),
    _read_only("Present_Temperature", 63, 1, "degC", 0),
    _read_only("Reg_Write_Flag", 64, 1, "1 = an ACTION is awaited", 0),
    _read_only("Status", 65, 1, "error bits", 0),
    _read_only("Moving", 66, 1, "", 0),
    _read_only("Present_Current", 69, 2, "6.5 mA", 0, sign_bit=15),
    _read_only("Goal_Position_2", 71, 2, "tick", 0, sign_bit=15),
    # Factory block
    Register("Moving_Velocity_Threshold", 80, 1, "50 tick/s", 1),
    Register("Maximum_Velocity_Limit", 84, 1, "50 tick/s", 68),
    Register("Maximum_Acceleration", 85, 1, "100 tick/s^2", 254),
    Register("Acceleration_Multiplier", 86, 1, "", 1),
)

REGISTERS: dict[str, Register] = {register.name: register for register in CONTROL_TABLE}

GOAL_POSITION = REGISTERS["Goal_Position"]
TORQUE_ENABLE = REGISTERS["Torque_Enable"]
PRESENT_POSITION = REGISTERS["Present_Position"]
FEEDBACK_ADDRESS = PRESENT_POSITION.address
FEEDBACK_SIZE = REGISTERS["Present_Current"].address + 2 - FEEDBACK_ADDRESS  # 15 bytes, 56..70


def register(name: str) -> Register:
    """The register of that name; KeyError with the near misses where there is none."""
    try:
        return REGISTERS[name]
    except KeyError:
        near = [known for known in REGISTERS if name.split("_")[-1].lower() in known.lower()]
        raise KeyError(f"no register {name!r} in the STS3215 control table; similar: {near}") from None
