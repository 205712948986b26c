"""Who answers what: the protocol side of the emulated firmware.

`ServoBank.handle` passes every instruction it finds on the wire to `execute`, together with the servos
that can hear it, and gets the replies back in the order in which they go on the wire. The rules are
those of Feetech's protocol manual: broadcasts are obeyed and not answered, except PING; a sync read is
answered by each servo in the order asked; Response_Status_Level 0 leaves writes unanswered.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from firmware_bridge import packets, registers
from firmware_bridge.packets import Packet

# Servos that share a broadcast PING answer one after another; the distance is an estimate.
_BROADCAST_GAP_S = 0.0005
_RETURN_DELAY_UNIT_S = 2e-6  # Return_Delay_Time (7)


class Reply(NamedTuple):
    """A servo's answer, and how long the wire stays silent before it: return delay, turns of the missing."""

    place: int  # the servo's index in the bank
    packet: bytes
    delay_s: float


class Firmware(Protocol):
    """What the protocol needs of the servos; `index` is a servo's place in the bank."""

    silent_ends_sync_read: bool

    @property
    def ids(self) -> Sequence[int]: ...

    def error(self, index: int) -> int: ...

    def read_bytes(self, index: int, address: int, size: int) -> bytes: ...

    def write_bytes(self, index: int, address: int, data: bytes) -> None: ...

    def request_action(self, index: int, write: tuple[int, bytes] | None) -> tuple[int, bytes] | None: ...

    def reboot_at(self, index: int) -> None: ...


def execute(packet: Packet, firmware: Firmware, hearing: Sequence[int]) -> list[Reply]:
    """Carry out one instruction on the servos that hear it; returns their replies in wire order."""
    if packet.code == packets.SYNC_READ:
        return _sync_read(packet.data, firmware, hearing)
    if packet.code == packets.SYNC_WRITE:
        _sync_write(packet.data, firmware, hearing)
        return []
    ids = firmware.ids
    broadcast = packet.servo_id == registers.BROADCAST_ID
    addressed = [index for index in hearing if broadcast or ids[index] == packet.servo_id]
    replies: list[Reply] = []
    for index in sorted(addressed, key=lambda index: ids[index]):
        answers_all = firmware.read_bytes(index, registers.register("Response_Status_Level").address, 1) != b"\0"
        data = _execute_one(packet, firmware, index)
        if data is None or (broadcast and packet.code != packets.PING):
            continue
        if answers_all or packet.code in (packets.PING, packets.READ):
            # After a write of ID, too, the answer carries the id that was asked.
            replies.append(_reply(firmware, index, ids[index], data, _BROADCAST_GAP_S if replies else 0.0))
    return replies


def _execute_one(packet: Packet, firmware: Firmware, index: int) -> bytes | None:
    """The data of the reply, or None where the firmware does not answer at all."""
    if packet.code == packets.PING:
        return b""
    if packet.code == packets.READ and len(packet.data) == 2:
        return firmware.read_bytes(index, packet.data[0], packet.data[1])
    if packet.code == packets.WRITE and len(packet.data) >= 2:
        firmware.write_bytes(index, packet.data[0], packet.data[1:])
        return b""
    if packet.code == packets.REG_WRITE and len(packet.data) >= 2:
        firmware.request_action(index, (packet.data[0], packet.data[1:]))
        return b""
    if packet.code == packets.ACTION:
        awaited = firmware.request_action(index, None)
        if awaited is not None:
            firmware.write_bytes(index, *awaited)
        return b""
    if packet.code == packets.REBOOT:
        firmware.reboot_at(index)
    return None


def _sync_read(parameters: bytes, firmware: Firmware, hearing: Sequence[int]) -> list[Reply]:
    if len(parameters) < 3:
        return []
    address, size, asked = parameters[0], parameters[1], parameters[2:]
    ids = firmware.ids
    replies: list[Reply] = []
    waited_s = 0.0
    for servo_id in asked:
        index = next((index for index in hearing if ids[index] == servo_id), None)
        if index is not None:
            data = firmware.read_bytes(index, address, size)
            replies.append(_reply(firmware, index, servo_id, data, waited_s))
            waited_s = 0.0
        elif firmware.silent_ends_sync_read:
            break
        else:
            # Those after a silent servo let its turn pass.
            waited_s += packets.wire_time_s(size + packets.OVERHEAD, registers.BAUDRATES[0])
    return replies


def _sync_write(parameters: bytes, firmware: Firmware, hearing: Sequence[int]) -> None:
    if len(parameters) < 2 or (len(parameters) - 2) % (parameters[1] + 1):
        return
    address, size = parameters[0], parameters[1]
    ids = firmware.ids
    for at in range(2, len(parameters), size + 1):
        for index in hearing:
            if ids[index] == parameters[at]:
                firmware.write_bytes(index, address, parameters[at + 1 : at + 1 + size])


def _reply(firmware: Firmware, index: int, servo_id: int, data: bytes, waited_s: float) -> Reply:
    delay_raw = firmware.read_bytes(index, registers.register("Return_Delay_Time").address, 1)[0]
    packet = packets.status(servo_id, firmware.error(index), data)
    return Reply(index, packet, waited_s + delay_raw * _RETURN_DELAY_UNIT_S)
