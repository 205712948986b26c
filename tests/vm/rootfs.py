"""The test machine's disk: a minimal Debian 12 with systemd, made by mmdebstrap from the host's apt sources.

Nothing of the project is in it; the repository and its environment reach the guest as read-only folders of the host,
so the image changes only when this file or the agent does, and is cached under .cache/vm by their hash. The image is
never written to: a machine runs on a copy-on-write file of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tests.vm import host

TOOLS = ("mmdebstrap", "e2fsprogs")
SUITE = "bookworm"
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "dbus",
    "python3",
    "libatomic1",  # the fences of device/topic.py
    "v4l-utils",
    "util-linux",
    "procps",
    "iproute2",
    "dmsetup",
    "e2fsprogs",
    "gpiod",
)
IMAGE_BYTES = 1 << 30
SPACE_BYTES = 600 << 20  # the unpacked tree while it is built
AGENT = Path(__file__).parent / "guest" / "agent.py"
AGENT_UNIT = """\
[Unit]
Description=Runs the test's commands, sent over a serial line
After=systemd-udev-trigger.service
[Service]
ExecStart=/usr/bin/python3 -S /usr/local/lib/agent.py
Restart=always
KillMode=process
"""
# Seconds of every boot for nothing: there is no terminal, no clock to set, no archive to refresh.
MASKED_UNITS = (
    "getty.target",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-timesyncd.service",
    "systemd-pstore.service",
    "systemd-ask-password-wall.path",
    "systemd-ask-password-console.path",
)


def image() -> Path:
    """Path of the root file system's image; built now unless the cache has it."""
    key = hashlib.sha256(Path(__file__).read_bytes() + AGENT.read_bytes()).hexdigest()[:16]
    cached = host.CACHE / f"rootfs-{key}.ext4"
    if not cached.exists():
        host.install(TOOLS)
        with host.step(f"build the root file system from Debian {SUITE} packages (about a minute)"):
            _build(cached)
    return cached


def _build(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="understudy-rootfs-", dir=_workplace()) as folder:
        tree = Path(folder) / "root"
        _bootstrap(tree)
        _finish(tree)
        unfinished = target.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        with unfinished.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        host.run(["mke2fs", "-q", "-t", "ext4", "-F", "-L", "root", "-d", str(tree), str(unfinished)])
        shutil.move(unfinished, target)


def _workplace() -> str | None:
    """Memory where there is enough of it (half the time), else the usual place for temporary files."""
    shared = os.statvfs("/dev/shm")
    return "/dev/shm" if shared.f_bavail * shared.f_frsize > SPACE_BYTES else None


def _bootstrap(tree: Path) -> None:
    host.run(
        [
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            '--aptopt=Apt::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=force-unsafe-io",
            SUITE,
            str(tree),
            str(_debian_sources()),
        ]
    )


def _debian_sources() -> Path:
    """The host's own list of Debian mirrors, in either of apt's two formats."""
    for candidate in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if candidate.exists() and SUITE in candidate.read_text():
            return candidate
    raise host.CannotRunError(f"the root file system is Debian {SUITE} and this host's apt sources do not name it")


def _finish(tree: Path) -> None:
    """Agent, name, and units that would only wait."""
    units = tree / "etc/systemd/system"
    (tree / "usr/local/lib/agent.py").write_bytes(AGENT.read_bytes())
    (units / "agent.service").write_text(AGENT_UNIT)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "agent.service").symlink_to("../agent.service")
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    for unit in MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (tree / "etc/hostname").write_text("cell\n")
    (tree / "etc/fstab").write_text("")
    (tree / "etc/machine-id").write_text(f"{1:032x}\n")
