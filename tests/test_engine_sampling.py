"""Policies that sample: the loop is the table's arithmetic, noise is the caller's or a seed's, encodings are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

import onnx
from rich.console import Console

from device import cli
from device.arrays import dump_arrays, load_arrays
from device.bundle import COEFFICIENTS, Bundle
from device.bundle_table import describe
from device.engine import EngineError, infer_observation, open_engine
from device.engine_choice import ParityError, prove
from device.engine_sampling import SamplingEngine
from device.errors import BundleError
from device.observation_file import run_observation
from device.sampling import ENCODINGS_PER_STEP, RecentKeys, draw_noise
from fixtures.recipe import Array
from fixtures.tiny_diffusion import (
    FRONT,
    ROWS,
    SAMPLE,
    STATE,
    STEPS,
    denoise,
    encoder,
    observed,
    sampled,
    sampler,
    table,
    write_tiny_diffusion,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_diffusion(tmp_path / "tiny")


def fill(engine: SamplingEngine, inputs: Mapping[str, Array], step: int) -> None:
    for name, target in engine.inputs.items():
        target[...] = inputs[name][step]


def observe_all(engine: SamplingEngine, inputs: Mapping[str, Array]) -> None:
    """Both steps of `inputs`, under the keys 0 and 1."""
    for step in range(2):
        fill(engine, inputs, step)
        engine.observe(step)


# --- the loop


@pytest.mark.parametrize("observation_steps", [1, 2, 3])
def test_the_loop_is_the_tables_arithmetic(observation_steps: int, tmp_path: Path) -> None:
    bundle = write_tiny_diffusion(tmp_path / "tiny", observation_steps)
    engine = open_engine(bundle)
    for seed in range(3):  # nothing is left over from one inference to the next
        inputs = observed(observation_steps, seed)
        found = infer_observation(engine, bundle.manifest, inputs)
        np.testing.assert_allclose(found, sampled(inputs, table()), rtol=1e-6, atol=5e-5)  # 1e-6 in x
        assert found.dtype == np.float32


@pytest.mark.parametrize("column", range(len(COEFFICIENTS)), ids=COEFFICIENTS)
def test_every_column_has_its_say(column: int, tmp_path: Path) -> None:
    rows = np.array(ROWS, np.float32)
    rows[1, column] *= 0.5
    bundle = write_tiny_diffusion(tmp_path / "tiny", steps=table(rows))
    found = infer_observation(open_engine(bundle), bundle.manifest, observed())
    np.testing.assert_allclose(found, sampled(observed(), table(rows)), rtol=1e-6, atol=5e-5)
    assert np.abs(found - sampled(observed(), table())).max() > 0.01


@pytest.mark.parametrize("steps", [1, 2])
def test_the_last_step_is_the_last_row_whether_steps_are_even_or_odd(steps: int, tmp_path: Path) -> None:
    short = {name: array[:steps] for name, array in table().items()}
    bundle = write_tiny_diffusion(tmp_path / "tiny", steps=short, sampler=sampler(steps=steps))
    inputs = observed() | {"step_noise": observed()["step_noise"][:steps]}
    found = infer_observation(open_engine(bundle), bundle.manifest, inputs)
    np.testing.assert_allclose(found, sampled(inputs, short), rtol=1e-6, atol=5e-5)


def test_the_chunk_lies_in_the_same_memory_each_time(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    first = infer_observation(engine, bundle.manifest, observed())
    assert first.ctypes.data == infer_observation(engine, bundle.manifest, observed(seed=2)).ctypes.data
    assert first.shape == (4, 6)


def test_the_engine_is_proven_on_golden_inputs(tmp_path: Path) -> None:
    good = write_tiny_diffusion(tmp_path / "good")
    assert prove(good, open_engine(good)) < 1e-4
    golden = dump_arrays(observed() | {"action": sampled(observed(), table()).astype(np.float32) + 1})
    bad = write_tiny_diffusion(tmp_path / "bad", files={"golden.npz": golden})
    with pytest.raises(ParityError, match="differs from the reference by 1"):
        prove(bad, open_engine(bad))


# --- noise


def test_a_seed_decides_what_is_drawn(bundle: Bundle) -> None:
    without = {name: array for name, array in observed().items() if name not in ("noise", "step_noise")}

    def two(seed: int | None) -> list[Array]:
        engine = open_engine(bundle, seed=seed)
        return [infer_observation(engine, bundle.manifest, without).copy() for _ in range(2)]

    first, again, other = two(5), two(5), two(6)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - first[1]).max() > 0.1, "each inference draws anew"
    assert np.abs(first[0] - other[0]).max() > 0.1
    assert np.abs(two(None)[0] - two(None)[0]).max() > 0.1, "without a seed no two runs are the same"


def test_what_is_drawn_is_standard_normal_noise_for_start_and_steps(bundle: Bundle) -> None:
    rng = np.random.default_rng(5)
    drawn = rng.standard_normal((STEPS, *SAMPLE), np.float32)  # x_T, then one for each of the two steps that draw
    inputs = observed() | {"noise": drawn[0], "step_noise": drawn[1:]}
    engine = open_engine(bundle, seed=5)
    given = infer_observation(open_engine(bundle), bundle.manifest, inputs).copy()
    without = {name: inputs[name] for name in (STATE, FRONT)}
    np.testing.assert_array_equal(infer_observation(engine, bundle.manifest, without), given)


def test_noise_of_steps_that_draw_none_is_not_read(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    inputs = observed()
    whole = infer_observation(engine, bundle.manifest, inputs).copy()
    shorter = inputs | {"step_noise": inputs["step_noise"][: STEPS - 1]}
    np.testing.assert_array_equal(infer_observation(engine, bundle.manifest, shorter), whole)


def test_noise_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    rows = np.array(ROWS, np.float32)
    rows[-1, COEFFICIENTS.index("k_noise")] = 0.1
    bundle = write_tiny_diffusion(tmp_path / "tiny", observation_steps=1, steps=table(rows))
    engine = open_engine(bundle)
    for noise in (np.zeros((7, 6), np.float32), np.zeros(SAMPLE), np.zeros((1, *SAMPLE), np.float32)):
        with pytest.raises(EngineError, match=r"noise should be float32 \[8, 6\], found"):
            engine.infer(noise=noise)
    with pytest.raises(EngineError, match="noise holds NaN"):
        engine.infer(noise=np.full(SAMPLE, np.nan, np.float32))
    with pytest.raises(EngineError, match=r"step_noise should be float32 \[3, 8, 6\], found float32 \[2, 8, 6\]"):
        engine.infer(step_noise=np.zeros((2, *SAMPLE), np.float32))  # this one's last step draws too


def test_noise_is_drawn_by_the_names_and_shapes_that_infer_takes(bundle: Bundle, tmp_path: Path) -> None:
    shapes = {name: array.shape for name, array in draw_noise(bundle.manifest, np.random.default_rng(0)).items()}
    assert shapes == {"noise": SAMPLE, "step_noise": (STEPS, *SAMPLE)}
    rows = np.array(ROWS, np.float32)
    rows[:, COEFFICIENTS.index("k_noise")] = 0
    still = write_tiny_diffusion(tmp_path / "still", steps=table(rows), sampler=sampler(draws_noise=False))
    assert list(draw_noise(still.manifest, np.random.default_rng(0))) == ["noise"]


# --- what is known


def test_a_step_is_encoded_once_however_often_it_is_used(bundle: Bundle) -> None:
    engine = SamplingEngine(bundle)
    inputs = observed()
    noise = {"noise": inputs["noise"], "step_noise": inputs["step_noise"]}
    observe_all(engine, inputs)
    engine.inputs[STATE][...] = 1e3  # whatever the inputs hold by now
    for keys in ([0, 1], [1, 0], [1, 1]):
        chosen = noise | {name: inputs[name][keys] for name in (STATE, FRONT)}
        np.testing.assert_allclose(engine.infer(keys, **noise), sampled(chosen, table()), rtol=1e-6, atol=5e-5)
    assert engine.encoded == 2


def test_a_key_that_is_observed_again_is_overwritten(bundle: Bundle) -> None:
    engine = SamplingEngine(bundle)
    first, second = observed(seed=1), observed(seed=2)
    noise = {"noise": first["noise"], "step_noise": first["step_noise"]}
    observe_all(engine, first)
    observe_all(engine, second)
    np.testing.assert_allclose(engine.infer([0, 1], **noise), sampled(second | noise, table()), rtol=1e-6, atol=5e-5)


def test_keys_that_are_not_known_or_too_few_are_refused(bundle: Bundle) -> None:
    engine = SamplingEngine(bundle)
    observe_all(engine, observed())
    with pytest.raises(EngineError, match="no observation step 7 is known"):
        engine.infer([0, 7])
    with pytest.raises(EngineError, match="looks at 2 observation steps, 1 keys were given"):
        engine.infer([0])
    with pytest.raises(EngineError, match="looks at 2 observation steps, 0 keys were given"):
        engine.infer()


def test_memory_is_bounded_and_what_was_used_last_is_kept(bundle: Bundle) -> None:
    engine = SamplingEngine(bundle)
    places = 2 * ENCODINGS_PER_STEP
    for key in range(places):
        engine.observe(key)
    assert engine.knows(0)  # and so it is not the next to go
    engine.observe(places)
    assert engine.knows(0)
    assert not engine.knows(1)


def test_a_failed_encoding_leaves_its_key_unknown(bundle: Bundle) -> None:
    engine = SamplingEngine(bundle)
    observe_all(engine, observed())
    engine.inputs[STATE][2] = np.nan
    with pytest.raises(EngineError, match="NaN or infinity"):
        engine.observe(1)
    assert not engine.knows(1)
    assert engine.knows(0)
    fill(engine, observed(), 1)
    engine.observe(1)
    engine.infer([0, 1])


def test_recent_keys_give_every_key_a_place_of_its_own() -> None:
    keys = RecentKeys(2)
    assert {keys.claim("a"), keys.claim("b")} == {0, 1}
    assert keys.find("a") == keys.claim("a")
    place = keys.find("b")
    assert keys.find("a") is not None
    assert keys.claim("c") == place
    assert keys.find("b") is None
    keys.forget("a")
    assert keys.find("a") is None
    assert keys.claim("d") != place


# --- refusals


def test_a_result_that_is_not_finite_is_refused_though_clipped(tmp_path: Path) -> None:
    """The network's output becomes NaN, is clipped to a number, and must not pass as a motion."""
    model = onnx.load_from_string(denoise())
    poisoned = next(node for node in model.graph.node if list(node.output) == ["by_time"])
    poisoned.CopyFrom(onnx.helper.make_node("MatMul", ["time", "poison"], ["by_time"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((3, 6), np.nan, np.float32), "poison"))
    bundle = write_tiny_diffusion(tmp_path / "nan", files={"denoise.onnx": model.SerializeToString()})
    with pytest.raises(EngineError, match="NaN or infinity"):
        infer_observation(open_engine(bundle), bundle.manifest, observed())


@pytest.mark.parametrize("name", ["encoder.onnx", "denoise.onnx", "sampler.npz", "golden.npz"])
def test_a_file_that_is_not_listed_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"lists no {name}"):
        write_tiny_diffusion(tmp_path / "tiny", without=name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"coefficients": np.zeros((3, 8), np.float32)},
            r"coefficients should be float32 \[3, 9\], found float32 \[3, 8\]",
        ),
        ({"coefficients": np.zeros((3, 9))}, r"coefficients should be float32 \[3, 9\], found float64"),
        ({"time": np.zeros((2, 3), np.float32)}, r"time should be float32 \[3, 3\], found float32 \[2, 3\]"),
        ({"time": np.zeros(3, np.float32)}, r"time should be float32 \[3, 1\], found float32 \[3\]"),
        ({"timesteps": np.array([1, np.nan, 0], np.float32)}, "timesteps holds NaN or infinity"),
        ({"betas": np.zeros(3, np.float32)}, "betas is nothing that a table of steps holds"),
        ({"coefficients": np.zeros((3, 9), np.float32)}, "a clip of zero or less"),
        ({"coefficients": np.array(ROWS, np.float32) * (np.arange(9) != 7)}, "draws noise, the table has it otherwise"),
    ],
)
def test_a_table_that_is_not_the_manifests_is_refused(changes: dict[str, Array], says: str, tmp_path: Path) -> None:
    changes = {name: array.astype(np.float32) if "otherwise" in says else array for name, array in changes.items()}
    with pytest.raises(BundleError, match=says):
        write_tiny_diffusion(tmp_path / "tiny", files={"sampler.npz": dump_arrays(table() | changes)}).sampler_table()


def test_a_table_without_an_array_is_refused(tmp_path: Path) -> None:
    lacking = dump_arrays({name: array for name, array in table().items() if name != "time"})
    with pytest.raises(BundleError, match="time is missing"):
        write_tiny_diffusion(tmp_path / "tiny", files={"sampler.npz": lacking}).sampler_table()


def test_graphs_that_are_not_the_manifests_are_refused(tmp_path: Path) -> None:
    other = write_tiny_diffusion(tmp_path / "time", files={"denoise.onnx": denoise(time=4)})
    with pytest.raises(EngineError, match=r"denoise.onnx does not take the inputs .* \(time\)"):
        open_engine(other)
    other = write_tiny_diffusion(tmp_path / "steps", files={"denoise.onnx": denoise(observation_steps=1)})
    with pytest.raises(EngineError, match=r"denoise.onnx does not take the inputs .* \(condition\)"):
        open_engine(other)
    other = write_tiny_diffusion(tmp_path / "name", files={"encoder.onnx": encoder(output="code")})
    with pytest.raises(EngineError, match=r"encoder.onnx does not give features float32 \[F\]"):
        open_engine(other)
    other = write_tiny_diffusion(tmp_path / "chunk", chunk_size=3)
    with pytest.raises(EngineError, match=r"denoise.onnx does not give action float32 \[3, 6\]"):
        open_engine(other)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"first_action": 5}, "actions 5 to 9 of a horizon of 8"),
        ({"initial_scale": 0}, "sampler.initial_scale"),
        ({"steps": 0}, "sampler.steps"),
        ({"eta": 1.0}, "sampler.eta: Extra inputs are not permitted"),
    ],
)
def test_a_sampler_that_says_something_odd_is_refused(bundle: Bundle, changes: dict[str, object], says: str) -> None:
    path = bundle.path / "manifest.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"sampler": document["sampler"] | changes}))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle.path)
    assert says in str(caught.value)


def test_a_policy_that_answers_at_once_has_no_table(tmp_path: Path) -> None:
    from fixtures.tiny_bundle import write_tiny_bundle

    with pytest.raises(BundleError, match="does not sample"):
        write_tiny_bundle(tmp_path / "tiny").sampler_table()


# --- from a file, by the command


def run_command(bundle: Bundle, folder: Path, arrays: Mapping[str, Array], monkeypatch: pytest.MonkeyPatch) -> Array:
    (folder / "obs.npz").write_bytes(dump_arrays(arrays))
    command = ["understudy", "bundle", "run", str(bundle.path), "--observation", str(folder / "obs.npz")]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(folder / "chunk.npz")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    return load_arrays(folder / "chunk.npz")["action"]


def test_the_command_runs_a_policy_that_samples(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = observed(seed=4)
    found = run_command(bundle, tmp_path, inputs, monkeypatch)
    np.testing.assert_allclose(found, sampled(inputs, table()), rtol=1e-6, atol=5e-5)
    assert "action float32 [4, 6]" in capsys.readouterr().out
    found = run_command(bundle, tmp_path, {name: inputs[name] for name in (STATE, FRONT)}, monkeypatch)
    assert np.isfinite(found).all(), "noise is drawn where the file has none"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({STATE: np.zeros(6, np.float32)}, "observation.state should be float32 [2, 6], found float32 [6]"),
        ({FRONT: np.zeros((3, 96, 96, 3), np.uint8)}, "should be uint8 [2, 96, 96, 3], found uint8 [3, 96, 96, 3]"),
        ({"noise": np.zeros((4, 6), np.float32)}, "noise should be float32 [8, 6], found float32 [4, 6]"),
        ({"step_noise": np.zeros((1, 8, 6), np.float32)}, "step_noise should be float32 [3, 8, 6], found"),
        ({"noise": np.full(SAMPLE, np.inf, np.float32)}, "noise holds NaN or infinity"),
        ({"seed": np.zeros(1, np.float32)}, "seed is nothing that the policy takes"),
    ],
)
def test_an_observations_file_that_does_not_fit_is_refused(
    changes: dict[str, Array], says: str, bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "obs.npz").write_bytes(dump_arrays(observed() | changes))
    with pytest.raises(BundleError) as caught:
        run_observation(bundle.path, tmp_path / "obs.npz", tmp_path / "chunk.npz")
    assert says in str(caught.value)


def test_a_person_can_read_how_a_policy_samples(tmp_path: Path) -> None:
    errors = [0.001, 0.002, 0.003, 0.004, 0.005, 0.25]
    fidelity = {"weights": "fp16", "max_error": 0.0, "max_rounding_error": 0.0, "precision": "int8"}
    fidelity |= {"joint_errors": errors, "observations": 120}
    bundle = write_tiny_diffusion(tmp_path / "tiny", fidelity=fidelity)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(describe(bundle.manifest))
    for text in (
        "ddpm, 3 leading steps; noise at the start and in between",
        "8 actions, of which 1 to 4 are the chunk",
        "int8",
        "error against fp32 on 120 observations",
        "gripper  0.25 range_0_100",
    ):
        assert text in capture.get()


@pytest.mark.parametrize("missing", ["noise", "step_noise"])
def test_golden_inputs_without_the_noise_that_decides_the_answer_prove_nothing(missing: str, tmp_path: Path) -> None:
    golden = {name: array for name, array in observed().items() if name != missing}
    answer = sampled(observed(), table()).astype(np.float32)
    bundle = write_tiny_diffusion(tmp_path / "d", files={"golden.npz": dump_arrays(golden | {"action": answer})})
    with pytest.raises(BundleError, match=rf"golden\.npz: {missing} is missing, without which"):
        prove(bundle, SamplingEngine(bundle))
