"""A folder in, its episodes out: which layout it is, and who reads it.

Whoever takes `--episodes DIR` calls `open_episodes`. The table below is all that knows of every layout. A folder that
is none of them is refused with what was looked for, and with the folder that was probably meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from export.episodes import arrays, lerobot_dataset, shards
from export.episodes.episode import Episodes, Progress
from export.errors import ExportError


@dataclass(frozen=True)
class Layout:
    """`marks`: by what a person tells it; `found`: whether a folder is one; `read`: the reader."""

    marks: str
    found: Callable[[Path], bool]
    read: Callable[[Path, Progress], Episodes]


LAYOUTS = (
    Layout("a LeRobotDataset (meta/info.json)", lerobot_dataset.found, lerobot_dataset.read),
    Layout("shards of the recipe (shard_*.npz)", shards.found, shards.read),
    Layout("one .npz an episode (*.npz)", arrays.found, arrays.read),
)


def open_episodes(folder: Path, progress: Progress | None = None) -> Episodes:
    """Every episode in `folder`, pictures unread. `progress` gets a line now and then where reading takes long.

    Raises ExportError where the folder is no recording, or a damaged one; it names the file and what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; give the episodes' folder")
    layout = _layout(folder)
    if layout is None:
        looked_for = ", ".join(layout.marks for layout in LAYOUTS)
        raise ExportError(f"{folder} holds no episodes; looked for {looked_for}{_hint(folder)}")
    return layout.read(folder, progress or (lambda line: None))


def _layout(folder: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.found(folder)), None)


def _hint(folder: Path) -> str:
    """Where the recording is, when the folder is one level off."""
    near = [folder.resolve().parent, *sorted(path for path in folder.iterdir() if path.is_dir())]
    meant = [path for path in near if _layout(path) is not None]
    return "; was " + " or ".join(str(path) for path in meant[:3]) + " meant?" if meant else ""
