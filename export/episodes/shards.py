"""The recipe's shards: `shard_<seed>.npz` of `export/recipes/virtual_pick/collect.py`, some twenty episodes each.

Joints and actions of all shards are read at once, a few megabytes; the JPEG pictures, which are the gigabytes, lie
stored in the files and are read one by one. `open_episodes` comes here for a folder of such files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.episodes.episode import Episode, Episodes, ImageSize, Pixels, Progress, vectors
from export.episodes.images import decode_image
from export.episodes.npz import NpzArray, open_npz
from export.errors import ExportError

PATTERN = "shard_*[0-9].npz"  # a shard that is being written ends in .tmp.npz
CAMERAS = ("observation.images.front", "observation.images.wrist")  # the columns of jpeg_end
RATE_HZ = 30.0  # collect.FRAME_HZ
ARRAYS = ("jpeg", "jpeg_end", "state", "action", "episode_end", "image_hw")


@dataclass(frozen=True)
class JpegBlob:
    """Pictures of one episode: where each ends in a shard's bytes, [T, cameras], and where the first begins."""

    jpeg: NpzArray
    begin: int
    ends: NDArray[np.int64]

    def read(self, camera: str, rows: Sequence[int]) -> Iterator[Pixels]:
        column = CAMERAS.index(camera)
        starts = np.concatenate([[self.begin], self.ends.reshape(-1)[:-1]]).reshape(self.ends.shape)
        spans = [(int(starts[row, column]), int(self.ends[row, column])) for row in rows]
        for row, content in zip(rows, self.jpeg.pieces(spans), strict=True):
            yield decode_image(content.tobytes(), f"{self.jpeg.path}: {camera}, frame {row} of an episode")


def found(folder: Path) -> bool:
    return any(folder.glob(PATTERN))


def read(folder: Path, progress: Progress) -> Episodes:
    """Every shard of `folder`, sorted by name. Raises ExportError."""
    paths = sorted(folder.glob(PATTERN))
    episodes: list[Episode] = []
    sizes: set[ImageSize] = set()
    for i, path in enumerate(paths):
        progress(f"reading episodes: shard {i + 1} of {len(paths)}")
        size, more = _shard(path)
        sizes.add(size)
        episodes += more
    if len(sizes) > 1:
        found_sizes = ", ".join(sorted(map(str, sizes)))
        raise ExportError(f"{folder}: shards should hold pictures of one size, found {found_sizes}")
    return Episodes(folder, "shards of the recipe", RATE_HZ, dict.fromkeys(CAMERAS, sizes.pop()), tuple(episodes))


def _shard(path: Path) -> tuple[ImageSize, list[Episode]]:
    arrays = open_npz(path)
    if absent := [name for name in ARRAYS if name not in arrays]:
        raise ExportError(f"{path} should hold {', '.join(ARRAYS)}; {', '.join(absent)} missing")
    jpeg = arrays["jpeg"]
    state, action = (vectors(str(arrays[name]), arrays[name].load()) for name in ("state", "action"))
    jpeg_end, episode_end, image_hw = (_integers(arrays[name]) for name in ("jpeg_end", "episode_end", "image_hw"))
    if jpeg_end.shape != (len(state), len(CAMERAS)) or not _ends(jpeg_end.reshape(-1), jpeg.shape[0]):
        raise ExportError(
            f"{path}: jpeg_end should cut jpeg into {len(CAMERAS)} pictures for each of {len(state)} frames"
        )
    if len(action) != len(state) or not _ends(episode_end, len(state)):
        found_lengths = f"state has {len(state)} frames, action {len(action)}, episodes end at {episode_end.tolist()}"
        raise ExportError(f"{path}: state, action and episode_end should agree; {found_lengths}")
    if image_hw.shape != (2,):
        raise ExportError(f"{path}: image_hw should be height and width, found {image_hw.tolist()}")
    size = ImageSize(*image_hw.tolist())
    bounds = [0, *episode_end.tolist()]
    return size, [
        Episode(
            name=f"{path.stem}/{i}",
            states=state[a:b],
            actions=action[a:b],
            environment=None,
            cameras=dict.fromkeys(CAMERAS, size),
            pictures=JpegBlob(jpeg, int(jpeg_end[a - 1, -1]) if a else 0, jpeg_end[a:b]),
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def _integers(array: NpzArray) -> NDArray[np.int64]:
    values: NDArray[Any] = array.load()
    if not np.issubdtype(values.dtype, np.integer):
        raise ExportError(f"{array} should be integers, found {values.dtype}")
    return values.astype(np.int64)


def _ends(ends: NDArray[np.int64], total: int) -> bool:
    """Whether `ends` cut `total` things into parts, none of them empty."""
    return ends.ndim == 1 and ends.size > 0 and bool((np.diff(ends, prepend=0) > 0).all()) and ends[-1] == total
