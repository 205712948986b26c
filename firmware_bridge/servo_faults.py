"""Faults of emulated servos, on demand, by script or by chance.

A `FaultPlan` is a list of timed `Fault`s; `VirtualServos` asks it, reply by reply, what becomes of it.
Scripts are JSON: a list of objects with the fields of `Fault`, for instance
`[{"kind": "silent", "ids": [3], "at_s": 1.0, "for_s": 0.2}, {"kind": "corrupt", "probability": 0.05}]`.
Times count from the moment the script is loaded. The same seed and the same traffic give the same faults.
"""

import json
import random
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from firmware_bridge import registers

KINDS = {
    "silent": "neither hears nor answers",
    "mute": "hears, does not answer",
    "corrupt": "`count` bytes of the reply are changed",
    "drop": "`count` bytes of the reply are lost",
    "garbage": "`count` random bytes before the reply",
    "delay": "the reply comes `delay_s` late",
    "error": "the error bits named in `bits` are set",
    "reboot": "power is cut for a moment, once: torque off, RAM lost",
}
_BITS = {name: bit for bit, name in registers.ERROR_NAMES.items()}


@dataclass(frozen=True)
class Fault:
    """One kind of trouble, for some servos, for some time.

    `ids` None means every servo, `for_s` None means until the plan is cleared; `probability` is by reply (for
    "silent" and "mute", by request).
    """

    kind: str
    ids: tuple[int, ...] | None = None
    at_s: float = 0.0
    for_s: float | None = None
    probability: float = 1.0
    count: int = 1
    delay_s: float = 0.0
    bits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault is called {self.kind!r}; known are {', '.join(KINDS)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"fault {self.kind}: probability is 0 to 1, not {self.probability}")
        unknown = [name for name in self.bits if name not in _BITS]
        if unknown or (self.kind == "error" and not self.bits):
            raise ValueError(f"fault {self.kind}: bits are of {', '.join(_BITS)}, got {list(self.bits)}")
        if self.count < 1 or self.delay_s < 0 or self.at_s < 0 or (self.for_s is not None and self.for_s < 0):
            raise ValueError(f"fault {self.kind}: count must be at least 1, and times not negative")

    def concerns(self, servo_id: int) -> bool:
        return self.ids is None or servo_id in self.ids

    def error_bits(self) -> int:
        return sum(_BITS[name] for name in set(self.bits))


def parse_faults(entries: Iterable[dict[str, Any]]) -> list[Fault]:
    """Faults from their JSON form; ValueError names the entry and what is wrong with it."""
    known = {field.name for field in fields(Fault)}
    faults = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "kind" not in entry or set(entry) - known:
            raise ValueError(f"fault {number}: expected an object with kind and of {sorted(known)}, got {entry!r}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        try:
            faults.append(Fault(**values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"fault {number}: {error}") from error
    return faults


def load_faults(path: Path) -> list[Fault]:
    """The faults of a script file; ValueError with a sentence where it is not one."""
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    try:
        return parse_faults(entries if isinstance(entries, list) else [entries])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class FaultPlan:
    """The faults in force, and the dice. Times are seconds of the caller's clock.

    Faults may be added and cleared from another thread than the one that serves.
    """

    def __init__(self, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self.struck: Counter[tuple[str, int]] = Counter()  # how often, by kind and servo id
        self._active: list[tuple[float, float, Fault]] = []  # start, end, fault

    def add(self, fault: Fault, now_s: float) -> None:
        start = now_s + fault.at_s
        end = float("inf") if fault.for_s is None else start + fault.for_s
        with self._lock:
            self._active.append((start, end, fault))

    def clear(self) -> None:
        with self._lock:
            self._active = []

    def __bool__(self) -> bool:
        return bool(self._active)

    def expire(self, now_s: float) -> None:
        """Forget faults that are over."""
        with self._lock:
            self._active = [entry for entry in self._active if entry[1] > now_s]

    def deaf(self, ids: list[int], now_s: float) -> set[int]:
        """Places in `ids` of the servos that do not hear the present request."""
        return {place for place, servo_id in enumerate(ids) if self._strikes("silent", servo_id, now_s)}

    def error_bits(self, servo_id: int, now_s: float) -> int:
        """Error bits forced on a servo now."""
        bits = 0
        for fault in self._now("error", servo_id, now_s):
            bits |= fault.error_bits()
        return bits

    def due_reboots(self, ids: list[int], now_s: float) -> list[int]:
        """Places in `ids` of the servos whose power is cut now; each reboot is returned once."""
        with self._lock:
            due = [entry for entry in self._active if entry[2].kind == "reboot" and entry[0] <= now_s]
            self._active = [entry for entry in self._active if entry not in due]
        return [place for place, servo_id in enumerate(ids) if any(fault.concerns(servo_id) for *_, fault in due)]

    def spoil(self, servo_id: int, reply: bytes, now_s: float) -> tuple[bytes, float]:
        """What becomes of a reply: its bytes as they arrive (maybe none), and its extra delay in seconds."""
        if self._strikes("mute", servo_id, now_s):
            return b"", 0.0
        data = bytearray(reply)
        for fault in self._striking("corrupt", servo_id, now_s):
            for at in self._random.sample(range(len(data)), min(fault.count, len(data))):
                data[at] ^= self._random.randrange(1, 256)
        for fault in self._striking("drop", servo_id, now_s):
            for at in sorted(self._random.sample(range(len(data)), min(fault.count, len(data))), reverse=True):
                del data[at]
        for fault in self._striking("garbage", servo_id, now_s):
            data[:0] = self._random.randbytes(fault.count)
        delay_s = sum(fault.delay_s for fault in self._striking("delay", servo_id, now_s))
        return bytes(data), delay_s

    def _now(self, kind: str, servo_id: int, now_s: float) -> list[Fault]:
        return [
            fault
            for start, end, fault in self._active
            if fault.kind == kind and start <= now_s < end and fault.concerns(servo_id)
        ]

    def _striking(self, kind: str, servo_id: int, now_s: float) -> list[Fault]:
        striking = [
            fault
            for fault in self._now(kind, servo_id, now_s)
            if fault.probability >= 1 or self._random.random() < fault.probability
        ]
        if striking:
            self.struck[kind, servo_id] += 1
        return striking

    def _strikes(self, kind: str, servo_id: int, now_s: float) -> bool:
        return bool(self._striking(kind, servo_id, now_s))
