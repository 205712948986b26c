"""Which checkpoints there are: files to a Checkpoint, a Checkpoint to a Policy, by two tables.

`export`, `sweep` and `distill` call `read_policy` and know nothing of layouts and families. Whatever is in neither
table is refused with its name and the names of what is supported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from export.act.read import read_act
from export.checkpoint import Checkpoint, Told
from export.cloning.read import read_cloning
from export.diffusion.consistency_policy import read_consistency_policy
from export.diffusion.lerobot import read_diffusion
from export.diffusion.stanford import read_stanford
from export.errors import ExportError
from export.policy import Policy
from export.readers import original_act
from export.readers.diffusion_policy import find_payload, read_payload
from export.readers.lerobot import read_checkpoint
from export.sampling import Sampling

# `type` of the checkpoint's configuration -> what understands it.
FAMILIES: dict[str, Callable[[Checkpoint, Sampling], Policy]] = {
    "act": lambda checkpoint, _: read_act(checkpoint),
    "cloning": lambda checkpoint, _: read_cloning(checkpoint),
    "diffusion": read_diffusion,
    "diffusion_policy": read_stanford,
    "consistency_policy": read_consistency_policy,
}


def read_policy(path: Path, told: Told, sampling: Sampling) -> tuple[Checkpoint, Policy]:
    """The checkpoint at `path` as it was saved, and understood. Raises ExportError."""
    source = _read_files(path, told)
    kind = source.config.get("type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ExportError(f"{source.path}: type: {kind} is not supported; supported are {', '.join(FAMILIES)}")
    policy = FAMILIES[kind](source, sampling)
    if policy.sampler is None and sampling.chosen:
        raise ExportError(f"{source.path}: {kind} answers at once, so there is no solver, steps or spacing to choose")
    return source, policy


def _read_files(path: Path, told: Told) -> Checkpoint:
    if not find_payload(path) and original_act.recognises(path):
        return original_act.read_checkpoint(path, told)
    source = read_payload(path, told) if find_payload(path) else read_checkpoint(path, told)
    for option, given in (("--cameras", told.cameras), ("--image-size", told.image_size)):
        if given is not None:
            raise ExportError(f"{source.path} says itself which cameras it has: leave out {option}")
    return source
