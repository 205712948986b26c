"""What the arm is doing, and how it may come to do something else: a pure function of mode, request and circumstances.

`execute` calls `next_mode` for every request from a person or a program, and `Mode.FAULT` is entered by the guard or by
the loss of the bus, never by request. A refusal is a sentence. Tested as a table.
"""

from __future__ import annotations

from dataclasses import dataclass

from device.messages import Mode

REQUESTS = ("idle", "policy", "teleop", "limp", "reset")


@dataclass(frozen=True)
class Circumstances:
    """What a transition depends on besides the mode."""

    has_policy: bool  # the cell names a bundle
    has_leader: bool  # a leader arm is configured
    fault_persists: bool  # what caused the fault is still so


def next_mode(mode: Mode, request: str, now: Circumstances) -> tuple[Mode, str | None]:
    """The mode after a request, and why it was refused (None: it was carried out)."""
    if request not in REQUESTS:
        return mode, f"{request!r} is not a mode; known are {', '.join(REQUESTS)}"
    if mode is Mode.FAULT:
        if request != "reset":
            return mode, "the arm is in fault: see the reason, mend it, then request reset"
        if now.fault_persists:
            return mode, "what caused the fault is still so"
        return Mode.IDLE, None
    if request == "reset":
        return mode, None
    target = Mode[request.upper()]
    if mode is Mode.LIMP and target not in (Mode.IDLE, Mode.LIMP):
        return mode, "the arm is limp: request idle first, so that it holds where it is"
    if target is Mode.POLICY and not now.has_policy:
        return mode, "the cell has no policy: set policy.bundle in the cell file"
    if target is Mode.TELEOP and not now.has_leader:
        return mode, "the cell has no leader arm"
    return target, None
