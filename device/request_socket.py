"""How a person or a program asks a role for something: one JSON datagram to a Unix socket in the runtime directory.

The command and the demo use `ask`; `execute` (and the virtual world) hold a `RequestSocket` and take what has come, if
anything, once a tick, without ever waiting. A request is an object with a `verb`, and a `deadline_ns` after which it is
refused; the answer is `{"ok": true, ...}` or
`{"ok": false, "why": "one sentence"}`. Who may ask is decided by the permissions of the runtime directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device.errors import DeviceUnavailableError, UnderstudyError

_MAX_BYTES = 8192
Answer = dict[str, Any]


class RefusedError(UnderstudyError, ValueError):
    """A role understood a request and said no; the message is its reason."""


class RequestSocket:
    """A role's end. `handler(request) -> answer` must be quick: it runs between two ticks."""

    def __init__(self, runtime: Path, role: str, handler: Callable[[Answer], Answer]) -> None:
        self._path = runtime / f"{role}.sock"
        self._handler = handler
        self._closed = False
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(str(self._path))

    def poll(self) -> None:
        """Take at most one request and answer it. Costs a microsecond or two when there is none."""
        if self._closed:
            return
        try:
            data, sender = self._socket.recvfrom(_MAX_BYTES)
        except BlockingIOError:
            return
        try:
            request = json.loads(data)
            answer = self._answer(request)
        except Exception as error:  # noqa: BLE001 - the process's edge: nobody who asks may end a control loop
            answer = {"ok": False, "why": f"not understood: {error}"}
        # Who asked and did not wait for the answer must not disturb the loop.
        with contextlib.suppress(OSError):
            if sender:
                self._socket.sendto(json.dumps(answer).encode(), sender)

    def _answer(self, request: Any) -> Answer:
        if not isinstance(request, dict) or not isinstance(request.get("verb"), str):
            return {"ok": False, "why": "a request is a JSON object with a verb"}
        # Who asked has given up by then and may stand next to the arm: never act on a request that is too old. Only
        # stopping is never too late.
        if request["verb"] != "stop" and time.monotonic_ns() > int(request.get("deadline_ns", 2**63)):
            return {"ok": False, "why": "the request came too late"}
        return self._handler(request)

    def close(self) -> None:
        """Take no more requests."""
        if not self._closed:
            self._closed = True
            self._socket.close()
            self._path.unlink(missing_ok=True)


def ask(runtime: Path, role: str, verb: str, *, timeout_s: float = 2.0, **fields: Any) -> Answer:
    """Ask a role and wait for its answer.

    Raises DeviceUnavailableError when the role does not run or does not answer, RefusedError with the role's reason.
    """
    mine = runtime / f"ask-{os.getpid()}-{time.monotonic_ns()}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.bind(str(mine))
        try:
            channel.settimeout(timeout_s)
            deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
            request = {"verb": verb, "deadline_ns": deadline_ns, **fields}
            channel.sendto(json.dumps(request).encode(), str(runtime / f"{role}.sock"))
            answer: Answer = json.loads(channel.recv(_MAX_BYTES))
        except TimeoutError:
            raise DeviceUnavailableError(f"{role} did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise DeviceUnavailableError(f"{role} is not running in {runtime}: {error}") from error
        finally:
            mine.unlink(missing_ok=True)
    if not answer.get("ok"):
        raise RefusedError(f"{role}: {answer.get('why', 'refused without a reason')}")
    return answer
