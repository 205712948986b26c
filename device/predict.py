"""The `predict` role: the newest frames and the joints at their time in, a chunk of actions out, as fast as it can.

It opens the cell's bundle, refuses it with a sentence where it does not fit, proves the engine on the bundle's golden
inputs, and then runs: wait for new frames of every camera, take the joint state at the capture time of the newest one,
infer, publish the chunk with that time. It never runs twice on the same frames, never on frames that are too old or too
far apart, and never publishes numbers that are not finite. Whoever consumes the chunks needs nothing else from it; when
it dies, the arm holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from device.bundle import STATE, Bundle
from device.config import LoadedCell
from device.engine import Engine, EngineError, open_engine
from device.errors import BundleError, ConfigError
from device.log import Once, event
from device.messages import TOPICS, chunks_dtype
from device.topic import TopicReader, TopicWriter, topic_path

logger = logging.getLogger("predict")

# Engine against golden.npz at start: other processors and thread counts add up in another order (1e-4 seen), a wrong
# engine is off by degrees.
GOLDEN_TOLERANCE = 0.05
TROUBLE_LASTS_S = 1.0


@dataclass(frozen=True)
class Observed:
    """What one inference is about."""

    t_ns: int  # capture time of the newest frame
    skew_ns: int


class Cameras:
    """The newest frames of all of the policy's cameras, decoded into the engine's inputs."""

    def __init__(self, cell: LoadedCell, bundle: Bundle, engine: Engine, runtime: Path) -> None:
        policy = cell.cell.policy
        self._max_skew_ns = round(policy.max_skew_ms * 1e6)
        self._max_age_ns = round(policy.max_frame_age_ms * 1e6)
        self._readers = {
            camera.name: TopicReader(topic_path(runtime, f"frames/{camera.name}")) for camera in bundle.manifest.cameras
        }
        self._inputs = {camera.name: engine.inputs[camera.input] for camera in bundle.manifest.cameras}
        # Cameras at the same rate are rarely in step: half a period is what waiting for the other one may cost.
        self._pairing_ns = min((round(0.5e9 / cell.cell.cameras[name].fps) for name in self._readers), default=0)
        self._used = dict.fromkeys(self._readers, 0)
        self.trouble: str | None = None  # why the last `next` gave nothing, where that is worth telling

    def next(self, timeout_s: float) -> Observed | None:
        """Wait for frames that have not been used, decode them; None where there are none that fit together."""
        frames = self._newest(timeout_s)
        if frames is None:
            return None
        times = [int(frame["t_ns"]) for frame in frames.values()]
        newest, skew = max(times), max(times) - min(times)
        self.trouble = self._objection(frames, newest, skew)
        if self.trouble is not None:
            return None
        for name, frame in frames.items():
            if not self._decode(name, frame):
                return None
        self._used = {name: int(frame["t_ns"]) for name, frame in frames.items()}
        return Observed(newest, skew)

    def _newest(self, timeout_s: float) -> dict[str, Any] | None:
        """The newest frame of each camera once all are new, or some are and half a frame's time has passed since."""
        deadline = time.monotonic_ns() + round(timeout_s * 1e9)
        some_new = False
        while True:
            now = time.monotonic_ns()
            frames = {name: reader.latest() for name, reader in self._readers.items()}
            old = [name for name, frame in frames.items() if frame is None or int(frame["t_ns"]) <= self._used[name]]
            if not old:
                return frames
            complete = all(frame is not None for frame in frames.values())
            if complete and not some_new and len(old) < len(frames):
                some_new = True
                deadline = min(deadline, now + self._pairing_ns)
            if now >= deadline:
                if complete and some_new:
                    return frames
                self.trouble = f"no new frame from {', '.join(old)}"
                return None
            reader = self._readers[old[0]]
            reader.wait(max((deadline - now) / 1e9, 1e-4), reader.cursor)

    def _objection(self, frames: dict[str, Any], newest: int, skew: int) -> str | None:
        age = time.monotonic_ns() - newest
        if age > self._max_age_ns:
            return f"the newest frame is {age / 1e6:.0f} ms old, the bound is {self._max_age_ns / 1e6:.0f} ms"
        if skew > self._max_skew_ns:
            oldest = min(frames, key=lambda name: int(frames[name]["t_ns"]))
            return f"{oldest} is {skew / 1e6:.0f} ms behind, the bound is {self._max_skew_ns / 1e6:.0f} ms"
        for name, frame in frames.items():
            height, width, _ = self._inputs[name].shape
            if (frame["width"], frame["height"]) != (width, height):
                return f"{name} gives {frame['width']}x{frame['height']}, the policy takes {width}x{height}"
        return None

    def _decode(self, name: str, frame: Any) -> bool:
        target = self._inputs[name]
        try:
            # Decoded straight into what inference reads.
            simplejpeg.decode_jpeg(frame["data"][: frame["size"]], colorspace="RGB", buffer=target)
        except ValueError as error:
            self.trouble = f"{name}: a frame that is no JPEG: {error}"
            return False
        return True


class Predict:
    """The role's state. `delay_s` slows inference down artificially, to see what the loop makes of it."""

    def __init__(self, cell: LoadedCell, runtime: Path, delay_s: float = 0.0) -> None:
        path = cell.bundle_path
        if path is None:
            raise ConfigError(f"{cell.path}: policy.bundle: is missing, so there is nothing to predict with")
        bundle = Bundle.open(path)
        bundle.check_fits(cell)
        manifest = bundle.manifest
        if manifest.observation_steps != 1:
            raise BundleError(f"{path}: takes {manifest.observation_steps} observations, this device gives one")
        self._engine = open_engine(bundle, cell.cell.policy.threads)
        self.golden_error = prove_on_golden(bundle, self._engine)
        self._cameras = Cameras(cell, bundle, self._engine, runtime)
        self._joints = TopicReader(topic_path(runtime, "joints"))
        self._joints_late_s = 2.0 / cell.cell.control.rate_hz
        dtype = chunks_dtype(manifest.chunk_size, len(manifest.joints))
        self._chunks = TopicWriter(topic_path(runtime, "chunks"), dtype, TOPICS["chunks"].slots)
        self._dt_ns = round(1e9 / manifest.action_rate_hz)
        self._policy = bundle.digest.encode()
        self._delay_s = delay_s
        self._chunk_id = 0
        self._troubled_since: float | None = None
        self._trouble = Once(
            lambda reason: event(logger, "observation.lacking", level=logging.WARNING, reason=reason),
            lambda: event(logger, "observation.back"),
        )

    def step(self, timeout_s: float = 0.2) -> bool:
        """Wait for an observation and publish its chunk. Returns False where there was none, or it led to nothing."""
        observed = self._cameras.next(timeout_s)
        trouble = self._cameras.trouble
        if observed is not None and not self._fill_state(observed.t_ns):
            observed, trouble = None, "no joint state at the frame's time: is execute running?"
        if observed is None:
            self._note_trouble(trouble)
            return False
        began_ns = time.monotonic_ns()
        try:
            actions = self._engine.infer()
        except EngineError as error:
            self._note_trouble(str(error))
            return False
        self._troubled_since = None
        self._trouble.update(False)
        if self._delay_s:
            time.sleep(self._delay_s)
        self._publish(observed, actions, time.monotonic_ns() - began_ns)
        return True

    def close(self) -> None:
        self._chunks.close()

    def _note_trouble(self, reason: str | None) -> None:
        """Worth an event once it has lasted: a frame that came late is nobody's business."""
        now = time.monotonic()
        self._troubled_since = self._troubled_since or now
        self._trouble.update(now - self._troubled_since > TROUBLE_LASTS_S, reason)

    def _fill_state(self, t_ns: int) -> bool:
        """Joint positions at t_ns, waiting for the tick after it if need be (frames can be ahead of the joints)."""
        deadline = time.monotonic() + self._joints_late_s
        position = self._joints.at(t_ns, "position")
        while position is None and (left := deadline - time.monotonic()) > 0:
            self._joints.wait(left, self._joints.cursor)
            position = self._joints.at(t_ns, "position")
        if position is None:
            return False
        self._engine.inputs[STATE][...] = position
        return True

    def _publish(self, observed: Observed, actions: np.ndarray[Any, Any], inference_ns: int) -> None:
        self._chunk_id += 1
        with self._chunks.slot() as record:
            record["t_obs_ns"] = observed.t_ns
            record["t_ns"] = time.monotonic_ns()
            record["dt_ns"] = self._dt_ns
            record["chunk_id"] = self._chunk_id
            record["count"] = len(actions)
            record["skew_ns"] = observed.skew_ns
            record["inference_ns"] = inference_ns
            record["policy"] = self._policy
            record["actions"] = actions


def prove_on_golden(bundle: Bundle, engine: Engine) -> float:
    """Run the engine on the bundle's golden inputs; returns the largest difference, in joint units.

    Raises BundleError where it exceeds GOLDEN_TOLERANCE: an engine that computes something else must not move an arm.
    """
    inputs, expected = bundle.golden()
    for name, array in inputs.items():
        engine.inputs[name][...] = array
    error = float(np.abs(engine.infer() - expected).max())
    if not error <= GOLDEN_TOLERANCE:
        raise BundleError(
            f"{bundle.path}: this machine's engine differs from the reference by {error:.3g} (bound "
            f"{GOLDEN_TOLERANCE}) on the bundle's golden inputs; export the bundle again or update the engine"
        )
    return error


def run(cell: LoadedCell, runtime: Path, stop: Callable[[], bool], delay_s: float = 0.0) -> None:
    """Run the role until `stop()`. Raises BundleError or ConfigError for a bundle that cannot run in this cell."""
    predict = Predict(cell, runtime, delay_s)
    event(logger, "predict.ready", bundle=str(cell.bundle_path), golden_error=predict.golden_error)
    try:
        while not stop():
            predict.step()
    finally:
        predict.close()
