"""The student as files: an ordinary LeRobot checkpoint with two more, written whole or not at all.

The teacher's config.json and processors are copied byte for byte, and so is every tensor but the denoising network's;
LeRobot loads the result. `sampler.json` says how it samples, which LeRobot does not read (it would sample the student
by the teacher's schedule) and `understudy export` does. `distillation.json` says where it comes from and what the gate
found.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from export.bundle_writer import partial_bundle
from export.checkpoint import uncompiled
from export.diffusion.lerobot import PREFIX, STUDENT, STUDENT_RECORD
from export.diffusion.samplers import ConsistencySamplers
from export.distillation.gate import Verdict
from export.distillation.options import Limits, Options
from export.distillation.teacher import Teacher
from export.errors import ExportError
from export.readers.lerobot import CONFIG, TRAINING_CONFIG

METHOD = "consistency distillation (arXiv:2303.01469)"


def refuse_occupied_student(out: Path, overwrite: bool) -> None:
    """Raise ExportError where `out` holds something that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"{out} exists already; give another --out, or --overwrite")
    if not (out / STUDENT_RECORD).is_file():
        raise ExportError(f"{out} is no distilled student, so it is not overwritten; give another --out")


def write_student(
    out: Path,
    teacher: Teacher,
    weights: Mapping[str, Tensor],
    samplers: ConsistencySamplers,
    record: Mapping[str, Any],
) -> None:
    """Put the student at `out`, replacing a student that is there. `weights`: the network's, by the policy's names.

    Raises ExportError where it cannot be written; `out` is then as it was.
    """
    source = teacher.source
    others = [name for name in source.source_files if name != source.weights_path.name]
    if (source.path / TRAINING_CONFIG).is_file():
        others.append(TRAINING_CONFIG)
    with partial_bundle(out, overwrite=True) as partial:
        partial.write({name: (source.path / name).read_bytes() for name in dict.fromkeys((CONFIG, *others))})
        partial.write(
            {
                source.weights_path.name: _with_weights(teacher, weights),
                STUDENT: _json(samplers.document()),
                STUDENT_RECORD: _json(record),
            }
        )


def provenance(
    teacher: Teacher,
    episodes: Mapping[str, Any],
    options: Options,
    trained: Mapping[str, Any],
    verdict: Verdict,
    limits: Limits,
    judged: Mapping[str, Any],
) -> dict[str, Any]:
    """distillation.json: all that is needed to do it again, and the gate's figures beside their limits."""
    return {
        "method": METHOD,
        "teacher": {"checkpoint": str(teacher.source.path.resolve()), "files": teacher.source.source_files},
        "episodes": dict(episodes),
        "options": dataclasses.asdict(options),
        "training": dict(trained),
        "gate": {
            "passed": verdict.passed,
            "objections": verdict.objections,
            **judged,
            "limits": dataclasses.asdict(limits),
            "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in verdict.checks],
            "teacher": dataclasses.asdict(verdict.teacher),
            "student": dataclasses.asdict(verdict.student),
            "teacher_in_as_few_steps": None if verdict.hurried is None else dataclasses.asdict(verdict.hurried),
            "demonstrated_jerk": verdict.demonstrated_jerk,
            "variety": verdict.variety,
            "units": "distances and jerk in normalised actions, *_joints in joint units; success was not measured",
        },
    }


def _with_weights(teacher: Teacher, weights: Mapping[str, Tensor]) -> bytes:
    """The teacher's safetensors with the network's tensors replaced, under the names and in the types that it has."""
    path, tensors, left = teacher.source.weights_path, {}, set(weights)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            tensor = file.get_tensor(name)
            plain = uncompiled(name).removeprefix(PREFIX)
            if plain in weights:
                tensor = weights[plain].to(tensor.dtype).contiguous()
                left.discard(plain)
            tensors[name] = tensor
    if left:
        raise ExportError(f"{path} lacks {', '.join(sorted(left))}, which was distilled; was the teacher replaced?")
    return bytes(save(tensors, metadata))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
