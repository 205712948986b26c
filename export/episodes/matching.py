"""Whether a recording shows what a policy looks at: the same inputs, sizes and numbers of joints.

Every command that puts recorded observations into a policy asks here first, so that a recording of another robot, or
of the same robot with a camera moved to another name, is refused in words and not by a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from export.episodes.episode import ENVIRONMENT, STATE, Episodes, ImageSize
from export.errors import ExportError


def check_episodes(episodes: Episodes, inputs: Mapping[str, Sequence[int]], action_size: int) -> None:
    """Raise ExportError unless `episodes` hold every input of the policy.

    `inputs`: by LeRobot's names, shapes without the axis of observation steps; images as [H, W, 3] or [3, H, W].
    Cameras that only the recording has are none of the policy's business.
    """
    sizes: dict[str, int | None] = {STATE: episodes.state_size, ENVIRONMENT: episodes.environment_size}
    for name, shape in inputs.items():
        if len(shape) == 3:
            _check_camera(episodes, name, shape)
            continue
        size = sizes.get(name)
        if size is None:
            recorded = ", ".join([*(known for known, size in sizes.items() if size is not None), *episodes.cameras])
            raise ExportError(f"{episodes.path}: the policy takes {name}; the episodes hold {recorded}")
        if len(shape) != 1 or size != shape[0]:
            expected = "x".join(map(str, shape))
            raise ExportError(f"{episodes.path}: {name}: the policy takes {expected} values, the episodes hold {size}")
    if episodes.action_size != action_size:
        found = f"the policy gives {action_size} values, the episodes hold {episodes.action_size}"
        raise ExportError(f"{episodes.path}: action: {found}; was it recorded on another robot?")


def _check_camera(episodes: Episodes, name: str, shape: Sequence[int]) -> None:
    height, width = shape[1:] if shape[0] == 3 and shape[2] != 3 else shape[:2]
    found, expected = episodes.cameras.get(name), ImageSize(height, width)
    if found is None:
        cameras = ", ".join(episodes.cameras) or "none"
        raise ExportError(f"{episodes.path}: the policy looks at {name}; the episodes' cameras are {cameras}")
    if found != expected:
        raise ExportError(
            f"{episodes.path}: {name}: the policy takes {expected} (height x width), the episodes hold {found}; "
            "give the recording that it was trained on, or one of that size"
        )
