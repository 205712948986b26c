"""Where everything lies in a LeRobotDataset: `meta/`, in the versions 2.0, 2.1 and 3.0 of the format.

Version 2 has a parquet file an episode and a video an episode and camera; version 3 puts many episodes into each and
says in `meta/episodes` which rows and which seconds are whose. `lerobot_dataset.py` reads by the places that are given
here and knows no version. Facts: LeRobot 0.4.4, datasets/utils.py (paths), datasets/lerobot_dataset.py (columns) and
datasets/v30/convert_dataset_v21_to_v30.py (the old layout).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.episodes.episode import ACTION, ENVIRONMENT, STATE, ImageSize, is_image
from export.episodes.parquet import as_numbers, inside, read_columns
from export.errors import ExportError

INFO = Path("meta/info.json")
BY_EPISODE = ("v2.0", "v2.1")
BY_FILE = ("v3.0",)
LARGEST_SIDE = 1 << 14  # px, of a picture


@dataclass(frozen=True)
class VideoSpan:
    """An episode's part of a video; `to_s` is None where the index does not say."""

    path: Path
    from_s: float
    to_s: float | None


@dataclass(frozen=True)
class Place:
    """Where one episode lies: its rows in `data` are those with `episode_index` `number`."""

    number: int
    length: int
    data: Path
    videos: dict[str, VideoSpan]


@dataclass(frozen=True)
class DatasetInfo:
    """What `meta/info.json` says. `widths`: of state, action and environment state; `cameras`: those with three
    colours; `filmed`: which of these are video, the others being stored in the rows."""

    root: Path
    version: str
    rate_hz: float
    widths: dict[str, int]
    cameras: dict[str, ImageSize]
    filmed: tuple[str, ...]
    data_path: str
    video_path: str
    chunks_size: int


def read_info(root: Path) -> DatasetInfo:
    """Raises ExportError where the file is damaged, or of a version of the format that is not known."""
    path = root / INFO
    document = _read_document(path)
    version = document.get("codebase_version")
    if version not in (*BY_EPISODE, *BY_FILE):
        known = ", ".join((*BY_EPISODE, *BY_FILE))
        raise ExportError(
            f"{path}: codebase_version {version} is not supported; known are {known}; convert with LeRobot"
        )
    try:
        features: dict[str, Any] = dict(document["features"])
        cameras = {name: _image_size(entry) for name, entry in features.items() if is_image(name) and _is_colour(entry)}
        return DatasetInfo(
            root=root,
            version=version,
            rate_hz=float(document["fps"]),
            widths={name: _width(features[name]) for name in (STATE, ACTION, ENVIRONMENT) if name in features},
            cameras=cameras,
            filmed=tuple(name for name in cameras if features[name]["dtype"] == "video"),
            data_path=str(document["data_path"]),
            video_path=str(document.get("video_path")),
            chunks_size=_positive(document.get("chunks_size", 1000), "chunks_size"),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ExportError(f"{path} should describe fps, features and data_path; it does not: {error!r}") from error


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ExportError(f"{path} should hold a JSON object")
    return document


def read_places(info: DatasetInfo) -> list[Place]:
    """Every episode, by its number. Raises ExportError."""
    places = list(_places_by_file(info) if info.version in BY_FILE else _places_by_episode(info))
    return sorted(places, key=lambda place: place.number)


def _places_by_file(info: DatasetInfo) -> Iterator[Place]:
    """Version 3: one row an episode in `meta/episodes/chunk-000/file-000.parquet` and so on."""
    folder = info.root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise ExportError(f"{folder} holds no parquet file: the recording ended before LeRobot had written its index")
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for camera in info.filmed:
        names += [
            f"videos/{camera}/{field}" for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        ]
    for path in paths:
        columns = {name: as_numbers(f"{path}: {name}", column) for name, column in read_columns(path, names).items()}
        for i in range(len(columns["length"])):
            row = {name: column[i].item() for name, column in columns.items()}
            data = _fill(info, info.data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            videos = {camera: _span(info, camera, row) for camera in info.filmed}
            yield Place(row["episode_index"], row["length"], data, videos)


def _span(info: DatasetInfo, camera: str, row: Mapping[str, Any]) -> VideoSpan:
    chunk, file, from_s, to_s = (
        row[f"videos/{camera}/{field}"] for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    )
    path = _fill(info, info.video_path, video_key=camera, chunk_index=int(chunk), file_index=int(file))
    return VideoSpan(path, from_s, to_s)


def _places_by_episode(info: DatasetInfo) -> Iterator[Place]:
    """Version 2: one line an episode in `meta/episodes.jsonl`."""
    path = info.root / "meta" / "episodes.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        lengths = [(int(row["episode_index"]), int(row["length"])) for row in rows]
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{path} should hold episode_index and length on every line; it does not: {error!r}"
        ) from error
    for number, length in lengths:
        where = {"episode_chunk": number // info.chunks_size, "episode_index": number}
        videos = {
            camera: VideoSpan(_fill(info, info.video_path, video_key=camera, **where), 0.0, None)
            for camera in info.filmed
        }
        yield Place(number, length, _fill(info, info.data_path, **where), videos)


def _fill(info: DatasetInfo, template: str, **values: Any) -> Path:
    try:
        text = template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ExportError(f"{info.root / INFO}: {template!r} is no path for {', '.join(values)}: {error!r}") from error
    return info.root / inside(text, str(info.root / INFO))


def _is_colour(entry: Mapping[str, Any]) -> bool:
    """Depth maps, which LeRobot also records as videos, are no input of the policies here."""
    details = entry.get("info") or {}
    return entry["dtype"] in ("image", "video") and 3 in entry["shape"] and not details.get("video.is_depth_map")


def _image_size(entry: Mapping[str, Any]) -> ImageSize:
    """From [H, W, 3] or [3, H, W]; `names` says which, where it is there."""
    shape, names = [int(size) for size in entry["shape"]], list(entry.get("names") or ())
    if "height" in names and "width" in names:
        found = shape[names.index("height")], shape[names.index("width")]
    else:
        height, width = shape[:2] if shape[-1] == 3 else shape[1:]
        found = height, width
    if not 0 < min(found) <= max(found) <= LARGEST_SIDE:
        raise ValueError(f"pictures of {found[0]}x{found[1]}")
    return ImageSize(*found)


def _positive(value: Any, name: str) -> int:
    if int(value) < 1:
        raise ValueError(f"{name} {value}")
    return int(value)


def _width(entry: Mapping[str, Any]) -> int:
    (width,) = entry["shape"]
    return int(width)
