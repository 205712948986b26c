"""What an episode is to export, and what is asked of a whole recording before anybody computes with it.

The readers of this package make these objects. States and actions are in memory, since even a hundred hours of them
are small; pictures stay in their files until `Episode.frames` is called. An `Episodes` that exists has been checked:
lengths agree, every number is finite, and all episodes have the same widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.errors import ExportError

STATE = "observation.state"
ENVIRONMENT = "observation.environment_state"
ACTION = "action"
IMAGE = "observation.image"  # and observation.images.<camera>

Vectors = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Progress = Callable[[str], None]


class ImageSize(NamedTuple):
    """Of a camera's pictures, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Pictures(Protocol):
    """Where the pictures of one episode come from."""

    def read(self, camera: str, rows: Sequence[int]) -> Iterable[Pixels]:
        """One uint8 [H, W, 3] RGB picture for each of `rows`, which ascend without repeats. Raises ExportError."""
        ...


@dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration of T frames: `states` [T, S], `actions` [T, A] and, where the recording has one, `environment`
    [T, E], in the units in which they were recorded. `cameras`: the pictures' names and sizes."""

    name: str
    states: Vectors
    actions: Vectors
    environment: Vectors | None
    cameras: Mapping[str, ImageSize]
    pictures: Pictures

    @property
    def length(self) -> int:
        return len(self.states)

    def frames(self, camera: str, indices: ArrayLike) -> Pixels:
        """Pictures [N, H, W, 3] uint8 RGB of `camera` (`observation.images.front`) at the frames `indices` [N], in any
        order, repeats included. Raises ExportError where the recording cannot give them, IndexError beyond it."""
        size = self.cameras.get(camera)
        if size is None:
            raise ExportError(f"{self.name} has no {camera}; its cameras are {', '.join(self.cameras) or 'none'}")
        wanted = np.asarray(indices, dtype=np.intp).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.length):
            raise IndexError(
                f"{self.name} has frames 0 to {self.length - 1}, asked for {wanted.min()} to {wanted.max()}"
            )
        rows, places = np.unique(wanted, return_inverse=True)
        read = np.empty((len(rows), *size, 3), np.uint8)
        for i, (row, picture) in enumerate(zip(rows, self.pictures.read(camera, rows.tolist()), strict=True)):
            if picture.shape != read.shape[1:]:
                found = f"{picture.shape[0]}x{picture.shape[1]}"
                raise ExportError(f"{self.name}: {camera} should be {size}, frame {row} is {found}")
            read[i] = picture
        return read if len(rows) == len(wanted) and np.array_equal(rows, wanted) else read[places]


@dataclass(frozen=True, eq=False)
class Episodes(Sequence[Episode]):
    """A recording: its episodes, all of the same robot. `layout` says what was found at `path`; `rate_hz` is frames and
    actions a second; `cameras` maps input names to sizes. Raises ExportError where the numbers cannot be used."""

    path: Path
    layout: str
    rate_hz: float
    cameras: Mapping[str, ImageSize]
    episodes: tuple[Episode, ...]

    def __post_init__(self) -> None:
        if not self.episodes:
            raise ExportError(f"{self.path} ({self.layout}) holds no episode")
        if not np.isfinite(self.rate_hz) or self.rate_hz <= 0:
            raise ExportError(f"{self.path}: the rate should be above 0 Hz, found {self.rate_hz:g}")
        for episode in self.episodes:
            _check_numbers(f"{self.path}: {episode.name}", episode, self.episodes[0])

    @property
    def state_size(self) -> int:
        return int(self.episodes[0].states.shape[1])

    @property
    def action_size(self) -> int:
        return int(self.episodes[0].actions.shape[1])

    @property
    def environment_size(self) -> int | None:
        environment = self.episodes[0].environment
        return None if environment is None else int(environment.shape[1])

    @property
    def frame_count(self) -> int:
        return sum(episode.length for episode in self.episodes)

    def select(self, numbers: Iterable[int]) -> Episodes:
        """The recording with only these episodes."""
        return replace(self, episodes=tuple(self.episodes[i] for i in numbers))

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> Episodes: ...
    def __getitem__(self, index: int | slice) -> Episode | Episodes:
        return self.episodes[index] if isinstance(index, int) else replace(self, episodes=self.episodes[index])


def is_image(name: str) -> bool:
    """Whether LeRobot takes an input of this name for a camera."""
    return name == IMAGE or name.startswith(f"{IMAGE}s.")


def vectors(where: str, values: NDArray[Any]) -> Vectors:
    """`values` [T, N] as float32. `where` names file and array for the ExportError."""
    if values.ndim != 2 or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
        raise ExportError(f"{where} should be numbers [frames, values], found {values.dtype} {list(values.shape)}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused by name
        return values.astype(np.float32, copy=False)


def _check_numbers(where: str, episode: Episode, first: Episode) -> None:
    for name, values, expected in (
        (STATE, episode.states, first.states),
        (ACTION, episode.actions, first.actions),
        (ENVIRONMENT, episode.environment, first.environment),
    ):
        if (values is None) != (expected is None):
            raise ExportError(f"{where}: {name} should be in every episode or in none; {first.name} differs")
        if values is None or expected is None:
            continue
        if values.dtype != np.float32 or values.ndim != 2:
            raise TypeError(f"{where}: {name}: a reader gave {values.dtype} {list(values.shape)}")
        if values.shape[1] != expected.shape[1]:
            found = f"found {values.shape[1]}, and {expected.shape[1]} in {first.name}"
            raise ExportError(f"{where}: {name} should have one number of values everywhere, {found}")
        if len(values) != episode.length or not len(values):
            found = f"{STATE} has {episode.length} frames, {name} {len(values)}"
            raise ExportError(f"{where}: every array should have the same frames, at least one; {found}")
        if not np.isfinite(values).all():
            frame, column = np.argwhere(~np.isfinite(values))[0]
            raise ExportError(
                f"{where}: {name} is {values[frame, column]} at frame {frame}, value {column}; "
                "leave the episode out or record it again"
            )
