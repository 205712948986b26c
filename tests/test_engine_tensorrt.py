"""TensorRT: builder, cache, runtime and the choice of an engine, over a fake of NVIDIA's two modules that computes.

The fake (fixtures/fake_tensorrt.py) runs the graphs with onnxruntime on memory that only it understands, so what these
tests compare with golden values went through every copy, address and recording that a GPU would see. That NVIDIA's
modules have the names used here is test_nvidia_names.py's; that a GPU does the same, `understudy bundle check
--engine tensorrt` shows on a Jetson.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from device.bundle import Bundle
from device.bundle_build import run_build
from device.bundle_check import check_bundle
from device.cuda_runtime import Cuda, NotHereError
from device.engine import EngineError, infer_observation
from device.engine_cache import (
    Description,
    EngineCache,
    EngineCacheError,
    Machine,
    default_cache,
    engine_key,
    power_mode,
)
from device.engine_choice import open_best_engine, open_onnxruntime, release
from device.engine_onnx import ON_CPU
from device.engine_tensorrt import TensorRtEngine, TensorRtSamplingEngine, open_tensorrt
from device.onnx_wire import summarize, widened, with_signed_zeros
from device.tensorrt_build import build_bundle, build_plan, precisions_of
from device.tensorrt_network import NotBuiltError
from fixtures import fake_tensorrt, tiny_bundle, tiny_diffusion
from fixtures.fake_tensorrt import FakeGpu, cudaError_t
from fixtures.tiny_bundle import CHUNK, FRONT, HEIGHT, STATE, WIDTH, write_tiny_bundle
from fixtures.tiny_diffusion import write_tiny_diffusion
from fixtures.tiny_half import FP16, half_network, write_tiny_half

MACHINE = Machine("Orin / NVIDIA Jetson Orin NX", "8.7 x8", "10.3.0", "12.6", "2")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    fake_tensorrt.install(monkeypatch, gpu)
    return gpu


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture
def half_bundle(tmp_path: Path) -> Bundle:
    return write_tiny_half(tmp_path / "half")


# Running


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_a_policy_of_one_graph_answers_as_onnxruntime_does(
    version: str, bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()
    fake_tensorrt.install(monkeypatch, gpu, version)
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtEngine(bundle, "fp32", cache)
    for red in (0, 9, 200):
        inputs = tiny_bundle.observed()
        inputs[FRONT][..., 0] = red
        found = infer_observation(engine, bundle.manifest, inputs)
        np.testing.assert_allclose(found, tiny_bundle.expected(inputs), atol=1e-4)
    engine.close()
    assert gpu.live == 0


@pytest.mark.parametrize("observation_steps", [1, 2, 3])
def test_a_policy_that_samples_answers_as_numpy_does(
    observation_steps: int, tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    bundle = write_tiny_diffusion(tmp_path / "d", observation_steps)
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtSamplingEngine(bundle, "fp32", cache)
    for seed in (1, 2):  # twice: what one inference leaves behind must not reach the next
        inputs = tiny_diffusion.observed(observation_steps, seed)
        found = infer_observation(engine, bundle.manifest, inputs)
        np.testing.assert_allclose(found, tiny_diffusion.sampled(inputs, tiny_diffusion.table()), atol=1e-3)
    engine.close()
    assert gpu.live == 0


def test_all_denoising_steps_are_one_launch(tmp_path: Path, cache: EngineCache, gpu: FakeGpu) -> None:
    bundle = write_tiny_diffusion(tmp_path / "d", 2)
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtSamplingEngine(bundle, "fp32", cache)
    for key in ("a", "b"):
        engine.observe(key)
    launches, runs = gpu.launches, gpu.runs
    engine.infer(["a", "b"])
    assert (gpu.launches - launches, gpu.runs - runs) == (1, tiny_diffusion.STEPS)
    engine.close()


def test_an_observation_step_is_encoded_once(tmp_path: Path, cache: EngineCache, gpu: FakeGpu) -> None:
    bundle = write_tiny_diffusion(tmp_path / "d", 2)
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtSamplingEngine(bundle, "fp32", cache)
    assert not engine.knows("a")
    engine.observe("a")
    engine.observe("b")
    assert engine.knows("a")
    runs = gpu.runs
    for _ in range(3):
        engine.infer(["a", "b"])
    assert gpu.runs - runs == 3 * tiny_diffusion.STEPS
    with pytest.raises(EngineError, match="no observation step c is known"):
        engine.infer(["b", "c"])
    with pytest.raises(EngineError, match="looks at 2 observation steps, 0 keys"):
        engine.infer()
    engine.close()


def test_the_same_seed_draws_the_same_noise_as_in_onnxruntime(tmp_path: Path, cache: EngineCache, gpu: FakeGpu) -> None:
    from device.engine_sampling import SamplingEngine

    bundle = write_tiny_diffusion(tmp_path / "d", 1)
    build_bundle(bundle, "fp32", cache)
    here, there = TensorRtSamplingEngine(bundle, "fp32", cache, seed=5), SamplingEngine(bundle, seed=5)
    answers = [here.infer().copy() for _ in range(2)]
    for answer in answers:
        np.testing.assert_allclose(answer, there.infer(), atol=1e-3)
    assert np.abs(answers[0] - answers[1]).max() > 0.1
    here.close()


def test_samplers_that_draw_no_noise_between_steps_upload_none(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    rows = np.array(tiny_diffusion.ROWS, np.float32)
    rows[:, 7] = 0
    bundle = write_tiny_diffusion(
        tmp_path / "d", 1, steps=tiny_diffusion.table(rows), sampler=tiny_diffusion.sampler(draws_noise=False)
    )
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtSamplingEngine(bundle, "fp32", cache)
    inputs = tiny_diffusion.observed(1)
    found = infer_observation(engine, bundle.manifest, inputs)
    np.testing.assert_allclose(found, tiny_diffusion.sampled(inputs, tiny_diffusion.table(rows)), atol=1e-3)
    engine.close()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(
    poison: float, tmp_path: Path, bundle: Bundle, cache: EngineCache, gpu: FakeGpu
) -> None:
    for policy in (bundle, write_tiny_diffusion(tmp_path / "d", 1)):
        build_bundle(policy, "fp32", cache)
        engine = open_tensorrt(policy, "fp32", cache)
        engine.inputs[STATE][...] = 0
        engine.inputs[STATE][2] = poison
        with pytest.raises(EngineError, match="NaN or infinity"):
            engine.infer()
        engine.inputs[STATE][2] = 0
        engine.infer()
        engine.close()


def test_noise_for_a_policy_that_does_not_sample_is_refused(bundle: Bundle, cache: EngineCache, gpu: FakeGpu) -> None:
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtEngine(bundle, "fp32", cache)
    engine.observe("now")
    assert engine.knows("now")
    assert not engine.knows("then")
    with pytest.raises(EngineError, match="hold another step than"):
        engine.infer(["then"])
    with pytest.raises(EngineError, match="takes no noise"):
        engine.infer(noise=np.zeros((8, 6), np.float32))
    engine.close()


@pytest.mark.parametrize(
    "call", ["cudaStreamCreateWithFlags", "cudaMalloc", "cudaHostAlloc", "cudaMemcpyAsync", "cudaStreamSynchronize",
             "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags",
             "cudaGetDeviceProperties"]
)  # fmt: skip
def test_every_cuda_call_that_fails_is_named_and_nothing_stays_behind(
    call: str, bundle: Bundle, cache: EngineCache, gpu: FakeGpu
) -> None:
    build_bundle(bundle, "fp32", cache)
    gpu.fails[call] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match=f"{call} failed: cudaErrorMemoryAllocation"):
        TensorRtEngine(bundle, "fp32", cache)
    assert gpu.live == 0


def test_a_launch_that_fails_is_named(bundle: Bundle, cache: EngineCache, gpu: FakeGpu) -> None:
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtEngine(bundle, "fp32", cache)
    gpu.fails["cudaGraphLaunch"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(EngineError, match="cudaGraphLaunch failed: cudaErrorInvalidValue"):
        engine.infer()
    engine.close()
    assert gpu.live == 0


def test_a_gpu_that_does_not_take_its_memory_back_is_told_and_stops_nobody(
    bundle: Bundle, cache: EngineCache, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    """After a fault in a kernel every call fails, those that free memory too."""
    build_bundle(bundle, "fp32", cache)
    gpu.fails["cudaGraphLaunch"] = gpu.fails["cudaFree"] = cudaError_t.cudaErrorInvalidValue
    assert open_best_engine(bundle, cache).name == "onnxruntime fp32"
    lines = fallen(caplog)
    assert lines[0].startswith('engine.not_given_back reason="cudaFree failed')
    assert "cudaGraphLaunch failed" in lines[1]
    report = check_bundle(bundle.path, "tensorrt", cache=cache, runs=1)
    assert "cudaGraphLaunch failed" in report.problems[0]


def test_an_engine_that_another_tensorrt_built_is_refused(
    bundle: Bundle, cache: EngineCache, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key differs, so it is not found; and were it found, TensorRT's own refusal becomes a sentence."""
    (built,) = build_bundle(bundle, "fp32", cache)
    fake_tensorrt.install(monkeypatch, gpu, "10.13.3.9")
    with pytest.raises(NotBuiltError, match=r"has no fp32 engine for this machine in .*; understudy bundle build"):
        TensorRtEngine(bundle, "fp32", cache)
    (other,) = build_bundle(bundle, "fp32", cache)
    plan = built.path.read_bytes()
    description = json.loads(other.path.with_suffix(".json").read_text())
    other.path.write_bytes(plan)
    other.path.with_suffix(".json").write_text(
        json.dumps(description | {"plan_sha256": hashlib.sha256(plan).hexdigest()})
    )
    with pytest.raises(EngineError, match=r"cannot load the engine .* not compatible with this version; .* --rebuild"):
        TensorRtEngine(bundle, "fp32", cache)
    assert gpu.live == 0


def test_an_engine_whose_tensors_are_not_the_manifests_is_refused(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    seven = write_tiny_bundle(tmp_path / "seven", state_size=7)
    build_bundle(seven, "fp32", cache)
    with pytest.raises(EngineError, match=r"takes observation.state float32 \[6\], its manifest says otherwise"):
        TensorRtEngine(seven, "fp32", cache)
    goals = write_tiny_bundle(tmp_path / "goals", model=tiny_bundle.network(output="goals"))
    build_bundle(goals, "fp32", cache)
    with pytest.raises(EngineError, match=r"gives goals float32 \[4, 6\]"):
        TensorRtEngine(goals, "fp32", cache)
    assert gpu.live == 0


def test_memory_that_tensorrt_does_not_get_is_a_sentence(bundle: Bundle, cache: EngineCache, gpu: FakeGpu) -> None:
    build_bundle(bundle, "fp32", cache)
    gpu.fails["create_execution_context"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match="has no memory for running"):
        TensorRtEngine(bundle, "fp32", cache)
    assert gpu.live == 0


# Building


def test_what_was_built_is_not_built_again(tmp_path: Path, cache: EngineCache, gpu: FakeGpu) -> None:
    bundle = write_tiny_diffusion(tmp_path / "d")
    first = build_bundle(bundle, "fp32", cache)
    assert [one.graph for one in first] == ["encoder.onnx", "denoise.onnx"]
    assert gpu.builds == 2
    again = build_bundle(bundle, "fp32", cache)
    assert gpu.builds == 2
    assert [one.seconds for one in again] == [0, 0]
    assert [one.path for one in again] == [one.path for one in first]
    build_bundle(bundle, "fp32", cache, rebuild=True)
    assert gpu.builds == 4
    assert gpu.live == 0


def test_float32_means_float32_and_an_engine_can_be_captured(bundle: Bundle, cache: EngineCache, gpu: FakeGpu) -> None:
    (built,) = build_bundle(bundle, "fp32", cache)
    header = json.loads(built.path.read_bytes().partition(b"\n")[0].removeprefix(b"PLAN"))
    assert header == {"version": "10.3.0", "aux_streams": 0, "tf32": False}


def test_the_timing_cache_grows_and_one_of_another_version_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_tensorrt.install(monkeypatch, FakeGpu())
    model = tiny_bundle.network()
    _, timing = build_plan(trt, model, "policy.onnx", b"", 1 << 20)
    assert timing == b"TIMING 10.3.0 tiny"
    _, timing = build_plan(trt, model, "policy.onnx", timing, 1 << 20)
    assert timing == b"TIMING 10.3.0 tiny tiny"
    _, timing = build_plan(trt, model, "policy.onnx", b"TIMING 9.9.9 tiny", 1 << 20)
    assert timing == b"TIMING 10.3.0 tiny"


def test_all_builds_of_a_device_share_its_timing_cache(
    tmp_path: Path, bundle: Bundle, cache: EngineCache, gpu: FakeGpu
) -> None:
    build_bundle(bundle, "fp32", cache)
    build_bundle(write_tiny_diffusion(tmp_path / "d"), "fp32", cache)
    (timing,) = cache.folder.glob("*.timing")
    assert timing.read_bytes() == b"TIMING 10.3.0 tiny tiny tiny"


def test_frames_that_tensorrt_would_not_take_are_refused_with_the_remedy(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    model = onnx.load_from_string(tiny_bundle.network())
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, HEIGHT, WIDTH, 3]), "batched"))
    model.graph.node[0].input[0] = "frames"
    model.graph.node.insert(0, helper.make_node("Reshape", [FRONT, "batched"], ["frames"]))
    moved = write_tiny_bundle(tmp_path / "moved", model=model.SerializeToString())
    with pytest.raises(EngineError, match=f"Reshape reads the uint8 frames {FRONT}, .* through a Cast only; export"):
        build_bundle(moved, "fp32", cache)
    trt = fake_tensorrt.make_tensorrt(gpu, "10.3.0")
    with pytest.raises(
        EngineError, match=r"TensorRT cannot take policy\.onnx: Reshape .*: UINT8 inputs must feed into a"
    ):
        build_plan(trt, model.SerializeToString(), "policy.onnx", b"", 1 << 20)


def test_a_build_that_fails_says_what_tensorrt_said(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = fake_tensorrt.install(monkeypatch, FakeGpu())
    with pytest.raises(
        EngineError, match=r"could not build an engine of policy\.onnx: \[fake\] network or config is not"
    ):
        build_plan(trt, tiny_bundle.network(), "policy.onnx", b"", 0)


class Watching:
    def __init__(self, interrupt: str = "") -> None:
        self.seen: list[str] = []
        self._interrupt = interrupt

    def begins(self, phase: str, steps: int) -> None:
        self._saw(f"{phase} of {steps}")

    def completed(self, phase: str, step: int) -> None:
        self._saw(f"{phase} {step}")

    def ends(self, phase: str) -> None:
        self._saw(f"{phase} ends")

    def _saw(self, what: str) -> None:
        self.seen.append(what)
        if what == self._interrupt:
            raise KeyboardInterrupt


def test_progress_is_told(bundle: Bundle, cache: EngineCache, gpu: FakeGpu) -> None:
    watching = Watching()
    build_bundle(bundle, "fp32", cache, watching)
    assert watching.seen == ["Building of 2", "Building 0", "Building 1", "Building ends"]


@pytest.mark.parametrize("when", ["Building of 2", "Building 0", "Building ends"])
def test_a_build_can_be_interrupted_and_leaves_no_engine(
    when: str, bundle: Bundle, cache: EngineCache, gpu: FakeGpu
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_bundle(bundle, "fp32", cache, Watching(interrupt=when))
    assert not list(cache.folder.glob("*.engine"))
    assert gpu.live == 0


def test_one_builds_at_a_time(cache: EngineCache) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with cache.exclusively():
            order.append("second")

    with cache.exclusively():
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_what_a_killed_build_left_is_swept_away(cache: EngineCache) -> None:
    cache.folder.mkdir()
    (cache.folder / ".aa.engine.1234.partial").write_bytes(b"half")
    (cache.folder / "aa.engine").write_bytes(b"whole")
    with cache.exclusively():
        assert sorted(path.name for path in cache.folder.iterdir()) == [".building", "aa.engine"]


def test_a_full_disk_leaves_no_engine_and_no_part_of_one(
    bundle: Bundle, cache: EngineCache, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.fsync", no_room)
        with pytest.raises(EngineCacheError, match="No space left on device; give another folder with --cache"):
            build_bundle(bundle, "fp32", cache)
    assert [path.name for path in cache.folder.iterdir()] == [".building"]
    assert gpu.live == 0
    build_bundle(bundle, "fp32", cache)
    TensorRtEngine(bundle, "fp32", cache).close()


# Where engines lie


@pytest.mark.parametrize(
    "change", [{"gpu": "Thor"}, {"sm": "8.7 x16"}, {"tensorrt": "10.3.1"}, {"cuda": "12.8"}, {"power_mode": "0"}]
)
def test_whatever_an_engine_depends_on_is_in_its_key(change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    key = engine_key(MACHINE, "fp16", "a" * 64)
    assert len(key) == 64
    assert key == engine_key(MACHINE, "fp16", "a" * 64)
    others = {engine_key(replace(MACHINE, **change), "fp16", "a" * 64), engine_key(MACHINE, "fp32", "a" * 64)}
    others.add(engine_key(MACHINE, "fp16", "b" * 64))
    monkeypatch.setattr("device.engine_cache.RECIPE", "another")
    others.add(engine_key(MACHINE, "fp16", "a" * 64))
    assert len(others | {key}) == 5


def test_an_engine_counts_only_with_its_description_and_unchanged(cache: EngineCache) -> None:
    plan = b"plan" * 100
    description = Description(MACHINE, "fp16", "policy.onnx", "a" * 64, hashlib.sha256(plan).hexdigest(), 93.5)
    assert cache.load("key") is None
    path = cache.store("key", plan, description)
    assert cache.load("key") == plan
    assert not [file for file in cache.folder.iterdir() if "partial" in file.name]
    path.write_bytes(plan[:-1] + b"!")  # a bit of the disk flipped
    assert cache.load("key") is None
    path.write_bytes(plan)
    path.with_suffix(".json").unlink()  # the power went before the description was written
    assert cache.load("key") is None
    path.with_suffix(".json").write_text("[]")
    assert cache.load("key") is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file" / "engines")
    with pytest.raises(EngineCacheError, match=r"where engines are kept, cannot be written: .* --cache"):
        cache.store_timing(MACHINE, b"")


def test_the_units_cache_directory_is_used_where_systemd_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    assert default_cache() == Path("/var/cache/understudy/engines")
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/other")
    assert default_cache() == Path("/var/cache/other/engines")


def test_the_power_mode_comes_from_nvpmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("pmode:0002 fmode:fanNull")
    assert power_mode(status) == "2"
    status.unlink()
    tool = tmp_path / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: 15W'\necho 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert power_mode(status) == "1"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert power_mode(status) == "unknown"


# Half precision, and what it falls back to


def test_a_widened_graph_computes_in_float32() -> None:
    model = onnx.load_from_string(widened(half_network()))
    onnx.checker.check_model(model, full_check=True)
    kinds = {constant.data_type for constant in model.graph.initializer}
    kinds |= {a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute}
    assert TensorProto.FLOAT16 not in kinds
    inputs = tiny_bundle.observed()
    inputs[STATE][0] = 0.123456
    answers = [  # not onnxruntime: it takes pairs of casts out of a graph and computes in float32
        ReferenceEvaluator(content).run(["action"], inputs)[0]
        for content in (half_network(), model.SerializeToString())
    ]
    errors = [np.abs(answer - tiny_bundle.expected(inputs)).max() for answer in answers]
    assert errors[0] > 1e-3 > 1e-5 > errors[1]


def quantized_network() -> bytes:
    """The tiny policy with its state in int8, once each with the zero points that export writes."""
    model = onnx.load_from_string(tiny_bundle.network())
    graph = model.graph
    constants = {"scale": np.float32(1), "int8.zero.signed": np.uint8(128), "int8.zero.unsigned": np.uint8(0)}
    graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    for index, (name, zero) in enumerate([(STATE, "int8.zero.signed"), ("red", "int8.zero.unsigned")]):
        stored = [
            helper.make_node("QuantizeLinear", [name, "scale", zero], [f"{name}/int8"]),
            helper.make_node("DequantizeLinear", [f"{name}/int8", "scale", zero], [f"{name}/back"]),
        ]
        for node in graph.node:
            node.input[:] = [f"{name}/back" if given == name else given for given in node.input]
        for offset, node in enumerate(stored):
            graph.node.insert(5 * index + offset, node)
    content: bytes = model.SerializeToString()
    return content


def test_int8_is_built_with_the_zero_points_that_tensorrt_takes(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu
) -> None:
    onnx.checker.check_model(onnx.load_from_string(with_signed_zeros(quantized_network())), full_check=True)
    bundle = write_tiny_bundle(tmp_path / "int8", model=quantized_network(), fidelity=FP16 | {"precision": "int8"})
    trt = fake_tensorrt.make_tensorrt(gpu, "10.3.0")
    with pytest.raises(EngineError, match=r"QuantizeLinear .*: only int8 zero points"):
        build_plan(trt, quantized_network(), "policy.onnx", b"", 1 << 20)
    opened = open_best_engine(bundle, cache, build=True)
    assert opened.name == "tensorrt int8"
    inputs = tiny_bundle.observed()
    there = open_onnxruntime(bundle, ON_CPU, 1, None)
    np.testing.assert_array_equal(
        infer_observation(opened.engine, bundle.manifest, inputs), infer_observation(there, bundle.manifest, inputs)
    )
    release(opened.engine)


def test_what_is_not_float16_is_not_touched_by_widening() -> None:
    assert widened(tiny_diffusion.denoise()) == tiny_diffusion.denoise()


def test_nodes_are_counted_as_onnx_counts_them() -> None:
    for content in (tiny_bundle.network(), tiny_diffusion.denoise(), half_network()):
        assert summarize(content).nodes == len(onnx.load_from_string(content).graph.node)
    assert summarize(tiny_bundle.network()).frames_not_cast == {}


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 40, b"not an onnx file"])
def test_bytes_that_are_no_graph_are_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="no ONNX file"):
        summarize(content)


def test_a_cut_graph_is_refused() -> None:
    content = tiny_bundle.network()
    for length in range(0, len(content) - 40, 7):
        with pytest.raises(EngineError):
            summarize(content[:length])


def test_precisions_fall_from_what_was_authored_to_float32(bundle: Bundle, half_bundle: Bundle, tmp_path: Path) -> None:
    int8 = write_tiny_bundle(tmp_path / "int8", fidelity=FP16 | {"precision": "int8"})
    assert [precisions_of(one) for one in (bundle, half_bundle, int8)] == [("fp32",), ("fp16", "fp32"), ("int8",)]


def fallen(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "engine"]


def test_the_engine_as_authored_is_taken_where_it_is_right(
    half_bundle: Bundle, cache: EngineCache, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine")
    opened = open_best_engine(half_bundle, cache, build=True)
    assert opened.name == "tensorrt fp16"
    assert opened.golden_error < 0.5
    assert [line.split()[:2] for line in fallen(caplog)] == [["engine.opened", 'engine="tensorrt']]
    release(opened.engine)
    assert gpu.live == 0


def test_half_precision_that_is_wrong_on_this_machine_falls_back_to_float32(
    half_bundle: Bundle, cache: EngineCache, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.half_is_wrong = True
    opened = open_best_engine(half_bundle, cache, build=True)
    assert opened.name == "tensorrt fp32"
    (line,) = fallen(caplog)
    assert line.startswith('engine.passed_over engine="tensorrt fp16" reason=')
    assert "differs from the reference by 5 joint units (bound: 0.5) on the golden inputs" in line
    release(opened.engine)
    assert gpu.live == 0


def test_without_built_engines_onnxruntime_runs_it_and_each_fall_has_its_reason(
    half_bundle: Bundle, cache: EngineCache, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine")
    opened = open_best_engine(half_bundle, cache)
    assert opened.name == "onnxruntime fp16"
    lines = fallen(caplog)
    assert [line.split()[0] for line in lines] == ["engine.passed_over"] * 3 + ["engine.opened"]
    for line, reason in zip(
        lines, ("has no fp16 engine", "has no fp32 engine", "has no CUDAExecutionProvider"), strict=False
    ):
        assert reason in line
    assert gpu.live == 0


def test_without_tensorrt_onnxruntime_runs_it(
    bundle: Bundle, cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine")
    opened = open_best_engine(bundle, cache)
    assert opened.name == "onnxruntime fp32"
    assert all(record.levelno == logging.INFO for record in caplog.records if record.name == "engine")


def test_a_bound_that_somebody_raised_is_told(
    tmp_path: Path, cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    forced = write_tiny_bundle(tmp_path / "forced", fidelity=FP16 | {"precision": "int8", "joint_errors": [4.0] * 6})
    open_best_engine(forced, cache)
    assert fallen(caplog) == ["engine.bound_raised bound=8 usual=3"]


def test_a_tensorrt_that_breaks_in_a_way_that_nobody_foresaw_is_passed_over(
    bundle: Bundle, cache: EngineCache, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build_bundle(bundle, "fp32", cache)
    monkeypatch.delattr(fake_tensorrt.IExecutionContext, "set_tensor_address")
    opened = open_best_engine(bundle, cache)
    assert opened.name == "onnxruntime fp32"
    (line,) = fallen(caplog)
    assert "tensorrt fp32 broke: AttributeError: " in line
    assert gpu.live == 0
    report = check_bundle(bundle.path, "tensorrt", cache=cache, runs=1)
    assert "tensorrt fp32 broke: AttributeError" in report.problems[0]
    assert gpu.live == 0


def test_a_policy_that_no_engine_gets_right_is_refused(tmp_path: Path, cache: EngineCache) -> None:
    model = onnx.load_from_string(tiny_bundle.network())
    model.graph.node[-1].op_type = "Sub"
    with pytest.raises(EngineError, match=r"no engine of this machine runs it: .* differs from the reference by"):
        open_best_engine(write_tiny_bundle(tmp_path / "wrong", model=model.SerializeToString()), cache)


# What is not here


def test_each_thing_that_is_missing_has_its_sentence(
    bundle: Bundle, cache: EngineCache, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    gpu.fails["cudaGetDeviceCount"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(NotHereError, match="there is no usable NVIDIA GPU here"):
        Cuda.open()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotHereError, match=r"TensorRT is not installed here .* python3-libnvinfer"):
        build_bundle(bundle, "fp32", cache)
    for layout in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, layout, None)
    with pytest.raises(NotHereError, match=r"CUDA bindings are not installed here .*understudy\[jetson\]"):
        Cuda.open()


def test_a_tensorrt_that_is_too_old_is_refused(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch, FakeGpu(), "8.6.2")
    with pytest.raises(NotHereError, match=r"TensorRT 8\.6\.2 is installed here, and 10\.3 is the oldest"):
        build_bundle(bundle, "fp32", cache)


def test_the_older_layout_of_nvidias_bindings_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    gpu = FakeGpu()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", fake_tensorrt.FakeCudart(gpu))
    cuda = Cuda.open()
    assert cuda.gpu().sm == "8.7"
    cuda.close()
    assert gpu.live == 0


# The command


def test_the_command_says_what_it_built_and_proves_it(
    half_bundle: Bundle, cache: EngineCache, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.half_is_wrong = True
    run_build(half_bundle.path, cache.folder, rebuild=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("policy.onnx fp16: built in ")
    assert "by 5 joint units" in lines[1]
    assert lines[2].startswith("policy.onnx fp32: built in ")
    assert str(cache.folder) in lines[2]
    assert lines[3].startswith("golden inputs: off by ")
    assert gpu.live == 0


def test_the_command_widens_half_precision_that_cannot_be_built(
    half_bundle: Bundle, cache: EngineCache, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.refuses_half = True
    run_build(half_bundle.path, cache.folder, rebuild=False)
    lines = capsys.readouterr().out.splitlines()
    assert "could not build an engine" in lines[0]
    assert lines[1].startswith("policy.onnx fp32: built in ")
    assert lines[2].startswith("golden inputs: off by ")
    assert gpu.live == 0


def test_the_command_fails_where_no_precision_is_right(
    tmp_path: Path, cache: EngineCache, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load_from_string(tiny_bundle.network())
    model.graph.node[-1].op_type = "Sub"
    wrong = write_tiny_bundle(tmp_path / "wrong", model=model.SerializeToString())
    with pytest.raises(EngineError, match="no TensorRT engine of it passes parity here"):
        run_build(wrong.path, cache.folder, rebuild=False)
    assert gpu.live == 0


def test_the_command_without_tensorrt_is_one_sentence(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from device import cli

    monkeypatch.setattr("sys.argv", ["understudy", "bundle", "build", str(bundle.path), "--cache", str(cache.folder)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    assert "TensorRT is not installed here" in line


def test_chunks_have_the_manifests_shape(bundle: Bundle, cache: EngineCache, gpu: FakeGpu) -> None:
    build_bundle(bundle, "fp32", cache)
    engine = TensorRtEngine(bundle, "fp32", cache)
    answer = engine.infer()
    assert (answer.shape, answer.dtype) == ((CHUNK, 6), np.float32)
    assert answer.ctypes.data == engine.infer().ctypes.data
    engine.close()
