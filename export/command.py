"""`understudy export` as the command line calls it: options as text, a report for a person or a machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from export.bundling import ExportReport, export_checkpoint
from export.errors import ExportError
from export.precision import Precision, Storage
from export.sampling import FAST, Sampling
from export.units import TrainedIn

C = TypeVar("C", bound=Enum)


def run_export(
    checkpoint: Path,
    out: Path,
    *,
    joints: str | None = None,
    units: str | None = None,
    weights: str = "fp32",
    precision: str = "fp32",
    cameras: str | None = None,
    image_size: str | None = None,
    fast: bool = False,
    as_json: bool = False,
    **options: Any,
) -> None:
    """What the command line calls: options as text, progress on standard error, the report on standard output.

    `options`: further ones of `export_checkpoint` and fields of `Sampling`, as they are there.
    """
    console = Console(stderr=True)
    with console.status("starting") as status:
        report = export_checkpoint(
            checkpoint,
            out,
            joints=None if joints is None else joints.split(","),
            units=None if units is None else choice("--units", units, TrainedIn),
            weights=choice("--weights", weights, Storage),
            precision=choice("--precision", precision, Precision),
            cameras=None if cameras is None else cameras.split(","),
            image_size=None if image_size is None else _size(image_size),
            sampling=_sampling(fast, options),
            progress=status.update,
            **options,
        )
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(asdict(report) | {"path": str(report.path)}))
        return
    print(_sentence(report, weights))
    if report.saving is not None:
        print(report.saving)
    for joint, error in report.joint_errors.items():
        mean = report.mean_joint_errors[joint]
        print(f"  {joint}: {report.precision.value} differs from fp32 by {mean:.2g} on average, {error:.2g} at most")


def _sentence(report: ExportReport, weights: str) -> str:
    parts = [
        f"{report.path}: {report.nodes} nodes in {report.seconds:.1f} s",
        f"largest difference from PyTorch {report.max_error:.2g} of a joint unit",
    ]
    if weights == "fp16":
        parts.append(f"from rounding the weights {report.max_rounding_error:.2g}")
    if report.sampler is not None:
        parts.append(f"samples by {report.sampler}")
    return ", ".join(parts)


def _sampling(fast: bool, options: dict[str, Any]) -> Sampling:
    """Takes the fields of Sampling out of `options`."""
    names = ("solver", "steps", "spacing", "chaining", "chain")
    given = {name: value for name in names if (value := options.pop(name, None)) is not None}
    if fast and given:
        raise ExportError(f"--fast is a solver, steps and spacing of its own; leave out --{next(iter(given))}")
    for name, known in (("solver", ("ddpm", "ddim", "dpmpp")), ("spacing", ("leading", "trailing"))):
        if name in given and given[name] not in known:
            raise ExportError(f"--{name} {given[name]!r} is unknown; known are {', '.join(known)}")
    if given.get("chaining") not in (None, "sigma", "bins"):
        raise ExportError(f"--chaining {given['chaining']!r} is unknown; known are sigma, bins")
    return FAST if fast else Sampling(**given, force=bool(options.get("force")))


def _size(text: str) -> tuple[int, int]:
    height, times, width = text.partition("x")
    if not (times and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ExportError(f"--image-size {text!r}: expected HEIGHTxWIDTH in pixels, such as 480x640")
    return int(height), int(width)


def choice(option: str, text: str, choices: type[C]) -> C:
    try:
        return choices(text)
    except ValueError:
        known = ", ".join(str(choice.value) for choice in choices)
        raise ExportError(f"{option} {text!r} is unknown; known are {known}") from None
