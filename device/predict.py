"""The `predict` role: the newest frames and the joints at their time in, a chunk of actions out, as fast as it can.

It opens the cell's bundle, refuses it with a sentence where it does not fit, proves the engine on the bundle's golden
inputs, and then runs: wait for new frames of every camera, take the joint state at the capture time of the newest one,
infer, publish the chunk with that time. Where the policy looks at several steps, what its engine knows from before is
neither decoded nor encoded again. It never runs twice on the same frames, never on frames that are too old or too far
apart, and never publishes numbers that are not finite. Whoever consumes the chunks needs nothing else from it; when it
dies, the arm holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from device.bundle import STATE, Bundle
from device.config import LoadedCell
from device.engine import EngineError
from device.engine_choice import open_best_engine, release
from device.errors import BundleError, ConfigError
from device.frame_sets import Cameras, FrameSet
from device.log import Once, event
from device.manifest import Manifest
from device.messages import TOPICS, chunks_dtype
from device.topic import TopicReader, TopicWriter, topic_path

logger = logging.getLogger("predict")

TROUBLE_LASTS_S = 1.0
LATE_CHUNKS = 3  # one after the other are no coincidence


class Predict:
    """The role's state. `delay_s` slows inference down artificially, to see what the loop makes of it."""

    def __init__(self, cell: LoadedCell, runtime: Path, delay_s: float = 0.0) -> None:
        path = cell.bundle_path
        if path is None:
            raise ConfigError(f"{cell.path}: policy.bundle: is missing, so there is nothing to predict with")
        bundle = Bundle.open(path)
        bundle.check_fits(cell)
        manifest = bundle.manifest
        if not manifest.cameras:
            raise BundleError(
                f"{path}: the policy has no camera, whose frames are what sets the time of an observation"
            )
        opened = open_best_engine(bundle, threads=cell.cell.policy.threads)
        self._engine = opened.engine
        self.engine_name, self.golden_error = opened.name, opened.golden_error
        self._cameras = Cameras(cell, bundle, self._engine.inputs, runtime)
        self._joints = TopicReader(topic_path(runtime, "joints"))
        self._joints_late_s = 2.0 / cell.cell.control.rate_hz
        dtype = chunks_dtype(manifest.chunk_size, len(manifest.joints))
        self._chunks = TopicWriter(topic_path(runtime, "chunks"), dtype, TOPICS["chunks"].slots)
        self._dt_ns = round(1e9 / manifest.action_rate_hz)
        self._advance_ns = advance_ns(manifest, cell.cell.policy.advance)
        self._useful_ns = useful_ns(manifest, cell.cell.policy.staleness_s)
        self._late_chunks = 0
        self._late = Once(
            lambda reason: event(logger, "chunks.late", level=logging.WARNING, reason=reason),
            lambda: event(logger, "chunks.in_time"),
        )
        self._due_ns = 0  # observations from before are let pass: a chunk is followed for a while before the next
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
        steps = self._cameras.next(timeout_s)
        if steps is None:
            self._note_trouble(self._cameras.trouble)
            return False
        if steps[-1].t_ns < self._due_ns:
            self._no_trouble()
            return False
        try:
            encoding_ns = self._observe(steps)
            if encoding_ns is None:
                return False
            began_ns = time.monotonic_ns()
            actions = self._engine.infer([step.key for step in steps])
        except EngineError as error:
            self._note_trouble(str(error))
            return False
        self._no_trouble()
        if self._delay_s:
            time.sleep(self._delay_s)
        self._publish(steps[-1], actions, encoding_ns + time.monotonic_ns() - began_ns)
        return True

    def close(self) -> None:
        self._chunks.close()
        release(self._engine)

    def _observe(self, steps: Sequence[FrameSet]) -> int | None:
        """Have the engine know all steps. Returns what the engine took, ns; None where one step could not be had."""
        spent_ns = 0
        for step in steps:
            if self._engine.knows(step.key):
                continue
            if not self._cameras.decode(step):
                self._note_trouble(self._cameras.trouble)
                return None
            if not self._fill_state(step.t_ns):
                self._note_trouble("no joint state at the frame's time: is execute running?")
                return None
            began_ns = time.monotonic_ns()
            self._engine.observe(step.key)
            spent_ns += time.monotonic_ns() - began_ns
        return spent_ns

    def _note_trouble(self, reason: str | None) -> None:
        """Worth an event once it has lasted: a frame that came late is nobody's business."""
        now = time.monotonic()
        self._troubled_since = self._troubled_since or now
        self._trouble.update(now - self._troubled_since > TROUBLE_LASTS_S, reason)

    def _no_trouble(self) -> None:
        self._troubled_since = None
        self._trouble.update(False)

    def _fill_state(self, t_ns: int) -> bool:
        """Joint positions at t_ns, waiting for the tick after it if need be (frames can be ahead of the joints)."""
        deadline = time.monotonic() + self._joints_late_s
        position = self._joints.at(t_ns, "position")
        while position is None and (left := deadline - time.monotonic()) > 0:
            self._joints.wait(left, self._joints.cursor)
            position = self._joints.at(t_ns, "position")
        if position is None or not np.isfinite(position).all():
            return False
        self._engine.inputs[STATE][...] = position
        return True

    def _publish(self, observed: FrameSet, actions: np.ndarray[Any, Any], inference_ns: int) -> None:
        self._chunk_id += 1
        self._due_ns = observed.t_ns + self._advance_ns
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
        self._note_lateness(time.monotonic_ns() - observed.t_ns)

    def _note_lateness(self, age_ns: int) -> None:
        """Chunks that are over when they come move nothing: that must not look like an arm that has nothing to do."""
        self._late_chunks = self._late_chunks + 1 if age_ns > self._useful_ns else 0
        age_ms, bound_ms = age_ns / 1e6, self._useful_ns / 1e6
        self._late.update(
            self._late_chunks >= LATE_CHUNKS,
            f"a chunk comes {age_ms:.0f} ms after its observation and is of use for {bound_ms:.0f} ms: the arm holds; "
            "build engines (understudy bundle build), export the policy with fewer steps, or raise policy.staleness_s",
        )


def useful_ns(manifest: Manifest, staleness_s: float) -> int:
    """How long after its observation a chunk moves the arm: until its last action, and never when it is stale."""
    stale_ns = round(staleness_s * 1e9)
    if manifest.chunk_size == 1:  # a single action holds, see device.ensemble
        return stale_ns
    return min(stale_ns, round((manifest.chunk_size - 1) * 1e9 / manifest.action_rate_hz))


def advance_ns(manifest: Manifest, chosen: int | None) -> int:
    """How long after an observation that led to a chunk the next one is due: half a period less than the advance (of
    the cell, else of the bundle), since frames come when they come. 0 where every observation is."""
    advance = chosen or manifest.handoff.advance
    return 0 if advance is None else round((advance - 0.5) * 1e9 / manifest.action_rate_hz)


def run(cell: LoadedCell, runtime: Path, stop: Callable[[], bool], delay_s: float = 0.0) -> None:
    """Run the role until `stop()`. Raises BundleError, ConfigError or EngineError for a bundle that cannot run here."""
    predict = Predict(cell, runtime, delay_s)
    event(
        logger,
        "predict.ready",
        bundle=str(cell.bundle_path),
        engine=predict.engine_name,
        golden_error=predict.golden_error,
    )
    try:
        while not stop():
            predict.step()
    finally:
        predict.close()
