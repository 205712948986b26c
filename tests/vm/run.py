"""`python -m tests.vm.run`: the device side against real kernel drivers, as a table with PASS and FAIL.

Builds what is not in the cache (a kernel and a root file system, both from Debian packages), boots them as an ordinary
process, shows the guest a snapshot of the project, and runs the checks in tests/vm/guest there. Exit code 0: all
passed; 1: something failed; 2: the virtual machine cannot run on this host, with one sentence why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm import host, kernel, rootfs
from tests.vm.machine import GuestError, Machine

# Two vivid cameras with one input each, a webcam's, and no other nodes.
KERNEL_ARGUMENTS = ("vivid.n_devs=2", "vivid.node_types=0x1,0x1", "vivid.num_inputs=1,1", "vivid.input_types=0,0")
IN_GUEST = ("device", "firmware_bridge", "tests/vm")  # what the guest needs of the repository
PROJECT, PACKAGES = "/host/project", "/host/packages"
CHECK_COLUMNS = 56  # of the table
ENVIRONMENT = f"cd / && PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONPATH={PROJECT}:{PACKAGES}"


@dataclass(frozen=True)
class Group:
    """A program of checks in the guest."""

    name: str
    title: str
    timeout_s: float

    @property
    def command(self) -> str:
        return f"{ENVIRONMENT} python3 -m tests.vm.guest.check_{self.name}"


GROUPS = (
    Group("vivid", "YUYV from vivid, and the faults that it can inject", 240),
    Group("webcams", "MJPEG from two USB webcams (uvcvideo)", 300),
    Group("servo_bus", "The servo bus over a USB serial adapter (cdc_acm)", 120),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    ok: bool
    detail: str

    def show(self) -> None:
        columns = shutil.get_terminal_size((160, 0)).columns
        checks = textwrap.wrap(self.check, CHECK_COLUMNS)
        details = textwrap.wrap(self.detail, max(40, columns - CHECK_COLUMNS - 10))
        status = "PASS" if self.ok else "FAIL"
        for check, detail in itertools.zip_longest(checks, details, fillvalue=""):
            print(f"  {status:4}  {check:{CHECK_COLUMNS}}  {detail}".rstrip(), flush=True)
            status = ""


def main() -> int:
    """Run all groups, or those named; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.run", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=[group.name for group in GROUPS], action="append", help="only this group")
    chosen = parser.parse_args().only
    # An exit through SystemExit, so that the machine is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = time.monotonic()
    try:
        host.require()
        rows = run([group for group in GROUPS if chosen is None or group.name in chosen])
    except host.CannotRunError as error:
        print(f"vm-test: {error}", file=sys.stderr)
        return 2
    except GuestError as error:
        print(f"vm-test: {error}", file=sys.stderr)
        return 1
    failed = sum(not row.ok for row in rows)
    print(f"\n{len(rows) - failed} passed, {failed} failed, {time.monotonic() - start:.0f} s in all")
    return 1 if failed or not rows else 0


def run(groups: list[Group]) -> list[Row]:
    """Boot, run the groups one after the other, and print each row as it comes."""
    kernel_file, image = kernel.kernel(), rootfs.image()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="understudy-project-") as folder:
        snapshot(Path(folder))
        with Machine(kernel_file, image, KERNEL_ARGUMENTS) as machine:
            with host.step("boot"):
                machine.wait_until_up()
                machine.share(Path(folder), PROJECT)
                machine.share(Path(sysconfig.get_paths()["purelib"]), PACKAGES)
            print(f"  host load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; guest: {about(machine)}")
            for group in groups:
                print(f"\n{group.title}", flush=True)
                rows += run_group(machine, group)
    return rows


def snapshot(target: Path) -> None:
    """Copy what the guest needs: what is tested does not change while it is tested."""
    for name in IN_GUEST:
        shutil.copytree(host.REPOSITORY / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))


def about(machine: Machine) -> str:
    return machine.check(
        "echo Linux $(uname -r), $(systemctl --version | head -n 1), systemd is $(systemctl is-system-running --wait)"
    )


def run_group(machine: Machine, group: Group) -> Iterator[Row]:
    """Rows of one group; a program that breaks off is a failed row of its own."""
    other: list[str] = []
    try:
        for line in machine.run(group.command, group.timeout_s):
            row = parse(line)
            if row is None:
                other.append(line)
                continue
            row.show()
            yield row
        finished = machine.exit_code == 0
        problem = f"exit code {machine.exit_code}: {' / '.join(other[-8:])}"
    except GuestError as error:
        finished, problem = False, str(error)
    if not finished:
        row = Row(f"{group.name} runs to its end", False, problem)
        row.show()
        yield row


def parse(line: str) -> Row | None:
    """A row, or None for what is none (the output of tools)."""
    try:
        message = json.loads(line)
        return Row(message["check"], message["ok"], message["detail"])
    except (ValueError, TypeError, KeyError):
        return None


if __name__ == "__main__":
    sys.exit(main())
