"""The commands of `understudy` that run off the arm: checkpoints in, bundles and students out.

`device.cli` adds them to the one command; every import of what they do stands inside them, so that a device that has
none of it can still say what it lacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

# Optional[...] and not `... | None`: typer evaluates annotations, and Python 3.10 must too.
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]

UNSAID, LOWER, SAMPLING, CHUNKS = (
    "What a checkpoint does not say",
    "Size and precision",
    "Sampling (policies that denoise)",
    "Following chunks",
)


def _option(text: str, panel: str, **bounds: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **bounds)


JointsOption = Annotated[
    Optional[str],  # noqa: UP045
    _option("Joint names in action order, comma separated; NAME=UNIT for one in another unit.", UNSAID),
]
UnitsOption = Annotated[
    Optional[str],  # noqa: UP045
    _option("Of the joints in training: degrees (default), range_m100_100, range_0_100 or radians.", UNSAID),
]
RateOption = Annotated[
    Optional[float],  # noqa: UP045
    _option("Actions a second in training; 30 where you do not say.", UNSAID),
]
UnnormalizedOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    _option("A feature that has no statistics and needs none.", UNSAID),
]


def add_commands(app: typer.Typer) -> None:
    """Add `export`, `sweep` and `distill`."""
    for command in (export, sweep, distill):
        app.command()(command)


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="LeRobot's pretrained_model directory, or a .ckpt file of another framework.")
    ],
    out: Annotated[Path, typer.Option(help="Where the bundle goes.")],
    observation: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="OBS.npz of a real observation: golden input and reference pictures."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
    force: Annotated[bool, typer.Option(help="Export in spite of too large an error or too few steps.")] = False,
    as_json: JsonOption = False,
    joints: JointsOption = None,
    units: UnitsOption = None,
    rate: RateOption = None,
    cameras: Annotated[
        Optional[str],  # noqa: UP045
        _option("Camera names in training's order, comma separated, where the checkpoint has none.", UNSAID),
    ] = None,
    image_size: Annotated[
        Optional[str],  # noqa: UP045
        _option("HEIGHTxWIDTH of the cameras' pictures, where the checkpoint does not say.", UNSAID),
    ] = None,
    dataset: Annotated[Optional[str], _option("Training dataset, for the record.", UNSAID)] = None,  # noqa: UP045
    allow_unnormalized: UnnormalizedOption = None,
    weights: Annotated[str, _option("fp32, or fp16 to store the weights in half the space.", LOWER)] = "fp32",
    precision: Annotated[
        str, _option("What the networks compute in: fp32, fp16 (for TensorRT) or int8 (convolutions).", LOWER)
    ] = "fp32",
    episodes: Annotated[
        Optional[Path],  # noqa: UP045
        _option("Recorded episodes: what a lower precision is measured and calibrated on.", LOWER),
    ] = None,
    solver: Annotated[
        Optional[str],  # noqa: UP045
        _option("ddpm, ddim or dpmpp; default: as the checkpoint's configuration says.", SAMPLING),
    ] = None,
    steps: Annotated[Optional[int], _option("Denoising steps an inference.", SAMPLING, min=1)] = None,  # noqa: UP045
    spacing: Annotated[Optional[str], _option("Of these steps: leading or trailing.", SAMPLING)] = None,  # noqa: UP045
    fast: Annotated[bool, _option("The same as --solver ddim --steps 10 --spacing leading.", SAMPLING)] = False,
    chain: Annotated[
        Optional[int],  # noqa: UP045
        _option("Consistency Policy: steps of chained sampling.", SAMPLING, min=1),
    ] = None,
    chaining: Annotated[
        Optional[str],  # noqa: UP045
        _option("Consistency Policy: read chaining times as sigma (as published code does) or bins.", SAMPLING),
    ] = None,
    handoff: Annotated[Optional[str], _option("Recommend ensemble, crossfade or latest.", CHUNKS)] = None,  # noqa: UP045
    ensemble_m: Annotated[Optional[float], _option("The ensemble's coefficient.", CHUNKS)] = None,  # noqa: UP045
    advance: Annotated[
        Optional[int],  # noqa: UP045
        _option("Actions from one chunk to the next; default: half a chunk of policies that sample.", CHUNKS, min=1),
    ] = None,
    two_state: Annotated[str, _option("Joints that are never averaged, comma separated.", CHUNKS)] = "",
) -> None:
    """Turn a checkpoint into a bundle whose numbers are proven equal to the original's."""
    from export.command import run_export

    run_export(
        checkpoint,
        out,
        joints=joints,
        rate_hz=rate,
        units=units,
        weights=weights,
        precision=precision,
        episodes=episodes,
        solver=solver,
        steps=steps,
        spacing=spacing,
        fast=fast,
        chain=chain,
        chaining=chaining,
        cameras=cameras,
        image_size=image_size,
        force=force,
        as_json=as_json,
        handoff=handoff,
        ensemble_m=ensemble_m,
        advance=advance,
        two_state_joints=[name for name in two_state.split(",") if name],
        dataset=dataset,
        observation=observation,
        allow_unnormalized=allow_unnormalized or (),
        overwrite=overwrite,
    )


def sweep(
    checkpoint: Annotated[Path, typer.Argument(help="LeRobot's pretrained_model directory of a diffusion policy.")],
    episodes: Annotated[Path, typer.Option(help="Recorded episodes, best some that it was not trained on.")],
    steps: Annotated[Optional[str], typer.Option(help="Numbers of steps; default: 2,4,5,8,10,16.")] = None,  # noqa: UP045
    dpmpp: Annotated[bool, typer.Option("--dpmpp", help="DPM-Solver++ beside DDIM.")] = False,
    observations: Annotated[int, typer.Option(min=4, help="How many observations to answer.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine whose time is taken.")] = 1,
    report: Annotated[Path, typer.Option(help="Folder for the picture and the figures.")] = Path("sweep"),
    as_json: JsonOption = False,
    joints: JointsOption = None,
    units: UnitsOption = None,
    rate: RateOption = None,
    allow_unnormalized: UnnormalizedOption = None,
) -> None:
    """Measure what fewer denoising steps cost a diffusion policy, on recorded episodes, and recommend."""
    from export.sweep_report import run_sweep

    run_sweep(
        checkpoint,
        episodes,
        steps=steps,
        dpmpp=dpmpp,
        observations=observations,
        threads=threads,
        report=report,
        as_json=as_json,
        joints=joints,
        units=units,
        rate_hz=rate,
        allow_unnormalized=allow_unnormalized or (),
    )


def distill(
    teacher: Annotated[Path, typer.Argument(help="LeRobot's pretrained_model directory of a diffusion policy.")],
    episodes: Annotated[Path, typer.Option(help="Recorded episodes, best those that it was trained on.")],
    out: Annotated[Path, typer.Option(help="Where the student goes; what is kept meanwhile lies in OUT.work.")],
    steps: Annotated[int, typer.Option(help="Denoising steps an inference, 1 to 4.")] = 2,
    train_steps: Annotated[int, typer.Option(help="Steps of training.")] = 10_000,
    minutes: Annotated[Optional[float], typer.Option(help="Train at most so long, all runs together.")] = None,  # noqa: UP045
    batch: Annotated[int, typer.Option(help="Horizons of actions a step of training.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate; falls to 0.3 of it.")] = 1e-4,
    threads: Annotated[int, typer.Option(help="On a CPU; each takes a part of every batch.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    skip: Annotated[int, typer.Option(help="Levels of noise that a step of the teacher covers.")] = 10,
    held_out: Annotated[float, typer.Option(help="Share of the episodes that the gate judges on.")] = 0.1,
    episodes_limit: Annotated[Optional[int], typer.Option(min=2, help="Only the first so many episodes.")] = None,  # noqa: UP045
    timesteps: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where the student samples, such as 99,50; default: the best of a few on held-out episodes."),
    ] = None,
    teacher_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=4, help="Let the teacher answer the gate in so many steps of DDIM; default: its own sampler."),
    ] = None,
    conditions: Annotated[int, typer.Option(help="Observations that the gate looks at.")] = 64,
    samples: Annotated[int, typer.Option(help="Answers of each of the two to every one of them.")] = 8,
    force: Annotated[bool, typer.Option(help="Exit code 0 also where the gate fails.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a student that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Teach a diffusion policy to answer in a step or two. Can be stopped; the same command goes on."""
    from export.distillation.command import run_distill

    passed = run_distill(
        teacher,
        episodes,
        out,
        steps=steps,
        train_steps=train_steps,
        minutes=minutes,
        batch=batch,
        lr=lr,
        threads=threads,
        seed=seed,
        skip=skip,
        held_out=held_out,
        episodes_limit=episodes_limit,
        timesteps=timesteps,
        teacher_steps=teacher_steps,
        conditions=conditions,
        samples=samples,
        force=force,
        overwrite=overwrite,
        as_json=as_json,
    )
    raise typer.Exit(0 if passed else 1)
