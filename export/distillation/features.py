"""What the teacher's encoder makes of every recorded frame, computed once and kept in a file.

A distillation freezes the encoder, so a frame's features never change: they are computed by the bundle's own
encoder.onnx (by onnxruntime, on CUDA where it can) and everything after works with vectors. The file is named after the
encoder's bytes and the recording's, so that features of another teacher or of other episodes are never taken for these.
It is written beside its final name and renamed when it is whole; a part that was written goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from device.durable import rename_durably, write_durably
from export.episodes import Episode, Episodes
from export.episodes.episode import ENVIRONMENT, STATE
from export.errors import ExportError

Features = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Told how many frames are done, and of how many."""
OUTPUT = "features"
FRAMES_AT_ONCE = 256
KEEP_EVERY_S = 20.0


def episodes_identity(episodes: Episodes) -> str:
    """A hash of names, states and actions. Pictures are not read for it: no two recordings agree in all the rest."""
    digest = hashlib.sha256()
    for episode in episodes:
        digest.update(f"{episode.name} {episode.length} {dict(episode.cameras)}".encode())
        digest.update(episode.states.tobytes())
        digest.update(episode.actions.tobytes())
    return digest.hexdigest()


def recorded_features(
    encoder: bytes,
    names: Mapping[str, str],
    episodes: Episodes,
    folder: Path,
    *,
    threads: int,
    cuda: bool,
    progress: Progress,
) -> Features:
    """Features of every frame of every episode in turn, float32 [N, F], from `folder` where they are there already.

    `encoder`: the bytes of encoder.onnx, whose inputs are called as the episodes call theirs; `names`: the policy's
    inputs to these. Raises ExportError for features that are not finite, and where the folder cannot be written.
    """
    key = hashlib.sha256(encoder + episodes_identity(episodes).encode()).hexdigest()[:16]
    path = folder / f"features_{key}.npy"
    found = _kept(path, episodes.frame_count)
    if found is not None:
        progress(len(found), len(found))
        return found
    session = _session(encoder, cuda)
    try:
        _compute(session, sorted(names.values()), episodes, path, threads, progress)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
    found = _kept(path, episodes.frame_count)
    if found is None:
        raise ExportError(f"{path} was written and cannot be read; is the disk failing?")
    return found


def _kept(path: Path, frames: int) -> Features | None:
    """The file's features; None where there is none, or one that is cut off and has to be made again."""
    try:
        features = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return features if features.ndim == 2 and len(features) == frames and features.dtype == np.float32 else None


def _session(encoder: bytes, cuda: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # frames are shared out between threads, which is faster for small networks
    have = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(encoder, options, providers=[name for name in wanted if name in have])


def _compute(session: Any, inputs: list[str], episodes: Episodes, path: Path, threads: int, progress: Progress) -> None:
    """Fill `path` by way of a partial file; `<name>.done` says how much of that is valid."""
    partial, note = path.with_suffix(".partial"), path.with_suffix(".done")
    size, total = session.get_outputs()[0].shape[0], episodes.frame_count
    done = _resumable(partial, note, (total, size))
    file = np.lib.format.open_memmap(partial, "r+" if done else "w+", np.float32, (total, size))
    with partial.open("r+b") as whole:  # a disk that is full must be an error here, and not a signal at some page later
        os.posix_fallocate(whole.fileno(), 0, partial.stat().st_size)
    kept_at = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        for begin, episode, frames in _pieces(episodes):
            if begin + len(frames) <= done:
                continue
            # Read here, for a video has one reader at a time; encoded by all threads.
            columns = {name: _column(episode, name, frames) for name in inputs}
            rows = [{name: values[i] for name, values in columns.items()} for i in range(len(frames))]
            found = np.stack(list(pool.map(lambda row: session.run([OUTPUT], row)[0], rows)))
            if not np.isfinite(found).all():
                raise ExportError(f"{episodes.path}: {episode.name}: the teacher's encoder gives NaN or infinity")
            file[begin : begin + len(frames)] = found
            progress(begin + len(frames), total)
            if time.monotonic() - kept_at > KEEP_EVERY_S:
                file.flush()
                write_durably(note, json.dumps({"frames": begin + len(frames)}).encode())
                kept_at = time.monotonic()
    file.flush()
    del file
    rename_durably(partial, path)
    note.unlink(missing_ok=True)


def _resumable(partial: Path, note: Path, shape: tuple[int, int]) -> int:
    """Frames that an interrupted run left valid."""
    try:
        done = int(json.loads(note.read_text())["frames"])
        fits = np.load(partial, mmap_mode="r").shape == shape
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return 0
    return done if fits else 0


def _pieces(episodes: Episodes) -> Iterator[tuple[int, Episode, NDArray[np.intp]]]:
    """Where each piece begins in the file, its episode, and its frames there."""
    begin = 0
    for episode in episodes:
        for first in range(0, episode.length, FRAMES_AT_ONCE):
            frames = np.arange(first, min(first + FRAMES_AT_ONCE, episode.length))
            yield begin + first, episode, frames
        begin += episode.length


def _column(episode: Episode, name: str, frames: NDArray[np.intp]) -> NDArray[Any]:
    """The input `name` at some frames of an episode, [n, ...]."""
    vector = {STATE: episode.states, ENVIRONMENT: episode.environment}.get(name)
    return episode.frames(name, frames) if vector is None else vector[frames]
