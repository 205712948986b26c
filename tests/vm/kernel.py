"""The test machine's kernel: User-Mode Linux, built from Debian's own kernel source with kernel.fragment.

A User-Mode Linux kernel is an ordinary process, so it needs no virtualisation, and it runs user code at native speed.
The build takes about five minutes on two cores and is cached under .cache/vm by the hash of the fragment and the
version of the source package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.vm import host

SOURCE = "linux-source-6.12"
TOOLS = ("gcc", "make", "flex", "bison", "bc", "libc6-dev", "binutils", "xz-utils")
FRAGMENT = Path(__file__).with_name("kernel.fragment")
# olddefconfig drops an option silently when a dependency is missing; these are the ones that the tests stand on.
NEEDED = (
    "VIDEO_VIVID",
    "USB_VIDEO_CLASS",
    "USBIP_VHCI_HCD",
    "USB_DUMMY_HCD",
    "USB_CONFIGFS_ACM",
    "GPIO_SIM",
    "INPUT_UINPUT",
    "DM_FLAKEY",
    "HOSTFS",
    "SECCOMP_FILTER",
    "CGROUP_BPF",
)


def kernel() -> Path:
    """Path of the kernel's executable; built now unless the cache has it."""
    version = _source_version()
    key = hashlib.sha256(FRAGMENT.read_bytes() + version.encode()).hexdigest()[:16]
    cached = host.CACHE / f"linux-uml-{key}"
    if not cached.exists():
        host.install([SOURCE, *TOOLS])
        with host.step(f"build the kernel from {SOURCE} {version} (about 5 minutes on two cores)"):
            _build(cached)
    return cached


def _source_version() -> str:
    """Version that is installed, else the one that apt would install."""
    if installed := host.installed_version(SOURCE):
        return installed
    policy = subprocess.run(["apt-cache", "policy", SOURCE], capture_output=True, text=True).stdout
    for line in policy.splitlines():
        if line.strip().startswith("Candidate:"):
            return line.split()[1]
    raise host.CannotRunError(f"apt knows no package {SOURCE}; it is in Debian 12's security archive")


def _build(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="understudy-kernel-") as folder:
        tree = Path(folder)
        host.run(["tar", "xf", f"/usr/src/{SOURCE}.tar.xz", "-C", folder, "--strip-components=1"])
        um = {"ARCH": "um"}
        host.run(["make", "-s", "defconfig"], tree, um)
        host.run(["scripts/kconfig/merge_config.sh", "-m", ".config", str(FRAGMENT)], tree, um)
        host.run(["make", "-s", "olddefconfig"], tree, um)
        _check((tree / ".config").read_text())
        host.run(["make", "-s", f"-j{os.cpu_count()}", "linux"], tree, um)
        unfinished = target.with_suffix(".part")
        host.run(["strip", "-o", str(unfinished), "linux"], tree)
        shutil.move(unfinished, target)


def _check(config: str) -> None:
    enabled = set(config.splitlines())
    lost = [option for option in NEEDED if f"CONFIG_{option}=y" not in enabled]
    if lost:
        raise host.CannotRunError(
            f"kernel.fragment: CONFIG_{lost[0]} did not survive olddefconfig; see its dependencies"
        )
