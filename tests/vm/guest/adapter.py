"""A USB servo adapter in software: an ACM gadget with the identity of a CH343, and virtual servos behind it.

The kernel's own cdc_acm driver binds to it through dummy_hcd, so that /dev/ttyACM0 and its name in /dev/serial/by-id
come and go as with real hardware. The servos (`understudy virtual-servos`, on a pty) are powered on their own: pulling
the adapter leaves them as they are. A thread carries bytes between the gadget and the pty.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import threading
import time
import tty
from pathlib import Path

from firmware_bridge.serial_port import open_port
from tests.vm.guest.checks import wait_for, wait_for_path
from tests.vm.guest.role import UNDERSTUDY

SERIAL = "5A46083062"
BY_ID = f"/dev/serial/by-id/usb-QinHeng_USB_Single_Serial_{SERIAL}-if00"
BAUDRATE = 1_000_000
_CONFIGFS = Path("/sys/kernel/config/usb_gadget")
_CONTROLLER = "dummy_udc.0"
_GADGET_LINE = "/dev/ttyGS0"


class Adapter:
    """The adapter and the servos behind it; starts unplugged."""

    def __init__(self, ids: str, work: Path) -> None:
        self._gadget = _CONFIGFS / "servos"
        work.mkdir(parents=True, exist_ok=True)
        self._create_gadget()
        servo_link = work / "servos"
        command = [*UNDERSTUDY, "virtual-servos", "--ids", ids, "--link", str(servo_link)]
        self._servos = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(servo_link.exists, 30, "the virtual servos' pty")
        self._bus = open_port(str(servo_link), BAUDRATE)
        threading.Thread(target=self._carry_for_ever, daemon=True).start()

    def plug_in(self) -> float:
        """Seconds until udev has named it."""
        (self._gadget / "UDC").write_text(_CONTROLLER)
        return wait_for_path(BY_ID)

    def pull_out(self) -> None:
        (self._gadget / "UDC").write_text("\n")

    def close(self) -> None:
        """End the servos."""
        self._servos.terminate()
        self._servos.wait()

    def _create_gadget(self) -> None:
        """The device's descriptors: Documentation/usb/gadget_configfs.rst of the kernel."""
        for folder in ("strings/0x409", "configs/c.1", "functions/acm.0"):
            (self._gadget / folder).mkdir(parents=True)
        (self._gadget / "idVendor").write_text("0x1a86")
        (self._gadget / "idProduct").write_text("0x55d3")
        (self._gadget / "strings/0x409/manufacturer").write_text("QinHeng")
        (self._gadget / "strings/0x409/product").write_text("USB Single Serial")
        (self._gadget / "strings/0x409/serialnumber").write_text(SERIAL)
        (self._gadget / "configs/c.1/acm.0").symlink_to(self._gadget / "functions/acm.0")

    def _carry_for_ever(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                line = os.open(_GADGET_LINE, os.O_RDWR | os.O_NOCTTY)
                try:
                    self._carry(line)
                finally:
                    os.close(line)
            time.sleep(0.05)  # unplugged: the line hangs up until the host is there again

    def _carry(self, line: int) -> None:
        """Bytes both ways until the line hangs up."""
        tty.setraw(line)
        poll = select.poll()
        poll.register(line, select.POLLIN)
        poll.register(self._bus, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                data = os.read(descriptor, 4096)
                if not data:
                    return
                os.write(self._bus if descriptor == line else line, data)
