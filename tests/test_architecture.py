"""The map holds: arrows point one way, the device knows no torch, the tables agree with each other."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from device.messages import TOPICS
from device.roles import ROLES

ROOT = Path(__file__).parent.parent
THE_COMMAND = (
    ROOT / "device" / "cli.py"
)  # one command for all packages; whatever it needs of them it imports when asked
OURS = ("device", "export", "firmware_bridge", "provisioning")
MAY_IMPORT = {
    "firmware_bridge": {"firmware_bridge"},
    "device": {"device", "firmware_bridge"},
    "provisioning": {"provisioning", "device", "firmware_bridge"},
    "export": {"export", "device", "firmware_bridge"},
}
# What `export` may know of the device: the formats, the virtual cell that demonstrations come from, how its chunks are
# handed over, and units.
EXPORT_MAY_IMPORT = {
    "device.arrays",
    "device.bundle",
    "device.durable",
    "device.engine",
    "device.ensemble",
    "device.errors",
    "device.manifest",
    "device.scripted_expert",
    "device.virtual_world",
}
NEVER_ON_THE_DEVICE = {
    "torch",
    "onnx",
    "onnxscript",
    "safetensors",
    "lerobot",
    "pickle",
    "dill",
    "cloudpickle",
    "marshal",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", OURS)
def test_imports_follow_the_arrows(package: str) -> None:
    for path in modules(package):
        for name in imports(path):
            top = name.split(".")[0]
            if top in OURS and path != THE_COMMAND:
                assert top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"
            if package == "export" and top == "device":
                assert name in EXPORT_MAY_IMPORT, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", ["device", "firmware_bridge", "provisioning"])
def test_the_device_side_knows_no_torch_and_no_pickle(package: str) -> None:
    for path in modules(package):
        found = {name.split(".")[0] for name in imports(path)} & NEVER_ON_THE_DEVICE
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_importing_every_role_loads_no_torch() -> None:
    roles = ", ".join(role.module for role in ROLES.values())
    code = f"import sys, {roles}, device.cli, device.demo\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_onnxruntime_is_not_paid_for_before_an_engine_of_its_is_opened() -> None:
    code = "import sys, device.predict, device.engine_tensorrt\nsys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_mujoco_is_imported_in_one_place_which_chooses_its_back_end() -> None:
    for package in OURS:
        for path in modules(package):
            if path.name != "mujoco_headless.py":
                assert not {name for name in imports(path) if name.split(".")[0] == "mujoco"}, path.name


def test_every_topic_has_its_writer_in_the_table_of_roles() -> None:
    for topic in TOPICS.values():
        if topic.writer != "*":
            assert topic.name in ROLES[topic.writer].writes, topic.name
    for role in ROLES.values():
        for name in role.writes:
            assert TOPICS[name].writer == role.name


def test_every_role_has_an_entry_point() -> None:
    for role in ROLES.values():
        assert importlib.util.find_spec(role.module) is not None
        tree = ast.parse((ROOT / (role.module.replace(".", "/") + ".py")).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body), role.module


def test_frames_topics_have_at_least_four_slots_and_control_topics_several_seconds() -> None:
    assert TOPICS["frames/*"].slots >= 4
    for name in ("joints", "goals", "ticks"):
        assert TOPICS[name].slots / 60 > 5, name


def test_every_command_line_of_the_docs_exists() -> None:
    """`understudy WORD` in README and docs names a command that the program has."""
    from typer.main import get_command

    from device.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text().splitlines():
            words = line.strip().lstrip("$ ").split()
            if len(words) > 1 and words[0] == "understudy" and words[1].islower() and words[1].isalpha():
                assert words[1] in known, f"{page.name}: {line.strip()}"
