"""Lower precision: half and int8 graphs as every engine takes them, measured on recordings, refused where they hurt."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="export needs the export extra")

import onnx
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from device.arrays import dump_arrays
from device.bundle import ENCODER, POLICY, Bundle
from device.engine import infer_observation, open_engine
from device.onnx_wire import with_signed_zeros
from export import fidelity
from export.bundling import ExportReport, export_checkpoint
from export.calibrate import largest_magnitudes
from export.checkpoint import Told
from export.episodes import open_episodes, sample_observations
from export.errors import ExportError
from export.families import read_policy
from export.precision import Precision, Storage
from export.quantize import LEVELS, SHY_LEVELS, SIGNED_ZERO, UNSIGNED_ZERO, plan, quantize
from export.rounding import with_roundings
from export.sampling import Sampling
from export.units import TrainedIn
from fixtures.checkpoint_files import POST_STATE, PRE_STATE, change_tensors, write_checkpoint
from fixtures.recipe import VARIANTS, observation, uniform
from fixtures.recipe_diffusion import VARIANTS as SAMPLED

GROUP_NORMS = "environment_and_camera_quantiles"
NO_CAMERA = "environment_state_only_unmapped"
HEAVY = ("Conv", "ConvTranspose", "Gemm")
ONE_TYPE = (*HEAVY, "Add", "Sub", "Mul", "Div", "MatMul", "Concat", "Min", "Max")
IN_FLOAT32 = ("LayerNormalization", "InstanceNormalization", "Softmax", "Erf", "Softplus", "Tanh", "ReduceMean", "Div")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder that goes at once: checkpoints are large, and pytest keeps its own for days."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def sharp(shared: Path) -> Path:
    """A policy of the recipe as it is: made so that every difference shows, more than in any that was trained."""
    return write_checkpoint(shared / "sharp", "plain")


@pytest.fixture(scope="module")
def plain(shared: Path) -> Path:
    """The same, answering in smaller movements."""
    checkpoint = write_checkpoint(shared / "plain", "plain")
    weights = load_file(checkpoint / "model.safetensors")["model.action_head.weight"]
    change_tensors(checkpoint / "model.safetensors", **{"model.action_head.weight": 0.1 * weights})
    return checkpoint


@pytest.fixture(scope="module")
def recordings(shared: Path) -> Path:
    return write_episodes(shared / "episodes", VARIANTS["plain"], count=4, frames=12)


@pytest.fixture(scope="module")
def half(plain: Path, recordings: Path, shared: Path) -> ExportReport:
    return export_checkpoint(plain, shared / "half", precision="fp16", episodes=recordings)


@pytest.fixture(scope="module")
def whole(plain: Path, shared: Path) -> ExportReport:
    return export_checkpoint(plain, shared / "whole")


@pytest.fixture(scope="module")
def int8(plain: Path, recordings: Path, shared: Path) -> ExportReport:
    return export_checkpoint(plain, shared / "int8", precision="int8", episodes=recordings)


def write_episodes(folder: Path, config: dict[str, Any], count: int, frames: int) -> Path:
    """Recordings of an arm that moves, in front of cameras that see something else in every frame."""
    folder.mkdir(parents=True)
    for episode in range(count):
        seen = [observation(config["input_features"], 100 * episode + frame) for frame in range(frames)]
        arrays = {name: np.stack([each[name] for each in seen]) for name in seen[0]}
        action = 30 * uniform(f"action {episode}", (frames, config["output_features"]["action"]["shape"][0]))
        (folder / f"{episode}.npz").write_bytes(dump_arrays({**arrays, "action": action}))
    return folder


def refusal(checkpoint: Path, out: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, out, **options)
    assert not out.exists(), "a refused export leaves nothing behind"
    return str(caught.value)


def answers(bundle: Path, observed: list[dict[str, np.ndarray]]) -> np.ndarray:
    opened = Bundle.open(bundle)
    engine = open_engine(opened)
    return np.stack([infer_observation(engine, opened.manifest, each).copy() for each in observed])


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> ONNX type, as strict inference has it."""
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def graphs(checkpoint: Path, precision: Precision) -> dict[str, onnx.ModelProto]:
    _, policy = read_policy(checkpoint, Told(), Sampling())
    files = policy.author({}, Storage.fp32, precision).files
    return {name: onnx.load_from_string(content) for name, content in files.items() if name.endswith(".onnx")}


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: onnx.ModelProto | bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    result: np.ndarray = run_all(model, [inputs])[0]
    return result


def run_all(model: onnx.ModelProto | bytes, observed: list[dict[str, np.ndarray]]) -> np.ndarray:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.stack([session.run(None, each)[0] for each in observed])


# Half precision, as it stands in the graph


@pytest.mark.parametrize("name", [*VARIANTS, *SAMPLED])
def test_half_precision_is_for_the_heavy_work_and_every_type_is_written_in_the_graph(name: str, scratch: Path) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", VARIANTS.get(name) or SAMPLED[name])
    for model in graphs(checkpoint, Precision.fp16).values():
        types = element_types(model)
        for node in model.graph.node:
            floats = {types[each] for each in node.input if types[each] in (TensorProto.FLOAT, TensorProto.FLOAT16)}
            if node.op_type in HEAVY:
                assert floats == {TensorProto.FLOAT16}, node.name
            if node.op_type in IN_FLOAT32:
                assert floats == {TensorProto.FLOAT}, node.name
            if node.op_type in ONE_TYPE:
                assert len(floats) == 1, f"{node.name}: a strongly typed engine converts nothing by itself"
            assert all(each for each in node.input), f"{node.name}: TensorRT's parser has no use for inputs left out"
        assert {types[value.name] for value in model.graph.output} == {TensorProto.FLOAT}
        assert {types[value.name] for value in model.graph.input} <= {TensorProto.FLOAT, TensorProto.UINT8}
        readers = {each: node for node in model.graph.node for each in node.input}
        for value in model.graph.input:
            if types[value.name] == TensorProto.UINT8:
                assert readers[value.name].op_type == "Cast", "TensorRT takes frames through a Cast only"


def test_attention_is_computed_in_half_precision_around_a_float32_softmax(plain: Path) -> None:
    model = graphs(plain, Precision.fp16)[POLICY]
    types = element_types(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert products
    assert all(types[each] == TensorProto.FLOAT16 for node in products for each in node.input)


def test_what_makes_actions_of_a_networks_output_is_float32(plain: Path) -> None:
    model = graphs(plain, Precision.fp16)[POLICY]
    types, makers = element_types(model), {node.output[0]: node for node in model.graph.node}
    node, passed = makers["action"], []
    while node.op_type != "Cast":
        passed.append(node.op_type)
        node = makers[node.input[0]]
    assert passed == ["Identity", "Add", "Mul"], "to joint units, without rounding"
    assert types[node.input[0]] == TensorProto.FLOAT16


def test_a_sampler_computes_in_float32(scratch: Path) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", SAMPLED[GROUP_NORMS])
    model = graphs(checkpoint, Precision.fp16)["denoise.onnx"]
    types = element_types(model)
    for name in ("sample", "coefficients", "noise", "previous", "time", "condition", "next", "denoised", "action"):
        assert types[name] == TensorProto.FLOAT
    readers = [node for node in model.graph.node if "coefficients" in node.input]
    assert readers
    assert all(types[node.output[0]] == TensorProto.FLOAT for node in readers)


def test_weights_of_heavy_work_are_stored_once_in_half_precision(plain: Path) -> None:
    model = graphs(plain, Precision.fp16)[POLICY]
    weights = initializers(model)
    read = [weights[each] for node in model.graph.node if node.op_type in HEAVY for each in node.input[1:]]
    assert all(weight.dtype == np.float16 for weight in read)
    stored = sum(weight.nbytes for weight in weights.values())
    assert stored < 0.51 * sum(weight.nbytes for weight in initializers(graphs(plain, Precision.fp32)[POLICY]).values())


def test_the_same_half_precision_file_runs_in_onnxruntime(whole: ExportReport, half: ExportReport) -> None:
    seen = observation(VARIANTS["plain"]["input_features"])
    exact, found = answers(whole.path, [seen]), answers(half.path, [seen])
    assert 0 < np.abs(found - exact).max() < fidelity.BOUNDS[Precision.fp16]


# int8, as it stands in the graph


@pytest.fixture(scope="module")
def quantized(int8: ExportReport) -> onnx.ModelProto:
    return onnx.load(int8.path / POLICY)


def test_all_convolutions_are_int8_but_the_last_which_hands_over_to_float32(quantized: onnx.ModelProto) -> None:
    element_types(quantized)  # checks it
    makers = {node.output[0]: node.op_type for node in quantized.graph.node}
    convolutions = [node for node in quantized.graph.node if node.op_type == "Conv"]
    float32 = [node.name for node in convolutions if makers.get(node.input[1]) != "DequantizeLinear"]
    assert len(convolutions) == 21
    assert float32 == ["encoder_img_feat_input_proj/Conv"]


def test_weights_are_symmetric_and_scaled_by_channel(quantized: onnx.ModelProto, plain: Path) -> None:
    weights = initializers(quantized)
    exact = initializers(graphs(plain, Precision.fp32)[POLICY])
    stored = [name for name in weights if name.endswith(".weight/int8")]
    assert len(stored) == 20
    for name in stored:
        weight = name.removesuffix("/int8")
        scale = weights[f"{weight}/scale"].reshape(-1, 1, 1, 1)
        assert scale.size == len(exact[weight]), "one a channel"
        assert not weights[f"{weight}/zero"].any()
        assert weight not in weights, "the float32 weight is gone"
        assert np.abs(weights[name] * scale - exact[weight]).max() <= 0.51 * scale.max()


def test_activations_take_no_code_that_a_signed_byte_lacks(quantized: onnx.ModelProto) -> None:
    weights = initializers(quantized)
    assert (weights[UNSIGNED_ZERO], weights[SIGNED_ZERO]) == (0, 128)
    assert weights[UNSIGNED_ZERO].dtype == weights[SIGNED_ZERO].dtype == np.uint8
    used = {node.input[2] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    assert used == {UNSIGNED_ZERO, SIGNED_ZERO}


def test_no_sum_of_two_products_leaves_16_bits(quantized: onnx.ModelProto) -> None:
    """x86 without VNNI multiplies pairs and adds them in 16 bits, saturating: 255 * 127 * 2 would be cut in half."""
    assert 2 * LEVELS * LEVELS < 2**15
    assert 2 * 255 * SHY_LEVELS < 2**15
    weights, makers = initializers(quantized), {node.output[0]: node for node in quantized.graph.node}
    for node in quantized.graph.node:
        if node.op_type == "Conv" and node.input[1] in makers:
            eight_bits = makers[node.input[0]].input[2] == SIGNED_ZERO
            assert np.abs(weights[makers[node.input[1]].input[0]]).max() == (SHY_LEVELS if eight_bits else LEVELS)


def test_onnxruntime_makes_one_chain_of_integer_kernels_of_it(int8: ExportReport, scratch: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    onnxruntime.InferenceSession(str(int8.path / POLICY), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(scratch / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 20, "every convolution that was quantised"
    assert kinds.count("QLinearAdd") == 7, "residual sums, but the last"
    assert kinds.count("QuantizeLinear") == 1, "the pictures"
    assert kinds.count("DequantizeLinear") == 2, "the last residual block, for what computes in float32"


def test_what_tensorrt_is_given_computes_the_same(int8: ExportReport, recordings: Path) -> None:
    content = (int8.path / POLICY).read_bytes()
    seen = sample_observations(open_episodes(recordings), 128, 0, horizon=1)[0].observation
    symmetric = with_signed_zeros(content)
    weights = initializers(onnx.load_from_string(symmetric))
    for name in (UNSIGNED_ZERO, SIGNED_ZERO):
        assert (weights[name].dtype, weights[name]) == (np.int8, 0), "all that TensorRT takes"
    difference = np.abs(run(symmetric, seen) - run(content, seen)).max()
    assert difference < 0.05, "but for sums that lie on the edge between two codes"


def test_a_group_normed_encoder_is_quantised_and_the_denoiser_left_alone(scratch: Path) -> None:
    config = SAMPLED[GROUP_NORMS]
    checkpoint = write_checkpoint(scratch / "checkpoint", config)
    episodes = write_episodes(scratch / "episodes", config, count=2, frames=20)
    whole = export_checkpoint(checkpoint, scratch / "whole")
    options: dict[str, Any] = {"precision": "int8", "episodes": episodes, "force": True}
    report = export_checkpoint(checkpoint, scratch / "int8", **options)
    changed = {
        name
        for name in ("encoder.onnx", "denoise.onnx", "sampler.npz")
        if (whole.path / name).read_bytes() != (report.path / name).read_bytes()
    }
    assert changed == {ENCODER}
    assert all(0 < error < 30 for error in report.joint_errors.values()), "the same noise: what is left is int8"


small = st.floats(-1e3, 1e3, width=32)


@given(st.lists(small, min_size=4, max_size=4), st.floats(2**-100, 1e6, width=32), st.lists(small, min_size=2))
def test_any_weights_survive_quantisation(values: list[float], largest: float, bias: list[float]) -> None:
    """Channels that are dead, tiny or with a bias that dwarfs their weights among them."""
    weight = np.array(values, np.float32).reshape(2, 1, 2, 1)
    model = two_convolutions(weight, np.array(bias[:2], np.float32))
    planned = plan(model)
    quantized = quantize(model, planned, dict.fromkeys(planned.observed, largest))
    onnx.checker.check_model(quantized, full_check=True)
    stored = initializers(quantized)
    scale = stored["first/scale"].astype(np.float64)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    units = np.abs(np.array(bias[:2], np.float64)) / (scale * float(stored["x/scale"]))
    assert (units < 2**31).all(), "runtimes keep a bias in 32 bits"
    exact = np.abs(weight.astype(np.float64) - stored["first/int8"] * scale.reshape(-1, 1, 1, 1))
    assert (exact <= 0.51 * scale.reshape(-1, 1, 1, 1)).all()


def two_convolutions(weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """x -> Conv -> Relu -> Conv -> y."""
    constants = {"first": weight, "bias": bias, "second": np.ones((1, 2, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "first", "bias"], ["a"], kernel_shape=[2, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["y"], kernel_shape=[1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 3, 4))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_ranges_are_the_largest_magnitudes_seen() -> None:
    model = two_convolutions(np.ones((2, 1, 2, 1), np.float32), np.zeros(2, np.float32))
    feeds = [{"x": np.full((1, 1, 4, 4), value, np.float32), "unread": np.zeros(3)} for value in (1, -5, 2)]
    assert largest_magnitudes(model, ["b", "x"], feeds, threads=1) == {"x": 5.0, "b": 4.0}


# What it is measured on


def test_half_precision_is_measured_joint_by_joint_on_recorded_observations(
    whole: ExportReport, half: ExportReport, recordings: Path
) -> None:
    """As a GPU rounds: onnxruntime's CPU, which the bundle runs on here, leaves most roundings out."""
    observed = [each.observation for each in sample_observations(open_episodes(recordings), 64, 0, horizon=1)]
    rounding = with_roundings(onnx.load(half.path / POLICY))
    errors = np.abs(run_all(rounding, observed) - answers(whole.path, observed))
    measured = Bundle.open(half.path).manifest.fidelity
    assert measured.precision == "fp16"
    assert measured.observations == len(observed) == 48
    assert measured.joint_errors == pytest.approx(errors.max((0, 1)), rel=0.02)
    assert list(half.joint_errors.values()) == list(measured.joint_errors)
    assert list(half.mean_joint_errors.values()) == pytest.approx(errors.mean((0, 1)), rel=0.02)


def test_roundings_are_those_of_the_half_precision_graph(scratch: Path) -> None:
    """ONNX's own evaluator computes every node in the type that the graph gives it."""
    config = VARIANTS[NO_CAMERA]
    model = graphs(write_checkpoint(scratch / "checkpoint", config), Precision.fp16)[POLICY]
    exact = graphs(scratch / "checkpoint", Precision.fp32)[POLICY]
    for step in range(4):
        seen = observation(config["input_features"], step)
        reference = ReferenceEvaluator(model).run(None, seen)[0]
        rounding = np.abs(reference - run(exact, seen)).mean()
        assert np.abs(run(with_roundings(model), seen) - run(exact, seen)).mean() == pytest.approx(rounding, rel=0.5)
        assert rounding > 0


def test_int8_is_measured_on_other_observations_than_it_was_calibrated_on(
    whole: ExportReport, int8: ExportReport, recordings: Path
) -> None:
    observed = [each.observation for each in sample_observations(open_episodes(recordings), 128, 0, horizon=1)]
    errors = np.abs(answers(int8.path, observed[1::2]) - answers(whole.path, observed[1::2]))
    measured = Bundle.open(int8.path).manifest.fidelity
    assert (measured.precision, measured.observations) == ("int8", 24)
    assert measured.joint_errors == pytest.approx(errors.max((0, 1)), rel=0.02)
    assert 0 < max(measured.joint_errors) < fidelity.BOUNDS[Precision.int8]


def test_a_recorded_observation_becomes_the_golden_one(int8: ExportReport, recordings: Path) -> None:
    """An engine in int8 is proven on what its ranges are for; made-up pictures lie beyond them."""
    bundle = Bundle.open(int8.path)
    inputs, expected = bundle.golden()
    first = sample_observations(open_episodes(recordings), 128, 0, horizon=1)[0].observation
    assert all(np.array_equal(inputs[name], first[name]) for name in inputs)
    assert (int8.path / "reference" / "front.jpg").is_file()
    error = np.abs(answers(int8.path, [inputs])[0] - expected).max()
    assert bundle.manifest.fidelity.max_error == pytest.approx(error, rel=0.02)


def test_recordings_are_in_the_units_of_training(scratch: Path) -> None:
    config = VARIANTS[NO_CAMERA]
    checkpoint = write_checkpoint(scratch / "checkpoint", config)
    episodes = write_episodes(scratch / "episodes", config, count=1, frames=4)
    for name in (PRE_STATE, POST_STATE):
        statistics = load_file(checkpoint / name)
        change_tensors(checkpoint / name, **{key: values / 50 for key, values in statistics.items()})
    options: dict[str, Any] = {"precision": "fp16", "episodes": episodes, "force": True}
    joints = [*"abcde", "f=degrees"]
    report = export_checkpoint(checkpoint, scratch / "out", joints=joints, units=TrainedIn.radians, **options)
    recorded = sample_observations(open_episodes(episodes), 64, 0, horizon=1)[0].observation["observation.state"]
    state = Bundle.open(report.path).golden()[0]["observation.state"]
    assert state == pytest.approx([*np.degrees(recorded[:5]), recorded[5]], rel=1e-5)


def test_one_real_observation_does_for_half_precision(plain: Path, scratch: Path) -> None:
    path = scratch / "observation.npz"
    path.write_bytes(dump_arrays(observation(VARIANTS["plain"]["input_features"])))
    report = export_checkpoint(plain, scratch / "half", precision="fp16", observation=path)
    assert Bundle.open(report.path).manifest.fidelity.observations == 1


def test_stored_and_computed_precision_are_independent(plain: Path, recordings: Path, scratch: Path) -> None:
    report = export_checkpoint(plain, scratch / "int8", precision="int8", weights="fp16", episodes=recordings)
    measured = Bundle.open(report.path).manifest.fidelity
    assert (measured.weights, measured.precision) == ("fp16", "int8")
    assert measured.max_rounding_error > 0
    assert max(measured.joint_errors) < fidelity.BOUNDS[Precision.int8]


# What is refused


def test_a_policy_that_int8_moves_too_far_is_refused_by_joint_and_exported_when_forced(
    sharp: Path, recordings: Path, scratch: Path
) -> None:
    said = refusal(sharp, scratch / "out", precision="int8", episodes=recordings)
    assert said.startswith("--precision int8 moves ")
    assert "(bound: 3)" in said
    assert "accept it with --force" in said
    forced = export_checkpoint(sharp, scratch / "out", precision="int8", episodes=recordings, force=True)
    worst = max(forced.joint_errors, key=lambda joint: forced.joint_errors[joint])
    assert forced.joint_errors[worst] > fidelity.BOUNDS[Precision.int8]
    assert f"moves {worst} by up to {forced.joint_errors[worst]:.2g} " in said


def test_a_policy_without_convolutions_has_nothing_to_quantise(scratch: Path) -> None:
    config = VARIANTS[NO_CAMERA]
    checkpoint = write_checkpoint(scratch / "checkpoint", config)
    episodes = write_episodes(scratch / "episodes", config, count=2, frames=20)
    said = refusal(checkpoint, scratch / "out", precision="int8", episodes=episodes)
    assert "--precision int8 is for convolutions, and this policy has none" in said
    assert "\n" not in said


def test_numbers_that_half_precision_does_not_have_are_refused(scratch: Path) -> None:
    config = VARIANTS[NO_CAMERA]
    checkpoint = write_checkpoint(scratch / "checkpoint", config)
    episodes = write_episodes(scratch / "episodes", config, count=2, frames=4)
    name = "model.encoder.layers.0.linear2.weight"
    weight = load_file(checkpoint / "model.safetensors")[name].copy()
    weight[0, 0] = 1e5  # a layer norm follows, so float32 does not mind
    change_tensors(checkpoint / "model.safetensors", **{name: weight})
    said = refusal(checkpoint, scratch / "out", precision="fp16", episodes=episodes, force=True)
    assert "--precision fp16 is not for this policy" in said


def test_int8_asks_for_recordings_and_half_precision_for_an_observation(plain: Path, scratch: Path) -> None:
    path = scratch / "observation.npz"
    path.write_bytes(dump_arrays(observation(VARIANTS["plain"]["input_features"])))
    said = refusal(plain, scratch / "out", precision="int8", observation=path)
    assert "give a folder of its recordings with --episodes" in said
    said = refusal(plain, scratch / "out", precision="fp16")
    assert "--episodes" in said
    assert "--observation" in said


def test_int8_is_not_calibrated_on_a_handful_of_observations(plain: Path, scratch: Path) -> None:
    episodes = write_episodes(scratch / "episodes", VARIANTS["plain"], count=1, frames=31)
    assert "holds 31 observations; int8 needs 32" in refusal(
        plain, scratch / "out", precision="int8", episodes=episodes
    )


def test_recordings_of_another_robot_are_refused(plain: Path, scratch: Path) -> None:
    episodes = write_episodes(scratch / "episodes", VARIANTS["ensemble"], count=1, frames=4)
    said = refusal(plain, scratch / "out", precision="fp16", episodes=episodes)
    assert "observation.images.wrist_left" in said or "observation.images.front" in said
