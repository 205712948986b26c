"""Cell files: the virtual one loads, and every wrong one gets a sentence that names file, key and remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from device.config import VIRTUAL_CELL, load_cell, runtime_directory
from device.errors import ConfigError


@pytest.fixture
def cell_file(tmp_path: Path) -> Path:
    shutil.copy(VIRTUAL_CELL, tmp_path)
    shutil.copy(VIRTUAL_CELL.parent / "calibration.json", tmp_path)
    return tmp_path / "cell.toml"


def edit(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_virtual_cell_loads_in_file_order() -> None:
    cell = load_cell(VIRTUAL_CELL)
    assert cell.cell.joint_names[0] == "shoulder_pan"
    assert cell.servo_ids == [1, 2, 3, 4, 5, 6]
    assert cell.cell.is_virtual
    np.testing.assert_allclose(cell.joint_array("home"), [0, -35, 20, 85, 0, 18.18])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("staleness_s = 0.7", "speed = 3", "policy.speed: unknown key"),
        ('port = "virtual"\n', "", "arm.port: is missing"),
        ("min = -105", "min = -140", "arm.joints.shoulder_pan.min: -140 degrees is outside the calibrated range"),
        ("min = -105", "min = 200", "arm.joints.shoulder_pan: min 200 is not below max 105"),
        ("min = -105", "min = nan", "arm.joints.shoulder_pan.min: Input should be a finite number"),
        ("home = -35", "home = -99", "home -99 is outside"),
        ('unit = "degrees"', 'unit = "radians"', "arm.joints.shoulder_pan.unit"),
        ("[arm.joints.gripper]", "[arm.joints.claw]", "arm.joints.claw: is not in the calibration"),
        ("[world]\nseed = 0\n", "", "world: is missing"),
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1", "schema = ", "is not valid TOML"),
        ("width = 96", "width = 0", "cameras.front.width"),
        ('device = "virtual"\n', "", "cameras.front.device: is missing"),
        ("rate_hz = 60", "rate_hz = 0", "control.rate_hz"),
        ('"calibration.json"', '"nowhere.json"', "arm.calibration"),
    ],
)
def test_a_wrong_cell_file_gets_one_sentence(cell_file: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_cell(edit(cell_file, old, new))
    message = str(error.value)
    assert says in message
    assert str(cell_file) in message
    assert "\n" not in message


@pytest.mark.parametrize("content", ["{", "[]", '{"shoulder_pan": {"id": 1}}', ""])
def test_a_wrong_calibration_names_the_file(cell_file: Path, content: str) -> None:
    (cell_file.parent / "calibration.json").write_text(content)
    with pytest.raises(ConfigError, match=r"arm.calibration: .*calibration.json"):
        load_cell(cell_file)


def test_a_missing_cell_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; give --cell"):
        load_cell(tmp_path / "cell.toml")


def test_the_command_exits_with_1_and_one_line_for_a_wrong_cell(cell_file: Path) -> None:
    edit(cell_file, 'port = "virtual"\n', "")
    line = [sys.executable, "-m", "device.cli", "run", "execute", "--cell", str(cell_file)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"understudy: {cell_file}: arm.port: is missing; add it\n"


def test_topics_live_in_systemds_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/understudy:/run/other")
    assert runtime_directory(load_cell(VIRTUAL_CELL)) == Path("/run/understudy")


def test_on_a_bench_every_cell_has_a_runtime_directory_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory(load_cell(VIRTUAL_CELL)) == tmp_path / "understudy" / "virtual"
