"""The engine: an observation in, a chunk out, and a sentence for everything that is not one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the bundles of these tests are written with the export extra")

from rich.console import Console

from device import cli
from device.arrays import dump_arrays, load_arrays
from device.bundle import Bundle
from device.bundle_table import describe
from device.engine import EngineError, infer_observation, open_engine
from device.errors import BundleError
from device.observation_file import run_observation
from fixtures.tiny_bundle import FRONT, STATE, expected, network, observed, write_tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_tiny_bundle(tmp_path / "tiny")


def refusal_of(path: Path, **arrays: np.ndarray) -> str:
    (path / "obs.npz").write_bytes(dump_arrays(arrays))
    with pytest.raises(BundleError) as caught:
        run_observation(path / "tiny", path / "obs.npz", path / "chunk.npz")
    assert not (path / "chunk.npz").exists()
    return str(caught.value)


def test_inference_reads_what_was_written_into_its_inputs(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    for red in (0, 9, 200):
        inputs = observed()
        inputs[FRONT][..., 0] = red
        for name, array in inputs.items():
            engine.inputs[name][...] = array
        np.testing.assert_allclose(engine.infer(), expected(inputs), atol=1e-4)


def test_inference_answers_in_the_same_memory_each_time(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    first = engine.infer()
    assert first.ctypes.data == engine.infer().ctypes.data
    assert (first.shape, first.dtype) == ((4, 6), np.float32)


def test_inputs_have_lerobots_names_and_shapes(bundle: Bundle) -> None:
    found = {name: (array.shape, array.dtype) for name, array in open_engine(bundle).inputs.items()}
    assert found == {STATE: ((6,), np.float32), FRONT: ((96, 96, 3), np.uint8)}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_refused(bundle: Bundle, poison: float) -> None:
    engine = open_engine(bundle)
    engine.inputs[STATE][2] = poison
    with pytest.raises(EngineError, match="NaN or infinity"):
        engine.infer()
    engine.inputs[STATE][2] = 0
    engine.infer()


def test_a_truncated_network_is_refused_with_one_line(tmp_path: Path) -> None:
    damaged = write_tiny_bundle(tmp_path / "cut", model=network()[:-100])
    with pytest.raises(EngineError, match=r"policy\.onnx cannot be loaded") as caught:
        open_engine(damaged)
    assert "\n" not in str(caught.value)


def test_a_network_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    other = write_tiny_bundle(tmp_path / "inputs", state_size=7)
    with pytest.raises(EngineError, match=r"inputs that its manifest names \(observation.state\)"):
        open_engine(other)
    other = write_tiny_bundle(tmp_path / "output", model=network(output="goals"))
    with pytest.raises(EngineError, match=r"does not give action float32 \[4, 6\]"):
        open_engine(other)


def test_behaviour_cloning_is_one_graph_too(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "cloning", family="cloning")
    engine = open_engine(bundle)
    np.testing.assert_allclose(infer_observation(engine, bundle.manifest, observed()), expected(observed()))


def test_a_key_is_what_the_inputs_were_called_last(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    assert not engine.knows(1)
    engine.observe(1)
    assert engine.knows(1)
    engine.infer([1])
    engine.observe(2)
    assert not engine.knows(1)
    with pytest.raises(EngineError, match=r"another step than \[1\]; observe that one first"):
        engine.infer([1])


def test_a_policy_that_does_not_sample_takes_no_noise(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="does not sample"):
        open_engine(bundle).infer(noise=np.zeros((4, 6), np.float32))


def test_an_observation_file_becomes_a_chunk_file(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "obs.npz").write_bytes(dump_arrays(observed()))
    actions = run_observation(bundle.path, tmp_path / "obs.npz", tmp_path / "chunk.npz")
    np.testing.assert_allclose(actions, expected(observed()), atol=1e-4)
    written = load_arrays(tmp_path / "chunk.npz")
    assert list(written) == ["action"]
    np.testing.assert_array_equal(written["action"], actions)


def test_each_way_to_get_an_observation_wrong_has_its_sentence(bundle: Bundle, tmp_path: Path) -> None:
    state, frame = observed().values()
    both = f"the policy takes {STATE}, {FRONT}"
    assert f"{FRONT} is missing; {both}" in refusal_of(tmp_path, **{STATE: state})
    surplus = {STATE: state, FRONT: frame, "observation.images.rear": frame}
    assert "observation.images.rear is nothing that the policy takes" in refusal_of(tmp_path, **surplus)
    wide = {STATE: state.astype(np.float64), FRONT: frame}
    assert f"{STATE} should be float32 [6], found float64 [6]" in refusal_of(tmp_path, **wide)
    batched = {STATE: state, FRONT: frame[None]}
    assert f"{FRONT} should be uint8 [96, 96, 3], found uint8 [1, 96, 96, 3]" in refusal_of(tmp_path, **batched)
    noisy = {STATE: state, FRONT: frame, "noise": np.zeros((4, 6), np.float32)}
    assert "noise is nothing that the policy takes" in refusal_of(tmp_path, **noisy)
    unknown = {STATE: np.full(6, np.nan, np.float32), FRONT: frame}
    assert f"{STATE} holds NaN or infinity" in refusal_of(tmp_path, **unknown)


def test_a_person_can_read_what_a_bundle_is(bundle: Bundle) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(describe(bundle.manifest))
    for text in ("shoulder_pan  degrees", "front  96x96", "4 actions at 30 Hz", "ensemble (m = 0.01)"):
        assert text in capture.get()


@pytest.mark.parametrize("fault", ["schema", "hash", "cut", "pickle"])
def test_the_command_says_one_line_and_fails(
    fault: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, observation = bundle.path, tmp_path / "obs.npz"
    observation.write_bytes(dump_arrays(observed()))
    if fault == "schema":
        manifest = path / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 9}))
    elif fault == "hash":
        (path / "policy.onnx").write_bytes(b"")
    elif fault == "cut":
        path = write_tiny_bundle(tmp_path / "cut", model=network()[:-100]).path
    else:
        np.savez(observation, **{STATE: np.array([print], dtype=object)})
    command = ["understudy", "bundle", "run", str(path)]
    monkeypatch.setattr("sys.argv", [*command, "--observation", str(observation), "--out", str(tmp_path / "chunk.npz")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "chunk.npz").exists()
