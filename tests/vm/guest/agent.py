"""Runs in the guest as a service: takes commands over a serial line, sends back their output and exit code.

One JSON object a line in both directions. In: {"command": ...}. Out: {"hello": true} once, then {"line": ...} for each
line that the command prints, as it prints it, and {"exit": code} at its end. Standard library only, since it is part of
the image and the project is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import tty

# User-Mode Linux's second serial line; the host holds the other end (tests/vm/machine.py).
LINE = "/dev/ttyS1"


def send(descriptor: int, message: dict[str, object]) -> None:
    os.write(descriptor, json.dumps(message).encode() + b"\n")


def execute(descriptor: int, command: str) -> None:
    child = subprocess.Popen(
        ["bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert child.stdout is not None
    for line in child.stdout:
        send(descriptor, {"line": line.rstrip("\n")})
    send(descriptor, {"exit": child.wait()})


def main() -> None:
    descriptor = os.open(LINE, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(descriptor)
    send(descriptor, {"hello": True})
    pending = b""
    while data := os.read(descriptor, 65536):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            execute(descriptor, json.loads(line)["command"])


if __name__ == "__main__":
    main()
