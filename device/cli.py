"""The command `understudy`. Nouns first where a thing has several verbs; exit code 0 only when what was asked happened.

Every import of a role or of the export side stands inside its command, so that the device never pays for what it does
not run; an extra that is not installed is named in one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from device.errors import UnderstudyError
from export.cli import add_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bundle_app = typer.Typer(no_args_is_help=True, help="What a policy is, once exported.")
ctl_app = typer.Typer(no_args_is_help=True, help="What the button does, for scripts and PLCs.")
app.add_typer(bundle_app, name="bundle")
app.add_typer(ctl_app, name="ctl")
add_commands(app)

# Optional[...] and not `... | None`: typer evaluates annotations, and Python 3.10 must too.
CellOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--cell", help="The cell file, or 'virtual' for the virtual cell.", show_default="/etc/understudy/cell.toml"
    ),
]
EngineCacheOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--cache", help="Where TensorRT's engines lie.", show_default="/var/cache/understudy/engines"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]

_OF_EXPORT = ("torch", "onnx", "safetensors", "pyarrow", "av")
_EXTRAS = {"mujoco": "demo", "matplotlib": "demo"} | dict.fromkeys(_OF_EXPORT, "export")


def main() -> None:
    """Entry point: turns what the project raises on purpose into one line and exit code 1."""
    try:
        app()
    except UnderstudyError as error:
        print(f"understudy: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        what = " ".join(sys.argv[1:2])
        print(f"understudy {what} needs the {extra} extra: pip install 'understudy[{extra}]'", file=sys.stderr)
        sys.exit(1)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Runs imitation-learned policies on a real arm."""
    if version:
        print(metadata.version("understudy"))
        raise typer.Exit


def _load_cell(path: Path | None) -> Any:
    from device.config import DEFAULT_CELL, VIRTUAL_CELL, load_cell

    if path is None:
        path = DEFAULT_CELL
    elif str(path) == "virtual":
        path = VIRTUAL_CELL
    return load_cell(path)


@contextmanager
def _library_errors() -> Iterator[None]:
    """firmware_bridge knows nothing of our exceptions: its OSErrors and ValueErrors are sentences already."""
    try:
        yield
    except UnderstudyError:
        raise
    except (OSError, ValueError) as error:
        raise UnderstudyError(str(error)) from error


@app.command()
def run(
    role: Annotated[Optional[str], typer.Argument(help="One role; without it, all roles of the cell.")] = None,  # noqa: UP045
    cell: CellOption = None,
    camera: Annotated[Optional[str], typer.Option(help="Which camera, for role capture.")] = None,  # noqa: UP045
    inference_delay_ms: Annotated[float, typer.Option(min=0, help="Slow inference down, for role predict.")] = 0,
) -> None:
    """Run one role (what the units start), or all of a cell in the foreground."""
    # numpy's BLAS would start a thread for every core in every role, for products of a few numbers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from device.config import runtime_directory
    from device.log import set_up
    from device.roles import ROLES, run_role

    set_up()
    loaded = _load_cell(cell)
    if role is None:
        from device.run import run_all

        raise typer.Exit(run_all(loaded, runtime_directory(loaded)))
    if role not in ROLES:
        raise UnderstudyError(f"{role!r} is no role; roles are {', '.join(ROLES)}")
    if ROLES[role].per_camera and camera not in loaded.cell.cameras:
        have = ", ".join(loaded.cell.cameras) or "none"
        raise UnderstudyError(f"run {role} needs --camera, one of this cell's: {have}")
    options = {"delay_s": inference_delay_ms / 1e3} if role == "predict" else {}
    run_role(ROLES[role], loaded, camera, runtime_directory(loaded), **options)


@app.command()
def demo(
    episodes: Annotated[int, typer.Option(min=1, help="How many cubes to pick up.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Where the first cube lies; the next episodes count on.")] = 0,
    handoff: Annotated[
        Optional[str], typer.Option(help="ensemble, crossfade or latest; default: what the bundle recommends.")  # noqa: UP045
    ] = None,
    advance: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Actions from one chunk to the next; default: what the bundle recommends."),
    ] = None,
    inference_delay_ms: Annotated[float, typer.Option(min=0, help="Slow inference down by so much.")] = 0,
    report: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("report"),
    bundle: Annotated[Optional[Path], typer.Option(help="Another policy than the shipped one.")] = None,  # noqa: UP045
    time_limit_s: Annotated[float, typer.Option(min=1, help="An episode that takes longer has failed.")] = 25,
    lockstep: Annotated[
        bool, typer.Option(help="In simulated time: the same result every time, for measuring success.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The virtual cell: emulated servos, simulated arm and rendered cameras under the real roles. Ends in a verdict."""
    from device.demo import Options, run_demo

    options = Options(
        episodes, seed, handoff, advance, inference_delay_ms, report, bundle, time_limit_s, lockstep, as_json
    )
    result = run_demo(options)
    if as_json:
        print(json.dumps(result.as_json()))
    raise typer.Exit(0 if result.successes else 1)


@app.command("virtual-servos")
def virtual_servos(
    ids: Annotated[str, typer.Option(help="Servo ids: 1-6 or 1,2,5.")] = "1-6",
    link: Annotated[Optional[Path], typer.Option(help="Also link the pty under this name.")] = None,  # noqa: UP045
    faults: Annotated[Optional[Path], typer.Option(help="A fault script (JSON).")] = None,  # noqa: UP045
) -> None:
    """Emulated servo firmware behind a pty: prints the pty's path and serves until stopped."""
    from firmware_bridge.virtual_servos import serve

    with _library_errors():
        serve(_parse_ids(ids), link=link, faults=faults)


def _parse_ids(text: str) -> list[int]:
    try:
        ids: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            ids += range(int(first), int(last or first) + 1)
    except ValueError:
        raise UnderstudyError(f"--ids {text!r}: expected a list such as 1-6 or 1,2,5") from None
    return ids


@bundle_app.command("show")
def bundle_show(bundle: Path, as_json: JsonOption = False) -> None:
    """Print the manifest for a person (or, with --json, as it is)."""
    from device.bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        print(opened.manifest.to_json().decode(), end="")
        return
    from rich.console import Console

    from device.bundle_table import describe

    Console().print(describe(opened.manifest))


@bundle_app.command("run")
def bundle_run(
    bundle: Path,
    observation: Annotated[Path, typer.Option(help="OBS.npz, by LeRobot's own names.")],
    out: Annotated[Path, typer.Option(help="CHUNK.npz, with `action` float32 [K, A].")],
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Run one inference without a cell."""
    from device.observation_file import run_observation

    actions = run_observation(bundle, observation, out, threads)
    print(f"{out}: action float32 {list(actions.shape)}")


@bundle_app.command("build")
def bundle_build(
    bundle: Path,
    cache: EngineCacheOption = None,
    rebuild: Annotated[bool, typer.Option(help="Build anew what is there already.")] = False,
) -> None:
    """Build TensorRT engines for this machine, and prove them."""
    from device.bundle_build import run_build

    run_build(bundle, cache, rebuild)


@bundle_app.command("check")
def bundle_check(
    bundle: Path,
    engine: Annotated[str, typer.Option(help="onnxruntime, onnxruntime-cuda, tensorrt or all that are here.")] = "all",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed inferences of each engine.")] = 50,
    cache: EngineCacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is it whole, and does every engine of this machine run it as it should? Exit code 1 where something is off."""
    from device.bundle_check_table import run_check

    raise typer.Exit(run_check(bundle, engine, threads, runs, cache, as_json))


@ctl_app.command("mode")
def ctl_mode(
    mode: Annotated[str, typer.Argument(help="idle, policy, teleop, limp or reset.")],
    cell: CellOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask execute for a mode."""
    _ask(cell, as_json, "mode", mode=mode)


@ctl_app.command("stop")
def ctl_stop(cell: CellOption = None, as_json: JsonOption = False) -> None:
    """Brake and hold, whatever the arm is doing."""
    _ask(cell, as_json, "stop")


@ctl_app.command("home")
def ctl_home(cell: CellOption = None, as_json: JsonOption = False) -> None:
    """Move to the cell's home position (mode idle)."""
    _ask(cell, as_json, "home")


@ctl_app.command("status")
def ctl_status(cell: CellOption = None, as_json: JsonOption = False) -> None:
    """What the arm is doing."""
    _ask(cell, as_json, "status")


def _ask(cell: Path | None, as_json: bool, verb: str, **fields: Any) -> None:
    from device.config import runtime_directory
    from device.request_socket import ask

    answer = ask(runtime_directory(_load_cell(cell)), "execute", verb, **fields)
    if as_json:
        print(json.dumps(answer))
        return
    print(f"mode {answer['mode']}" + (f", fault: {answer['fault']}" if answer.get("fault") else ""))


if __name__ == "__main__":
    main()
