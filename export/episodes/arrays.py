"""The neutral form: a folder with one .npz an episode, which any program can write with `np.savez`.

    np.savez("episodes/0001.npz", **{
        "observation.state": state,            # numbers [T, S], joint units
        "action": action,                      # numbers [T, A], joint units
        "observation.images.front": pictures,  # uint8 [T, H, W, 3] RGB; any number of cameras, or none
        "rate_hz": 30.0,                       # optional; frames a second, 30 where it is left out
    })

`observation.environment_state` [T, E] is read where it is there, other arrays are left alone. Episodes are sorted by
file name. `open_episodes` comes here for a folder of .npz files that are no shards of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.episodes.episode import (
    ACTION,
    ENVIRONMENT,
    STATE,
    Episode,
    Episodes,
    ImageSize,
    Pixels,
    Progress,
    Vectors,
    is_image,
    vectors,
)
from export.episodes.npz import NpzArray, open_npz
from export.errors import ExportError

RATE = "rate_hz"
DEFAULT_RATE_HZ = 30.0


@dataclass(frozen=True)
class StoredPictures:
    """Pictures of one episode, each camera an array of the file."""

    arrays: Mapping[str, NpzArray]

    def read(self, camera: str, rows: Sequence[int]) -> Iterator[Pixels]:
        for piece in self.arrays[camera].pieces([(row, row + 1) for row in rows]):
            yield piece[0]


def found(folder: Path) -> bool:
    return any(folder.glob("*.npz"))


def read(folder: Path, progress: Progress) -> Episodes:
    """Every .npz file of `folder`. Raises ExportError."""
    paths = sorted(folder.glob("*.npz"))
    episodes: list[Episode] = []
    rate_hz = DEFAULT_RATE_HZ
    for i, path in enumerate(paths):
        progress(f"reading episodes: file {i + 1} of {len(paths)}")
        rate, episode = _episode(path)
        if not episodes:
            rate_hz = rate
        elif rate != rate_hz:
            raise ExportError(f"{path}: {RATE} should be {rate_hz:g} as in {paths[0].name}, found {rate:g}")
        elif episode.cameras != episodes[0].cameras:
            expected, there = _describe(episodes[0].cameras), _describe(episode.cameras)
            raise ExportError(f"{path}: cameras should be {expected} as in {paths[0].name}, found {there}")
        episodes.append(episode)
    return Episodes(folder, "one .npz an episode", rate_hz, episodes[0].cameras, tuple(episodes))


def _episode(path: Path) -> tuple[float, Episode]:
    arrays = open_npz(path)
    pictures = {name: array for name, array in arrays.items() if is_image(name)}
    states = _numbers(path, arrays, STATE)
    for array in pictures.values():
        if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] != 3:
            raise ExportError(
                f"{array} should be uint8 [frames, height, width, 3], found {array.dtype} {list(array.shape)}"
            )
        if array.shape[0] != len(states):
            raise ExportError(f"{array} has {array.shape[0]} frames, {STATE} {len(states)}; they should agree")
    return _rate(arrays), Episode(
        name=path.stem,
        states=states,
        actions=_numbers(path, arrays, ACTION),
        environment=_numbers(path, arrays, ENVIRONMENT) if ENVIRONMENT in arrays else None,
        cameras={name: ImageSize(*array.shape[1:3]) for name, array in sorted(pictures.items())},
        pictures=StoredPictures(pictures),
    )


def _numbers(path: Path, arrays: Mapping[str, NpzArray], name: str) -> Vectors:
    if name not in arrays:
        raise ExportError(f"{path} should hold {name}; it holds {', '.join(arrays) or 'nothing'}")
    return vectors(str(arrays[name]), arrays[name].load())


def _rate(arrays: Mapping[str, NpzArray]) -> float:
    if RATE not in arrays:
        return DEFAULT_RATE_HZ
    value = arrays[RATE].load()
    if value.size != 1 or not np.issubdtype(value.dtype, np.number) or not 0 < float(value.item()) < np.inf:
        raise ExportError(f"{arrays[RATE]} should be one number above 0, found {value.dtype} {value.tolist()}")
    return float(value.item())


def _describe(cameras: Mapping[str, ImageSize]) -> str:
    return ", ".join(f"{name} {size}" for name, size in cameras.items()) or "none"
