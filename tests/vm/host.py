"""What the machine that runs the tests must have, and how its steps are told to the person who waits.

`require` is called before anything else: it says in one sentence why the virtual machine cannot run here, and that is
exit code 2, not a failure of the project. Packages come from the host's own apt sources and are installed only where
they are missing. `step` prints what is being done, that it still is, and how long it took.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / ".cache" / "vm"
DOT_S = 5  # a dot so often says that a long step is still at work
GUEST_PYTHON = (3, 11)  # Debian 12's; compiled wheels of the environment must fit it


class CannotRunError(Exception):
    """This host cannot run the virtual machine; the message says why, in one sentence."""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done now, and afterwards how long it took."""
    print(f"  {what} ...", end="", flush=True)
    start = time.monotonic()
    over = threading.Event()
    dots = threading.Thread(target=_dots, args=(over,), daemon=True)
    dots.start()
    result = " failed after"
    try:
        yield
        result = ""
    finally:
        over.set()
        dots.join()
        print(f"{result} {time.monotonic() - start:.1f} s", flush=True)


def _dots(over: threading.Event) -> None:
    while not over.wait(DOT_S):
        print(".", end="", flush=True)


def require() -> None:
    """Raise CannotRunError unless this is a root shell on x86-64 with apt and the guest's Python."""
    if os.geteuid() != 0:
        raise CannotRunError("the virtual machine's root file system is built by mmdebstrap, which needs root here")
    if shutil.which("apt-get") is None:
        raise CannotRunError("the virtual machine is built from Debian packages and this host has no apt-get")
    if platform.machine() != "x86_64":
        raise CannotRunError(f"User-Mode Linux exists for x86-64 only and this host is {platform.machine()}")
    if sys.version_info[:2] != GUEST_PYTHON:
        wanted, found = ".".join(map(str, GUEST_PYTHON)), platform.python_version()
        raise CannotRunError(f"the guest runs Python {wanted} out of this environment, which has Python {found}")


def install(packages: Sequence[str]) -> None:
    """Have these Debian packages on the host; apt is asked only for what is missing."""
    missing = [name for name in packages if installed_version(name) is None]
    if not missing:
        return
    with step(f"apt-get install {' '.join(missing)}"):
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing])


def installed_version(package: str) -> str | None:
    """Version of an installed Debian package, or None."""
    query = subprocess.run(
        ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}", package], capture_output=True, text=True
    )
    status, _, version = query.stdout.partition(" ")
    return version if query.returncode == 0 and status == "installed" else None


def run(command: Sequence[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command quietly; its output is shown only if it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", **(env or {})}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise CannotRunError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout
