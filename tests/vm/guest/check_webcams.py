"""MJPEG from two USB webcams under the real uvcvideo driver, by their names in /dev/v4l/by-id, and what befalls them.

The webcams are software behind a virtual USB port (webcam.py); everything above the wire is the kernel's and the
project's own. Unplugging ends the emulator's process while the capture role streams from it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import simplejpeg

from tests.vm.guest.checks import Check, check, wait_for_path
from tests.vm.guest.frames import CaptureRole, delays_ms, gaps, rate_hz, steady
from tests.vm.guest.role import write_cell
from tests.vm.guest.webcam import LEFT_RGB, RIGHT_RGB, by_id, pictures, without_huffman_tables

WORK = Path("/run/check-webcams")
FRONT, WRIST = "FRONT-01", "WRIST-02"
PORTS = {FRONT: 0, WRIST: 1}
TABLE: dict[str, object] = {"width": 640, "height": 480, "fps": 30, "format": "MJPG"}
CLOCK = Path("/sys/module/uvcvideo/parameters/clock")
LOST_AND_BACK = ["camera.lost", "camera.back"]
FROZEN_AND_BACK = ["camera.frozen", "camera.back"]


class Plug:
    """One emulated webcam that can be plugged in and pulled out."""

    def __init__(self, serial: str) -> None:
        self.serial = serial
        self.path = by_id(serial)
        self._process: subprocess.Popen[str] | None = None

    def plug_in(self, *options: str) -> float:
        """Seconds until udev has named it."""
        command = [sys.executable, "-m", "tests.vm.guest.webcam", self.serial, str(PORTS[self.serial]), *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        return wait_for_path(self.path)

    def pull_out(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        wait_for_path(self.path, present=False)

    def say(self, line: str) -> None:
        """Change what it does; see webcam.py."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def cell() -> Path:
    return write_cell(WORK, {"front": {**TABLE, "device": by_id(FRONT)}, "wrist": {**TABLE, "device": by_id(WRIST)}})


def check_frames(front: CaptureRole, wrist: CaptureRole) -> None:
    with check("two webcams, MJPEG 640x480 at 30, by their by-id names") as row:
        front.wait_for_event("camera.started")
        wrist.wait_for_event("camera.started")
        for name, role in (("front", front), ("wrist", wrist)):
            seen = steady(role, 2, lambda seen: rate_hz(seen) > 29 and gaps(seen) == 0)
            delays = delays_ms(seen)
            row.note(f"{name} {rate_hz(seen):.1f} Hz, {gaps(seen)} gaps, {np.median(delays):.1f} ms to the reader")
            row.expect(rate_hz(seen) > 24, "rate off")
            row.expect(gaps(seen) == 0, "the driver had no buffer to fill")
            row.expect(bool((np.diff([frame.t_ns for frame in seen]) > 0).all()), "capture times do not grow")
            row.expect(delays.min() > 0 and delays.max() < 500, f"times not of this clock: {delays.min():.0f} ms")
    with check("the bytes are the camera's own, and decode to its colours") as row:
        sent = set(pictures())
        seen = front.collect(1.5)
        foreign = [frame for frame in seen if frame.jpeg not in sent]
        row.note(
            f"{len(seen)} frames, {len({frame.jpeg for frame in seen})} different pictures, {len(foreign)} foreign"
        )
        row.expect(bool(seen) and not foreign, "bytes have changed on the way")
        picture = simplejpeg.decode_jpeg(seen[0].jpeg).astype(int)
        error = max(np.abs(picture[240, 100] - LEFT_RGB).max(), np.abs(picture[240, 540] - RIGHT_RGB).max())
        row.expect(error < 8, f"colours {error} off")


def check_unscheduled(front: CaptureRole) -> None:
    with check("the role stands still for 0.12 s: its buffers lose nothing") as row:
        lost = min(frames_lost_while_stopped(front, 0.12) for _ in range(2))  # the host may add a pause of its own
        row.note(f"{lost} frames lost; {frames_lost_while_stopped(front, 1.0)} lost in a whole second, to compare")
        row.expect(lost == 0, "the driver had no buffer to fill")


def frames_lost_while_stopped(role: CaptureRole, seconds: float) -> int:
    stopper = threading.Timer(0.5, role.stand_still, (seconds,))
    stopper.start()
    return gaps(role.collect(1.5 + seconds))


def check_replug(plug: Plug, front: CaptureRole, wrist: CaptureRole) -> None:
    with check("unplugged while streaming, plugged in again 2 s later") as row:
        front.wait_until_clean()
        before, wrist_before = len(front.events), len(wrist.events)
        start_s = time.monotonic()
        plug.pull_out()
        lost = front.wait_for_event("camera.lost", before)
        other = wrist.collect(2)
        plug.plug_in()
        plugged_s = time.monotonic()
        back = front.wait_for_event("camera.back", before)
        row.note(f"lost after {lost.t_s - start_s:.2f} s, back {back.t_s - plugged_s:.2f} s after its node")
        row.note(f"other camera meanwhile {rate_hz(other):.1f} Hz, {gaps(other)} gaps")
        expect_flow(front, row)
        row.expect(front.changes(before) == LOST_AND_BACK, f"events {front.names(before)}")
        row.expect(wrist.changes(wrist_before) == [], f"the other camera's events {wrist.names(wrist_before)}")
        row.expect(rate_hz(other) > 20 and gaps(other) == 0, "the other camera suffered")
    with check("unplugged and plugged in five times in a row") as row:
        before = len(front.events)
        for _ in range(5):
            plug.pull_out()
            plug.plug_in()
            time.sleep(0.5)
        expect_flow(front, row)
        names = front.changes(before)
        row.note(f"{names.count('camera.lost')} times lost, {names.count('camera.back')} times back")
        row.expect(names == LOST_AND_BACK * (len(names) // 2), f"events {names}")


def expect_flow(role: CaptureRole, row: Check) -> None:
    seen = role.collect(1.5)
    row.expect(rate_hz(seen) > 5, f"afterwards {rate_hz(seen):.1f} Hz")


def check_frozen(plug: Plug, front: CaptureRole) -> None:
    with check("frames stop for 4 s") as row:
        before = len(front.events)
        plug.say("silent on")
        frozen = front.wait_for_event("camera.frozen", before)
        row.note(frozen.text.partition("reason=")[2])
        time.sleep(3)
        plug.say("silent off")
        front.wait_for_event("camera.back", before)
        expect_flow(front, row)
        row.expect(front.changes(before) == FROZEN_AND_BACK, f"events {front.names(before)}")
    with check("frames stop for 8 s: the camera is opened afresh meanwhile") as row:
        before = len(front.events)
        plug.say("silent on")
        time.sleep(8)
        plug.say("silent off")
        back = front.wait_for_event("camera.back", before)
        row.note(back.text.partition("away_s=")[2] + " s away")
        expect_flow(front, row)
        row.expect(front.changes(before) == FROZEN_AND_BACK, f"events {front.names(before)}")
    with check("the same picture for 5 s: noticed after 2, withheld") as row:
        before = len(front.events)
        start_s = time.monotonic()
        plug.say("repeat on")
        frozen = front.wait_for_event("camera.frozen", before)
        row.note(f"noticed after {frozen.t_s - start_s:.1f} s: {frozen.text.partition('reason=')[2]}")
        withheld = front.collect(2)
        plug.say("repeat off")
        front.wait_for_event("camera.back", before)
        expect_flow(front, row)
        row.note(f"{len(withheld)} frames published while frozen")
        row.expect(not withheld, "old pictures were published with fresh times")
        row.expect(front.changes(before) == FROZEN_AND_BACK, f"events {front.names(before)}")


def check_damage(plug: Plug, front: CaptureRole) -> None:
    with check("ten frames cut in half are dropped, the rest flows") as row:
        front.wait_until_clean()
        before = len(front.events)
        plug.say("truncate 10")
        seen = front.collect(2)
        clean = front.wait_for_event("camera.clean", before)
        row.note(f"{clean.text}; {len(seen)} good frames in the 2 s")
        row.expect("dropped=10" in clean.text, "not all were noticed")
        row.expect(set(pictures()) >= {frame.jpeg for frame in seen}, "a damaged frame was published")
        row.expect(front.names(before) == ["camera.damaged", "camera.clean"], f"events {front.names(before)}")


def check_restart(front: CaptureRole) -> CaptureRole:
    with check("the role is killed with -9 and started again") as row:
        _, cursor, _ = front.reader.since(0)
        front.stop(signal.SIGKILL)
        start_s = time.monotonic()
        successor = CaptureRole(cell(), "front")
        successor.wait_for_event("camera.started")
        row.note(f"frames again after {time.monotonic() - start_s:.1f} s")
        expect_flow(successor, row)
        row.expect(front.reader.since(cursor)[1] > cursor, "the old role's reader does not see the new one's frames")
    return successor


def check_missing_at_start(plug: Plug) -> None:
    with check("absent at start: the sentence names the connected cameras, then it is taken") as row:
        plug.pull_out()
        with CaptureRole(cell(), "front") as role:
            lost = role.wait_for_event("camera.lost")
            row.note(lost.text.partition("reason=")[2])
            plug.plug_in()
            role.wait_for_event("camera.back")
            expect_flow(role, row)
            row.expect(f"connected cameras are {by_id(WRIST)} (" in lost.text, "does not name the other webcam")
            row.expect(role.changes() == ["camera.lost", "camera.started", "camera.back"], f"events {role.names()}")


def check_no_huffman_tables(plug: Plug) -> None:
    with check("a camera without Huffman tables in its JPEGs") as row:
        plug.pull_out()
        plug.plug_in("--no-huffman")
        whole = {without_huffman_tables(jpeg): jpeg for jpeg in pictures()}
        with CaptureRole(cell(), "front") as role:
            role.wait_for_event("camera.started")
            seen = role.collect(1)
        row.note(f"{len(seen)} frames, passed on as they are")
        row.expect(bool(seen) and all(frame.jpeg in whole for frame in seen), "bytes have changed on the way")
        frame = seen[0].jpeg
        same = np.array_equal(simplejpeg.decode_jpeg(frame), simplejpeg.decode_jpeg(whole[frame]))
        row.expect(same, "decodes to another picture")


def check_refusals() -> None:
    with check("time stamps of another clock are refused") as row:
        clock = CLOCK.read_text().strip()
        CLOCK.write_text("CLOCK_REALTIME")
        try:
            expect_refusal(row, by_id(FRONT), "does not stamp its frames with CLOCK_MONOTONIC")
        finally:
            CLOCK.write_text(clock)
    with check("the camera's second node, which has no pictures, is refused") as row:
        expect_refusal(row, by_id(FRONT).replace("index0", "index1"), "a camera's first node does (...-video-index0)")


def expect_refusal(row: Check, device: str, sentence: str) -> None:
    role = CaptureRole(write_cell(WORK / "refused", {"front": {**TABLE, "device": device}}), "front")
    code = role.wait()
    said = " ".join(role.output)
    row.note(f"exit code {code}: {said.partition(') ')[2][:110]} ...")
    row.expect(code == 1, "exit code not 1")
    row.expect(sentence in said and "Traceback" not in said, f"did not say {sentence!r}: {said[-300:]}")


def main() -> None:
    front_plug, wrist_plug = Plug(FRONT), Plug(WRIST)
    with check("webcams plugged in") as row:
        row.note(f"nodes named after {front_plug.plug_in():.1f} s and {wrist_plug.plug_in():.1f} s")
    with CaptureRole(cell(), "wrist") as wrist:
        front = CaptureRole(cell(), "front")
        check_frames(front, wrist)
        check_unscheduled(front)
        check_replug(front_plug, front, wrist)
        check_frozen(front_plug, front)
        check_damage(front_plug, front)
        front = check_restart(front)
        front.stop()
        check_missing_at_start(front_plug)
        check_no_huffman_tables(front_plug)
        check_refusals()
    for plug in (front_plug, wrist_plug):
        plug.pull_out()


if __name__ == "__main__":
    main()
