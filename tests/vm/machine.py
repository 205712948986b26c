"""A running test machine: a User-Mode Linux kernel as a child process, its disk, and a line to the agent in it.

`Machine` boots in a few seconds; `run` executes a shell command in the guest and yields its output line by line;
folders of the host appear in the guest through `share`. `stop` kills the process group that was started here and
nothing else, and everything the machine wrote is in one temporary folder that goes away with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.vm import host

MEMORY_MB = 1024
# The host's end of a serial line has a small buffer: longer requests lose bytes.
LONGEST_COMMAND = 3000


class GuestError(Exception):
    """The machine did not boot, went away, or did not answer in time."""


class Machine:
    """One virtual machine. A context manager: leaving it ends the machine."""

    def __init__(self, kernel: Path, image: Path, kernel_arguments: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="understudy-vm-")
        self.console = Path(self._folder.name) / "console.log"
        self._line, guest_end = socket.socketpair()
        self._received = b""
        folder = self._folder.name
        arguments = [
            str(kernel),
            f"mem={MEMORY_MB}M",
            f"ubd0={folder}/disk.cow,{image}",
            "root=/dev/ubda",
            "rootfstype=ext4",
            "rw",
            "con=null",
            "con0=null,fd:1",
            "ssl=null",
            f"ssl1=fd:{guest_end.fileno()},fd:{guest_end.fileno()}",
            "umid=guest",
            f"uml_dir={folder}",
            "quiet",
            "systemd.show_status=0",
            "net.ifnames=0",
            *kernel_arguments,
        ]
        with self.console.open("wb") as console:
            # A session of its own: the kernel's processes are one group, which `stop` ends as a whole.
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=[guest_end.fileno()],
                start_new_session=True,
                env={**os.environ, "TMPDIR": memory_folder()},
            )
        guest_end.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_up(self, timeout_s: float = 120) -> None:
        """Return when the agent has said hello. Raises GuestError with the console's last lines otherwise."""
        deadline = time.monotonic() + timeout_s
        while "hello" not in self._receive(deadline):
            pass

    def share(self, folder: Path, mount_point: str) -> None:
        """Show a folder of the host, read-only, at a path of the guest."""
        self.check(f"mkdir -p {mount_point} && mount -t hostfs none {mount_point} -o ro,{folder}")

    def check(self, command: str, timeout_s: float = 60) -> str:
        """Run a command that must succeed; returns its output."""
        lines = []
        for line in self.run(command, timeout_s):
            lines.append(line)
        if self.exit_code != 0:
            raise GuestError(f"in the guest, {command!r} failed with {self.exit_code}: " + "\n".join(lines[-20:]))
        return "\n".join(lines)

    def run(self, command: str, timeout_s: float = 60) -> Iterator[str]:
        """Run a command in the guest, yielding its lines as they come; `exit_code` is valid afterwards."""
        if len(command) > LONGEST_COMMAND:
            raise ValueError(f"a command of {len(command)} characters; put it in a file of a shared folder")
        deadline = time.monotonic() + timeout_s
        self._line.sendall(json.dumps({"command": command}).encode() + b"\n")
        while "exit" not in (message := self._receive(deadline)):
            yield str(message["line"])
        self.exit_code = int(str(message["exit"]))

    def stop(self) -> None:
        """End the machine now, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._line.close()
        self._folder.cleanup()

    def _receive(self, deadline: float) -> dict[str, object]:
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._line], [], [], left)
            data = self._line.recv(65536) if ready else b""
            if not data:
                raise GuestError(self._obituary("did not answer in time" if not ready else "went away"))
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def _obituary(self, what: str) -> str:
        last_lines = self.console.read_text(errors="replace").splitlines()[-30:]
        return f"the virtual machine {what}; its console ends with:\n" + "\n".join(last_lines)


def memory_folder() -> str:
    """Where User-Mode Linux keeps the guest's memory: a file that must be executable and as large as the memory."""
    for candidate in ("/dev/shm", tempfile.gettempdir(), str(host.CACHE)):
        Path(candidate).mkdir(parents=True, exist_ok=True)
        space = os.statvfs(candidate)
        roomy = space.f_bavail * space.f_frsize > 1.2 * MEMORY_MB * 2**20
        if roomy and not space.f_flag & os.ST_NOEXEC:
            return candidate
    raise host.CannotRunError(f"the guest's memory needs {MEMORY_MB} MB of executable space in /dev/shm or /tmp")
