"""Mode transitions, as a table."""

from __future__ import annotations

import pytest

from device.messages import Mode
from device.modes import Circumstances, next_mode

READY = Circumstances(has_policy=True, has_leader=True, fault_persists=False, all_answer=True)
BARE = Circumstances(has_policy=False, has_leader=False, fault_persists=False, all_answer=True)
BROKEN = Circumstances(has_policy=True, has_leader=True, fault_persists=True, all_answer=True)
SILENT = Circumstances(has_policy=True, has_leader=True, fault_persists=False, all_answer=False)
IDLE, T, P, L, F = Mode.IDLE, Mode.TELEOP, Mode.POLICY, Mode.LIMP, Mode.FAULT


@pytest.mark.parametrize(
    ("mode", "request_", "now", "after", "refused"),
    [
        (IDLE, "policy", READY, P, None),
        (IDLE, "teleop", READY, T, None),
        (IDLE, "limp", READY, L, None),
        (IDLE, "idle", READY, IDLE, None),
        (IDLE, "reset", READY, IDLE, None),
        (IDLE, "policy", BARE, IDLE, "no policy"),
        (IDLE, "teleop", BARE, IDLE, "no leader"),
        (IDLE, "dance", READY, IDLE, "not a mode"),
        (P, "idle", READY, IDLE, None),
        (P, "teleop", READY, T, None),
        (P, "limp", READY, L, None),
        (P, "policy", READY, P, None),
        (T, "policy", READY, P, None),
        (T, "idle", READY, IDLE, None),
        (L, "policy", READY, L, "request idle first"),
        (L, "teleop", READY, L, "request idle first"),
        (L, "idle", READY, IDLE, None),
        (L, "limp", READY, L, None),
        (F, "policy", READY, F, "in fault"),
        (F, "idle", READY, F, "in fault"),
        (F, "limp", BROKEN, L, None),
        (F, "reset", SILENT, F, "still so"),
        (L, "idle", SILENT, L, "does not answer"),
        (P, "idle", SILENT, IDLE, None),
        (P, "limp", SILENT, L, None),
        (F, "reset", READY, IDLE, None),
        (F, "reset", BROKEN, F, "still so"),
    ],
)
def test_transition(mode: Mode, request_: str, now: Circumstances, after: Mode, refused: str | None) -> None:
    found, why = next_mode(mode, request_, now)
    assert found is after
    assert (why is None) if refused is None else (why is not None and refused in why)
