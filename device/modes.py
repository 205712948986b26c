"""What the arm is doing, and how it may come to do something else: a pure function of mode, request and circumstances.

`execute` calls `next_mode` for every request from a person or a program, and `Mode.FAULT` is entered by the guard or by
the loss of the bus, never by request. A person must always be able to stop the arm and to free it: `idle` and `limp`
lead there from everywhere that they can. A refusal is a sentence. Tested as a table.
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
    all_answer: bool  # every servo answers: only then is it known where the arm would hold


def next_mode(mode: Mode, request: str, now: Circumstances) -> tuple[Mode, str | None]:
    """The mode after a request, and why it was refused (None: it was carried out)."""
    if request not in REQUESTS:
        return mode, f"{request!r} is not a mode; known are {', '.join(REQUESTS)}"
    if request == "limp":
        return Mode.LIMP, None
    if mode is Mode.FAULT:
        return _out_of_fault(request, now)
    if request == "reset":
        return mode, None
    target = Mode[request.upper()]
    if mode is Mode.LIMP:
        if target is not Mode.IDLE:
            return mode, "the arm is limp: request idle first, so that it holds where it is"
        if not now.all_answer:
            return mode, "a servo does not answer, so where the arm would hold is not known"
    if target is Mode.POLICY and not now.has_policy:
        return mode, "the cell has no policy: set policy.bundle in the cell file"
    if target is Mode.TELEOP and not now.has_leader:
        return mode, "the cell has no leader arm"
    return target, None


def _out_of_fault(request: str, now: Circumstances) -> tuple[Mode, str | None]:
    if request != "reset":
        return Mode.FAULT, "the arm is in fault: see the reason, mend it, then request reset"
    if now.fault_persists or not now.all_answer:
        return Mode.FAULT, "what caused the fault is still so"
    return Mode.IDLE, None
