"""`understudy bundle check`: everything that can be off about a bundle is found, said and fails the command."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

import onnx

from device import cli
from device.arrays import dump_arrays
from device.bundle import Bundle
from device.bundle_check import BundleReport, LargestStep, check_bundle, largest_step
from device.engine_cache import EngineCache
from device.tensorrt_build import build_bundle
from fixtures import fake_tensorrt, tiny_bundle, tiny_diffusion
from fixtures.fake_tensorrt import FakeGpu
from fixtures.tiny_bundle import network, write_tiny_bundle
from fixtures.tiny_diffusion import write_tiny_diffusion
from fixtures.tiny_half import write_tiny_half

RUNS = 3


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    fake_tensorrt.install(monkeypatch, gpu)
    return gpu


def check(bundle: Bundle, cache: EngineCache, engine: Any = "all") -> BundleReport:
    return check_bundle(bundle.path, engine, runs=RUNS, cache=cache)


def problem(report: BundleReport) -> str:
    assert not report.ok
    (said,) = report.problems
    assert "\n" not in said
    return said


def states(report: BundleReport) -> dict[str, str]:
    return {f"{engine.engine} {engine.precision}": engine.state for engine in report.engines}


def changed(operator: str) -> bytes:
    """The tiny policy with another last operator."""
    model = onnx.load_from_string(network())
    model.graph.node[-1].op_type = operator
    content: bytes = model.SerializeToString()
    return content


def test_a_good_bundle_passes_and_says_what_each_engine_did(bundle: Bundle, cache: EngineCache) -> None:
    report = check(bundle, cache)
    assert report.ok
    assert report.digest == bundle.digest
    assert report.nodes == {"policy.onnx": len(onnx.load_from_string(network()).graph.node)}
    assert states(report) == {
        "tensorrt fp32": "not here",
        "onnxruntime-cuda fp32": "not here",
        "onnxruntime fp32": "passed",
    }
    assert all(engine.reason for engine in report.engines if engine.state == "not here")
    (done,) = (engine for engine in report.engines if engine.state == "passed")
    assert done.golden_error is not None
    assert done.golden_error < 1e-3
    assert done.median_ms is not None
    assert done.p99_ms is not None
    assert 0 < done.median_ms <= done.p99_ms
    assert done.memory_mb is None or done.memory_mb >= 0
    assert done.largest_step is not None
    assert done.largest_step.size == pytest.approx(1, abs=1e-4)  # action[k + 1] - action[k] of the tiny policy


@pytest.mark.parametrize("observation_steps", [1, 2])
def test_a_policy_that_samples_is_checked_with_its_two_graphs(
    observation_steps: int, tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    bundle = write_tiny_diffusion(tmp_path / "d", observation_steps)
    build_bundle(bundle, "fp32", cache)
    report = check(bundle, cache)
    assert report.ok
    assert states(report) == {
        "tensorrt fp32": "passed",
        "onnxruntime-cuda fp32": "not here",
        "onnxruntime fp32": "passed",
    }
    assert report.nodes == {
        "encoder.onnx": len(onnx.load_from_string(tiny_diffusion.encoder()).graph.node),
        "denoise.onnx": len(onnx.load_from_string(tiny_diffusion.denoise(observation_steps)).graph.node),
    }
    assert gpu.live == 0


def test_sampling_is_timed_with_fresh_noise_and_one_new_observation_step_an_inference(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    bundle = write_tiny_diffusion(tmp_path / "d", 2)
    build_bundle(bundle, "fp32", cache)
    runs = gpu.runs
    report = check(bundle, cache, "tensorrt")
    warming = 1 + tiny_diffusion.STEPS  # once before each of the two recordings
    golden = 2 + tiny_diffusion.STEPS
    timed = RUNS * (1 + tiny_diffusion.STEPS) + 1  # and the first observation step
    assert gpu.runs - runs == warming + golden + timed
    assert report.largest_step is not None
    (engine,) = report.engines
    assert engine.largest_step != report.largest_step  # other noise than golden's


def test_the_largest_step_is_that_of_the_joint_that_moves_most(bundle: Bundle) -> None:
    actions = np.zeros((4, 6), np.float32)
    actions[:, 1] = [0, 3, 1, 1]
    actions[:, 4] = [5, 4, 3, -1]
    assert largest_step(bundle, actions) == LargestStep("wrist_roll", 4.0)
    assert largest_step(bundle, actions[:1]) is None


# What can be off, one by one


def test_a_changed_file_is_off(bundle: Bundle, cache: EngineCache) -> None:
    with (bundle.path / "policy.onnx").open("ab") as file:
        file.write(b"\0")
    report = check(bundle, cache)
    assert "policy.onnx is not the file that was exported" in problem(report)
    assert report.engines == ()


def test_a_folder_that_is_no_bundle_is_off(tmp_path: Path, cache: EngineCache) -> None:
    assert "does not exist; a bundle is a directory" in problem(check_bundle(tmp_path / "nowhere", cache=cache))


def test_a_graph_that_is_none_is_off(tmp_path: Path, cache: EngineCache) -> None:
    assert "no ONNX file" in problem(check(write_tiny_bundle(tmp_path / "cut", model=network()[:-60]), cache))


def test_golden_values_that_prove_nothing_are_off(bundle: Bundle, cache: EngineCache) -> None:
    golden = tiny_bundle.observed() | {"action": np.full((4, 6), np.nan, np.float32)}
    (bundle.path / "golden.npz").write_bytes(dump_arrays(golden))
    manifest = bundle.path / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"]["golden.npz"] = hashlib.sha256((bundle.path / "golden.npz").read_bytes()).hexdigest()
    manifest.write_text(json.dumps(document))
    assert "golden.npz: action holds NaN or infinity" in problem(check(bundle, cache))


def test_an_engine_that_computes_something_else_is_off(tmp_path: Path, cache: EngineCache) -> None:
    report = check(write_tiny_bundle(tmp_path / "wrong", model=changed("Sub")), cache)
    assert "onnxruntime fp32: " in problem(report)
    assert "differs from the reference by 14 joint units (bound: 0.05)" in problem(report)
    assert states(report)["onnxruntime fp32"] == "failed"


def test_an_engine_that_answers_nan_is_off(tmp_path: Path, cache: EngineCache) -> None:
    model = onnx.load_from_string(network())
    model.graph.node[-1].output[0] = "sum"
    model.graph.node.append(onnx.helper.make_node("Log", ["negative"], ["nan"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["sum", "nan"], ["action"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([-1]), "negative"))
    assert "answered NaN or infinity" in problem(
        check(write_tiny_bundle(tmp_path / "nan", model=model.SerializeToString()), cache)
    )


def test_an_engine_that_cannot_open_the_policy_is_off(tmp_path: Path, cache: EngineCache) -> None:
    report = check(write_tiny_bundle(tmp_path / "wide", state_size=7), cache)
    assert "does not take the inputs that its manifest names (observation.state)" in problem(report)


def test_an_engine_that_was_asked_for_and_is_not_here_is_off(bundle: Bundle, cache: EngineCache) -> None:
    assert "tensorrt was asked for and is not here: " in problem(check(bundle, cache, "tensorrt"))
    report = check(bundle, cache, "onnxruntime-cuda")
    assert "has no CUDAExecutionProvider" in problem(report)
    assert [engine.engine for engine in report.engines] == ["onnxruntime-cuda"]


def test_a_folder_for_engines_that_cannot_be_written_is_off(bundle: Bundle, tmp_path: Path, gpu: FakeGpu) -> None:
    (tmp_path / "file").write_text("")
    report = check(bundle, EngineCache(tmp_path / "file" / "engines"), "tensorrt")
    assert "where engines are kept, cannot be written" in problem(report)
    assert gpu.live == 0


# TensorRT


def test_engines_are_built_where_tensorrt_was_asked_for_and_only_then(
    bundle: Bundle, cache: EngineCache, gpu: FakeGpu
) -> None:
    assert states(check(bundle, cache))["tensorrt fp32"] == "not here"
    assert gpu.builds == 0
    report = check(bundle, cache, "tensorrt")
    assert report.ok
    assert states(report) == {"tensorrt fp32": "passed"}
    assert gpu.builds == 1
    (engine,) = report.engines
    assert engine.gpu_memory_mb is not None
    assert engine.gpu_memory_mb > 0
    assert gpu.live == 0


def test_half_precision_that_fails_is_told_and_is_no_problem_where_float32_passes(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    bundle = write_tiny_half(tmp_path / "half")
    gpu.half_is_wrong = True
    report = check(bundle, cache, "tensorrt")
    assert report.ok
    assert states(report) == {"tensorrt fp16": "failed", "tensorrt fp32": "passed"}
    gpu.half_is_wrong = False
    assert states(check(bundle, cache, "tensorrt")) == {"tensorrt fp16": "passed"}


def test_tensorrt_that_is_wrong_is_off(tmp_path: Path, cache: EngineCache, gpu: FakeGpu) -> None:
    report = check(write_tiny_bundle(tmp_path / "wrong", model=changed("Sub")), cache, "tensorrt")
    assert "tensorrt fp32: " in problem(report)
    assert gpu.live == 0


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["understudy", "bundle", "check", *arguments, "--runs", str(RUNS)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_prints_a_table_and_what_is_not_here(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(bundle.path)) == 0
    said = capsys.readouterr().out
    for text in ("policy.onnx 5 nodes", "median ms", "onnxruntime fp32", "tensorrt fp32, not here", "nothing is off"):
        assert text in said


def test_the_command_fails_with_what_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = write_tiny_bundle(tmp_path / "wrong", model=changed("Sub"))
    assert run(monkeypatch, str(wrong.path)) == 1
    said = capsys.readouterr().out
    assert "failed" in said
    assert "OFF: onnxruntime fp32: " in said
    assert "nothing is off" not in said


def test_a_program_gets_one_json_object(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(bundle.path), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["digest"] == bundle.digest
    assert {engine["engine"] for engine in document["engines"]} == {"tensorrt", "onnxruntime-cuda", "onnxruntime"}
    assert run(monkeypatch, str(bundle.path), "--json", "--engine", "onnxruntime-cuda") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_an_engine_that_nobody_knows_is_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(bundle.path), "--engine", "openvino") == 1
    assert "--engine openvino: expected one of onnxruntime, onnxruntime-cuda, tensorrt, all" in capsys.readouterr().err


def test_the_shipped_policy_passes() -> None:
    shipped = Path(cli.__file__).parent / "cells" / "virtual" / "bundle"
    report = check_bundle(shipped, "onnxruntime", runs=1)
    assert report.ok
    assert report.nodes is not None
    assert report.nodes["policy.onnx"] < 500
