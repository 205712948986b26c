"""A LeRobotDataset as episodes: rows from parquet, pictures from its videos or from the rows themselves.

`open_episodes` comes here for a folder with `meta/info.json`. States, actions and times of all episodes are read at
once; a video is opened when a picture of it is asked for. As in LeRobot, a picture is found by time: the episode's
beginning in the video plus the row's timestamp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.episodes.episode import ACTION, ENVIRONMENT, STATE, Episode, Episodes, Pixels, Progress, Vectors
from export.episodes.images import decode_image
from export.episodes.lerobot_index import INFO, DatasetInfo, Place, read_info, read_places
from export.episodes.parquet import as_numbers, as_vectors, read_columns, read_pictures
from export.episodes.video import Videos
from export.errors import ExportError

# LeRobot asks for 1e-4 s unless told otherwise, and which frame is meant is certain within half a period.
TOLERANCE_PERIODS = 0.25


@dataclass(frozen=True)
class Rows:
    """What a data file holds of its episodes, but for pictures."""

    episode: NDArray[np.int64]
    time_s: NDArray[np.float64]
    numbers: dict[str, Vectors]


@dataclass(frozen=True)
class DatasetPictures:
    """Pictures of one episode: `first_row` of it in its data file, `time_s` [T] of its rows since it began."""

    info: DatasetInfo
    place: Place
    first_row: int
    time_s: NDArray[np.float64]
    videos: Videos

    def read(self, camera: str, rows: Sequence[int]) -> Iterator[Pixels]:
        if camera in self.place.videos:
            span = self.place.videos[camera]
            times = [span.from_s + float(self.time_s[row]) for row in rows]
            yield from self.videos[span.path].frames(times, TOLERANCE_PERIODS / self.info.rate_hz)
            return
        data = self.place.data
        stored = read_pictures(data, camera, [self.first_row + row for row in rows], self.info.root)
        for row, content in zip(rows, stored, strict=True):
            yield decode_image(content, f"{data}: {camera}, frame {row} of episode {self.place.number}")


def found(folder: Path) -> bool:
    return (folder / INFO).is_file()


def read(folder: Path, progress: Progress) -> Episodes:
    """Every episode of the dataset. Raises ExportError."""
    info = read_info(folder)
    for name in (STATE, ACTION):
        if name not in info.widths:
            raise ExportError(f"{folder / INFO}: features hold no {name}, which every episode needs")
    by_file: dict[Path, list[Place]] = {}
    for place in read_places(info):
        _check_videos(info, place)
        by_file.setdefault(place.data, []).append(place)
    videos = Videos()
    episodes: dict[int, Episode] = {}
    for i, (path, places) in enumerate(by_file.items()):
        progress(f"reading episodes: file {i + 1} of {len(by_file)}")
        rows = _read_rows(path, info)
        for place in places:
            episodes[place.number] = _episode(info, place, rows, videos)
    in_order = tuple(episodes[number] for number in sorted(episodes))
    return Episodes(folder, f"LeRobotDataset {info.version}", info.rate_hz, info.cameras, in_order)


def _read_rows(path: Path, info: DatasetInfo) -> Rows:
    columns = read_columns(path, ["episode_index", "timestamp", *info.widths])
    return Rows(
        episode=as_numbers(f"{path}: episode_index", columns["episode_index"]).astype(np.int64),
        time_s=as_numbers(f"{path}: timestamp", columns["timestamp"]).astype(np.float64),
        numbers={name: as_vectors(f"{path}: {name}", columns[name], width) for name, width in info.widths.items()},
    )


def _episode(info: DatasetInfo, place: Place, rows: Rows, videos: Videos) -> Episode:
    mine = np.flatnonzero(rows.episode == place.number)
    first, end = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    if len(mine) != place.length or end - first != len(mine):
        found_rows = f"found {len(mine)}" + ("" if end - first == len(mine) else " with others in between")
        raise ExportError(
            f"{place.data}: episode {place.number} should be {place.length} rows in one piece, {found_rows}"
        )
    environment = rows.numbers.get(ENVIRONMENT)
    time_s = rows.time_s[first:end]
    return Episode(
        name=f"episode {place.number}",
        states=rows.numbers[STATE][first:end],
        actions=rows.numbers[ACTION][first:end],
        environment=None if environment is None else environment[first:end],
        cameras=info.cameras,
        pictures=DatasetPictures(info, place, first, time_s, videos),
    )


def _check_videos(info: DatasetInfo, place: Place) -> None:
    """A video that is not there, or that is shorter than its rows: frames were dropped, and what follows is shifted."""
    for camera, span in place.videos.items():
        if not span.path.is_file():
            raise ExportError(f"{span.path} is missing: {camera} of episode {place.number}")
        if span.to_s is None:
            continue
        frames = (span.to_s - span.from_s) * info.rate_hz
        if not frames > place.length - 0.5:
            found_frames = f"{camera} has {frames:.0f} frames, {place.length} rows"
            raise ExportError(
                f"{info.root}: episode {place.number}: {found_frames}; they should agree, record it again"
            )
