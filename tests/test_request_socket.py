"""Requests: one datagram, one answer, and nobody who asks badly disturbs the one who is asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from device.errors import DeviceUnavailableError
from device.request_socket import RefusedError, RequestSocket, ask


def handle(request: dict[str, Any]) -> dict[str, Any]:
    if request["verb"] == "refuse":
        return {"ok": False, "why": "not today"}
    if request["verb"] == "crash":
        raise ValueError("a handler that cannot make sense of it")
    return {"ok": True, "echo": request.get("value")}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    stop = threading.Event()
    role = RequestSocket(tmp_path, "role", handle)

    def serve() -> None:
        while not stop.wait(0.001):
            role.poll()

    thread = threading.Thread(target=serve)
    thread.start()
    yield tmp_path
    stop.set()
    thread.join()
    role.close()


def test_an_answer_comes_back(served: Path) -> None:
    assert ask(served, "role", "say", value="here")["echo"] == "here"
    assert list(served.glob("ask-*")) == []


def test_a_refusal_is_raised_with_its_reason(served: Path) -> None:
    with pytest.raises(RefusedError, match="role: not today"):
        ask(served, "role", "refuse")


def test_a_role_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailableError, match="role is not running"):
        ask(tmp_path, "role", "say")


def test_a_role_that_does_not_answer_is_named(tmp_path: Path) -> None:
    silent = RequestSocket(tmp_path, "role", handle)
    with pytest.raises(DeviceUnavailableError, match="did not answer"):
        ask(tmp_path, "role", "say", timeout_s=0.05)
    silent.close()


def test_a_request_whose_asker_has_given_up_is_not_carried_out(tmp_path: Path) -> None:
    done: list[str] = []

    def remember(request: dict[str, Any]) -> dict[str, Any]:
        done.append(request["verb"])
        return {"ok": True}

    role = RequestSocket(tmp_path, "role", remember)
    with pytest.raises(DeviceUnavailableError):
        ask(tmp_path, "role", "go", timeout_s=0.02)
    role.poll()
    assert done == []
    role.close()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 8000,
        b'{"verb": "say", "deadline_ns": 1e400}',
        b"",
        b"{",
        b"[]",
        b'{"verb": 3}',
        b"\xff\xfe",
        b'{"verb": "crash"}',
    ],
)
def test_garbage_gets_an_answer_or_nothing_and_the_role_goes_on(served: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(served / "asker"))
        channel.settimeout(5)
        channel.sendto(data, str(served / "role.sock"))
        answer = json.loads(channel.recv(4096))
    assert answer["ok"] is False
    assert ask(served, "role", "say", value=1)["echo"] == 1


def test_who_asks_and_goes_away_is_not_missed(served: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(b'{"verb": "say"}', str(served / "role.sock"))
    assert ask(served, "role", "say", value=2)["echo"] == 2
