"""Recorded episodes, whoever recorded them, as export needs them: demonstrations to measure a policy by.

`understudy sweep`, `understudy distill`, the precision checks and int8 calibration call `open_episodes` on a folder
and see one form: joint states and actions in raw joint units as arrays, pictures read when they are asked for. A
layout (`lerobot_dataset.py`, `shards.py`, `arrays.py`) brings where the numbers and the pictures lie and nothing else;
a further one is a module with `found` and `read` and a line in `opening.py`. Nothing here unpickles anything.
"""

from export.episodes.episode import Episode, Episodes, ImageSize, Pictures
from export.episodes.matching import check_episodes
from export.episodes.opening import open_episodes
from export.episodes.sampling import Sample, draw_places, sample_at, sample_observations, split

__all__ = [
    "Episode",
    "Episodes",
    "ImageSize",
    "Pictures",
    "Sample",
    "check_episodes",
    "draw_places",
    "open_episodes",
    "sample_at",
    "sample_observations",
    "split",
]
