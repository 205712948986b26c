"""Mode transitions, as a table."""

from __future__ import annotations

import pytest

from device.messages import Mode
from device.modes import Circumstances, next_mode

READY = Circumstances(has_policy=True, has_leader=True, fault_persists=False)
BARE = Circumstances(has_policy=False, has_leader=False, fault_persists=False)
BROKEN = Circumstances(has_policy=True, has_leader=True, fault_persists=True)
I, T, P, L, F = Mode.IDLE, Mode.TELEOP, Mode.POLICY, Mode.LIMP, Mode.FAULT


@pytest.mark.parametrize(
    ("mode", "request_", "now", "after", "refused"),
    [
        (I, "policy", READY, P, None),
        (I, "teleop", READY, T, None),
        (I, "limp", READY, L, None),
        (I, "idle", READY, I, None),
        (I, "reset", READY, I, None),
        (I, "policy", BARE, I, "no policy"),
        (I, "teleop", BARE, I, "no leader"),
        (I, "dance", READY, I, "not a mode"),
        (P, "idle", READY, I, None),
        (P, "teleop", READY, T, None),
        (P, "limp", READY, L, None),
        (P, "policy", READY, P, None),
        (T, "policy", READY, P, None),
        (T, "idle", READY, I, None),
        (L, "policy", READY, L, "request idle first"),
        (L, "teleop", READY, L, "request idle first"),
        (L, "idle", READY, I, None),
        (L, "limp", READY, L, None),
        (F, "policy", READY, F, "in fault"),
        (F, "idle", READY, F, "in fault"),
        (F, "limp", READY, F, "in fault"),
        (F, "reset", READY, I, None),
        (F, "reset", BROKEN, F, "still so"),
    ],
)
def test_transition(mode: Mode, request_: str, now: Circumstances, after: Mode, refused: str | None) -> None:
    found, why = next_mode(mode, request_, now)
    assert found is after
    assert (why is None) if refused is None else (why is not None and refused in why)
