"""YUYV from vivid, the kernel's virtual camera, through the capture role; then every fault that vivid can inject.

vivid is a V4L2 driver like any other, with buttons for broken buffers, lost buffers, a failing stream and a pulled
plug (Documentation/admin-guide/media/vivid.rst). Its picture is a set of colour bars, so that colours can be checked.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import simplejpeg

from tests.vm.guest.checks import Check, CheckFailedError, check, wait_for_path
from tests.vm.guest.frames import CaptureRole, Seen, delays_ms, gaps, rate_hz, steady
from tests.vm.guest.role import write_cell

WORK = Path("/run/check-vivid")
DEVICE = "/dev/video0"
TABLE: dict[str, object] = {"device": DEVICE, "width": 640, "height": 480, "fps": 30, "format": "YUYV"}
DRIVER = Path("/sys/bus/platform/drivers/vivid")
# vivid's default pattern, 75 % colour bars from left to right.
BARS_RGB = (
    (191, 191, 191),
    (191, 191, 0),
    (0, 191, 191),
    (0, 191, 0),
    (191, 0, 191),
    (191, 0, 0),
    (0, 0, 191),
    (0, 0, 0),
)
COLOUR_TOLERANCE = 24  # vivid's bars are limited-range SMPTE 170M, a JPEG is full range: up to 20 of 255 differ
DAMAGED_BUFFERS = 3
LOST_AND_BACK = ["camera.lost", "camera.back"]


def inject(control: str, value: int = 1) -> None:
    subprocess.run(["v4l2-ctl", "-d", DEVICE, "-c", f"{control}={value}"], check=True, capture_output=True)


def check_frames(role: CaptureRole) -> None:
    with check("vivid YUYV 640x480 at 30: rate, times, counter") as row:
        role.wait_for_event("camera.started")
        seen = steady(role, 3, lambda seen: rate_hz(seen) > 29)
        delays = delays_ms(seen)
        row.note(f"{rate_hz(seen):.2f} Hz, {gaps(seen)} gaps, capture to reader {np.median(delays):.1f} ms")
        row.expect(25 < rate_hz(seen) < 31, "rate off")
        row.expect(bool((np.diff([frame.t_ns for frame in seen]) > 0).all()), "capture times do not grow")
        row.expect(delays.min() > 0 and delays.max() < 500, f"times not of this clock: {delays.min():.0f} ms")
    with check("every JPEG decodes, with the colours of vivid's bars") as row:
        row.expect(bool(seen), "no frames")
        error = max(colour_error(frame) for frame in seen)
        row.note(f"{len(seen)} JPEGs, {len(seen[0].jpeg) // 1024} KB, worst colour error {error:.0f} of 255")
        row.expect(error <= COLOUR_TOLERANCE, "colours wrong")


def colour_error(frame: Seen) -> float:
    picture = simplejpeg.decode_jpeg(frame.jpeg)
    assert picture.shape == (480, 640, 3)
    patches = [picture[400:440, 80 * bar + 30 : 80 * bar + 50].mean(axis=(0, 1)) for bar in range(8)]
    return float(np.abs(np.array(patches) - BARS_RGB).max())


def check_recovery(role: CaptureRole, name: str, control: str) -> None:
    """A fault that ends the stream: lost once, back once, and frames flow as before."""
    with check(name) as row:
        before = len(role.events)
        start_s = time.monotonic()
        inject(control)
        lost = role.wait_for_event("camera.lost", before)
        back = role.wait_for_event("camera.back", before)
        row.note(lost.text.partition("reason=")[2])
        row.note(f"lost after {lost.t_s - start_s:.2f} s, back {back.t_s - lost.t_s:.2f} s later")
        expect_normal(role, row)
        row.expect(role.changes(before) == LOST_AND_BACK, f"events {role.names(before)}")


def expect_normal(role: CaptureRole, row: Check) -> None:
    seen = role.collect(1.5)
    row.expect(rate_hz(seen) > 5, f"afterwards {rate_hz(seen):.1f} Hz")


def check_damage(role: CaptureRole) -> None:
    with check("buffers marked as damaged are dropped") as row:
        role.wait_until_clean()
        before = len(role.events)
        for _ in range(DAMAGED_BUFFERS):
            inject("inject_v4l2_buf_flag_error")
            time.sleep(0.2)
        role.wait_for_event("camera.damaged", before)
        clean = role.wait_for_event("camera.clean", before)
        row.note(clean.text)
        row.expect(role.names(before) == ["camera.damaged", "camera.clean"], f"events {role.names(before)}")
    with check("half of the buffers dropped by the driver") as row:
        before = len(role.events)
        inject("percentage_of_dropped_buffers", 50)
        seen = role.collect(3)
        inject("percentage_of_dropped_buffers", 0)
        row.note(f"{rate_hz(seen):.1f} Hz, {gaps(seen)} gaps seen by readers")
        row.expect(8 < rate_hz(seen) < 24, "rate not halved: the fault has not struck")
        row.expect(set(role.names(before)) <= {"camera.damaged"}, f"events {role.names(before)}")
        role.wait_for_event("camera.clean", before)
        expect_normal(role, row)


def check_removal(role: CaptureRole) -> None:
    with check("driver unbound while streaming, bound again 2 s later") as row:
        before = len(role.events)
        (DRIVER / "unbind").write_text("vivid.0")
        wait_for_path(DEVICE, present=False)
        time.sleep(2)
        (DRIVER / "bind").write_text("vivid.0")
        back = role.wait_for_event("camera.back", before)
        row.note(back.text.partition("away_s=")[2] + " s away")
        expect_normal(role, row)
        row.expect(role.changes(before) == LOST_AND_BACK, f"events {role.names(before)}")


def check_refusal(name: str, key: str, value: object, sentence: str) -> None:
    with check(name) as row:
        cell = write_cell(WORK / f"refused-{key}", {"front": {**TABLE, key: value}})
        role = CaptureRole(cell, "front")
        code = role.wait()
        said = " ".join(role.output)
        row.note(said.partition(") ")[2][:110] + " ...")
        row.expect(code == 1, f"exit code {code}")
        row.expect(sentence in said, f"did not say {sentence!r}")
        row.expect("Traceback" not in said, "a traceback instead of a sentence")


def check_busy() -> None:
    with check("a camera that another program uses: said once, taken over when free") as row:
        other = subprocess.Popen(
            ["v4l2-ctl", "-d", "/dev/video1", "--stream-mmap", "--stream-to=/dev/null"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(1)
        try:
            with CaptureRole(write_cell(WORK / "busy", {"front": {**TABLE, "device": "/dev/video1"}}), "front") as role:
                lost = role.wait_for_event("camera.lost")
                row.note(lost.text.partition("reason=")[2])
                time.sleep(1)
                other.terminate()
                role.wait_for_event("camera.back")
                expect_normal(role, row)
                row.expect("in use" in lost.text, "did not say that it is in use")
                row.expect(role.changes() == ["camera.lost", "camera.started", "camera.back"], f"events {role.names()}")
        finally:
            other.kill()


def main() -> None:
    # By default vivid stamps the end of a frame that it hands out at its start, 30 ms ahead of the clock.
    inject("timestamp_source", 1)
    with CaptureRole(write_cell(WORK / "main", {"front": TABLE}), "front") as role:
        check_frames(role)
        check_damage(role)
        check_recovery(role, "QBUF fails", "inject_vidioc_qbuf_error")
        check_recovery(role, "fatal streaming error", "inject_fatal_streaming_error")
        check_recovery(role, "device disconnected", "disconnect")
        check_removal(role)
        with check("the role lived through all of it and stops when asked") as row:
            if not role.running:
                raise CheckFailedError(f"it has ended: {role.output[-5:]}")
            start_s = time.monotonic()
            code = role.stop()
            row.note(f"exit code {code} after {time.monotonic() - start_s:.2f} s; {role.events[-1].text}")
            row.expect(code == 0, "exit code not 0")
            row.expect(f"flagged={DAMAGED_BUFFERS} " in role.events[-1].text, "damaged buffers were published")
    check_refusal("a size that the camera has not", "width", 648, "it offers YUYV")
    check_refusal("a rate that the camera has not", "fps", 77, "it offers YUYV")
    check_refusal("a format that the camera has not", "format", "MJPG", "it offers YUYV")
    check_busy()


if __name__ == "__main__":
    main()
