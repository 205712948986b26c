"""Export of diffusion policies: numbers equal to LeRobot's in every variant, samplers as chosen, refusals with a
reason."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="export needs the export extra")

import torch

from conftest import Parity
from device.bundle import Bundle
from device.engine import infer_observation, open_engine
from export.bundling import export_checkpoint
from export.checkpoint import Told
from export.diffusion.lerobot import read_diffusion
from export.diffusion.policy import DiffusionPolicy
from export.diffusion.samplers import ConsistencySamplers
from export.diffusion.unet import UNet, expected_weights, time_embedding, unet
from export.errors import ExportError
from export.families import read_policy
from export.networks.framing import Framing, frame, resizing
from export.networks.operations import TorchOperations
from export.readers.lerobot import read_checkpoint
from export.sampling import FAST, Sampling
from fixtures.checkpoint_files import (
    change_json,
    change_tensors,
    diffusion_tensor_shapes,
    write_checkpoint,
    write_json,
)
from fixtures.recipe_diffusion import DRAWN_FOR, LEGACY, VARIANTS, noise, observations, weight

FIXTURES = Path(__file__).parent / "fixtures"
CURRENT = np.load(FIXTURES / "diffusion_lerobot_0_4_4.npz")
BEFORE_0_4 = np.load(FIXTURES / "diffusion_lerobot_0_3_3.npz")
TOLERANCE = 1e-3  # joint units
SMALL = "no_camera_one_level"  # 300 kB of weights
SEEING = "shared_encoder_crop_ddpm_100"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small networks on busy cores: threads that wait for each other cost ten times what they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def small(scratch: Path) -> Path:
    return write_checkpoint(scratch / "small", VARIANTS[SMALL])


@pytest.fixture(scope="module")
def shared_seeing() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_checkpoint(Path(folder), VARIANTS[SEEING])


@pytest.fixture
def seeing(shared_seeing: Path, scratch: Path) -> Path:
    """A copy of a checkpoint with cameras whose weights are a link, so that tests can change the rest."""
    folder = scratch / "seeing"
    shutil.copytree(shared_seeing, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "model.safetensors").symlink_to(shared_seeing / "model.safetensors")
    return folder


def seen(variant: str) -> dict[str, np.ndarray]:
    """The recipe's observations and noise, as bundles take them."""
    config = VARIANTS[variant]
    raw = observations(config)
    return {name: array if config["n_obs_steps"] > 1 else array[0] for name, array in raw.items()} | noise(config)


def run(path: Path, variant: str) -> np.ndarray:
    bundle = Bundle.open(path)
    inputs = seen(variant)
    if not bundle.manifest.sampler.draws_noise:
        del inputs["step_noise"]
    return infer_observation(open_engine(bundle), bundle.manifest, inputs).copy()


def understood(path: Path, sampling: Sampling | None = None) -> DiffusionPolicy:
    policy = read_policy(path, Told(), sampling or Sampling())[1]
    assert isinstance(policy, DiffusionPolicy)
    return policy


def refusal(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export_checkpoint(checkpoint, checkpoint.parent / "refused", **options)
    return str(caught.value)


# What LeRobot computes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_actions_that_lerobot_gives(variant: str, scratch: Path, parity: Parity) -> None:
    report = export_checkpoint(write_checkpoint(scratch / "checkpoint", VARIANTS[variant]), scratch / "bundle")
    assert report.family == "diffusion"
    assert report.nodes < 750
    action = run(report.path, variant)
    assert action.shape == CURRENT[f"{variant}/action"].shape
    assert parity("Diffusion", "LeRobot 0.4.4", variant, action - CURRENT[f"{variant}/action"]) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_network_is_told_and_answers_is_what_it_is_in_lerobot(variant: str, scratch: Path) -> None:
    policy = understood(write_checkpoint(scratch / "checkpoint", VARIANTS[variant]))
    condition = torch.from_numpy(CURRENT[f"{variant}/condition"])[None]
    timestep = torch.tensor([min(DRAWN_FOR, VARIANTS[variant]["num_train_timesteps"] - 1)])
    sample = torch.from_numpy(noise(VARIANTS[variant])["noise"])[None]
    with torch.inference_mode():
        told = policy.condition(seen(variant))
        embedded = time_embedding(policy.weights, policy.unet, timestep)
        answer = unet(TorchOperations(policy.weights, {}), policy.unet, sample, embedded, condition)
    assert (told - condition).abs().max() < 2e-5, "features are up to 35"
    assert np.abs(answer[0].numpy() - CURRENT[f"{variant}/network"]).max() < 5e-6


@pytest.mark.parametrize("variant", LEGACY)
def test_checkpoints_from_before_0_4_give_the_actions_that_lerobot_0_3_3_gives(
    variant: str, scratch: Path, parity: Parity
) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", VARIANTS[variant], legacy=True)
    report = export_checkpoint(checkpoint, scratch / "bundle")
    difference = run(report.path, variant) - BEFORE_0_4[f"{variant}/action"]
    assert parity("Diffusion", "LeRobot 0.3.3", variant, difference) < TOLERANCE
    assert "before 0.4" in Bundle.open(report.path).manifest.provenance.source_layout


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tensors_that_are_expected_are_the_tensors_that_lerobot_saves(variant: str) -> None:
    listed = sorted((name, list(shape)) for name, shape in diffusion_tensor_shapes(VARIANTS[variant]).items())
    assert hashlib.sha256(json.dumps(listed).encode()).hexdigest() == str(CURRENT[f"{variant}/keys"])


def test_names_that_torch_compile_changed_are_understood(small: Path, scratch: Path) -> None:
    name = "unet.final_conv.1.bias"
    change_tensors(small / "model.safetensors", **{f"diffusion.{name}": None})
    compiled = {"diffusion.unet._orig_mod.final_conv.1.bias": weight(f"diffusion.{name}", (6,))}
    change_tensors(small / "model.safetensors", **compiled)
    report = export_checkpoint(small, scratch / "bundle")
    assert np.abs(run(report.path, SMALL) - CURRENT[f"{SMALL}/action"]).max() < TOLERANCE


def test_a_chunk_that_the_horizon_cuts_is_said(scratch: Path) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", VARIANTS["chunk_longer_than_the_horizon"])
    report = export_checkpoint(checkpoint, scratch / "bundle")
    assert any("the chunk has 15" in warning for warning in report.warnings)
    assert Bundle.open(report.path).manifest.chunk_size == 15


def test_half_precision_storage_halves_the_files(seeing: Path, scratch: Path) -> None:
    whole = export_checkpoint(seeing, scratch / "whole")
    half = export_checkpoint(seeing, scratch / "half", weights="fp16")
    sizes = [(report.path / "encoder.onnx").stat().st_size for report in (whole, half)]
    assert sizes[1] < 0.52 * sizes[0]
    assert half.max_error < TOLERANCE, "against PyTorch with the rounded weights"
    assert half.max_rounding_error > 0


# What a bundle says


def test_the_manifest_says_how_the_policy_samples(seeing: Path, scratch: Path) -> None:
    manifest = Bundle.open(export_checkpoint(seeing, scratch / "bundle", rate_hz=25).path).manifest
    assert (manifest.family, manifest.chunk_size, manifest.observation_steps) == ("diffusion", 8, 2)
    assert manifest.handoff.method == "crossfade"
    assert [camera.name for camera in manifest.cameras] == ["front", "wrist_left"]
    sampler = manifest.sampler
    assert sampler is not None
    assert (sampler.solver, sampler.steps, sampler.spacing) == ("ddpm", 100, "leading")
    assert (sampler.horizon, sampler.first_action, sampler.draws_noise, sampler.distilled) == (16, 1, True, False)


def test_golden_inputs_carry_the_noise_and_the_engine_gives_their_action(seeing: Path, scratch: Path) -> None:
    bundle = Bundle.open(export_checkpoint(seeing, scratch / "bundle").path)
    inputs, action = bundle.golden()
    assert inputs["noise"].shape == (16, 6)
    assert inputs["step_noise"].shape == (100, 16, 6)
    assert inputs["observation.images.front"].shape == (2, 64, 96, 3)
    engine = open_engine(bundle)
    assert np.abs(infer_observation(engine, bundle.manifest, inputs) - action).max() < TOLERANCE
    other = infer_observation(engine, bundle.manifest, inputs | {"step_noise": -inputs["step_noise"]})
    assert np.abs(other - action).max() > 1, "other noise, other actions"


# Averaged weights


def test_averaged_weights_beside_a_policy_are_preferred_and_said(scratch: Path) -> None:
    step = scratch / "checkpoints" / "last"
    plain = write_checkpoint(step / "pretrained_model", VARIANTS[SMALL])
    averaged = write_checkpoint(step / "pretrained_model_ema", VARIANTS[SMALL])
    change_tensors(averaged / "model.safetensors", **{"diffusion.unet.final_conv.1.bias": np.full(6, 0.5, np.float32)})
    found, warnings = understood(plain), read_checkpoint(plain).warnings
    assert found.weights["unet.final_conv.1.bias"].max() == 0.5
    assert any("pretrained_model_ema, the moving average" in warning for warning in warnings)
    assert understood(averaged).weights["unet.final_conv.1.bias"].max() == 0.5
    assert read_checkpoint(step).path == averaged
    exactly = read_checkpoint(plain / "config.json")
    assert exactly.path == plain, "a file's path means this folder and no other"


# Samplers


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (FAST, ("ddim", 10, "leading")),
        (Sampling(steps=5), ("ddim", 5, "leading")),
        (Sampling(solver="ddpm"), ("ddpm", 10, "leading")),
        (Sampling(solver="ddim", steps=8, spacing="trailing"), ("ddim", 8, "trailing")),
        (Sampling(solver="dpmpp", steps=6), ("dpmpp", 6, "linspace")),
        (Sampling(steps=2, force=True), ("ddim", 2, "leading")),
    ],
)
def test_a_chosen_sampler_goes_into_the_bundle(
    sampling: Sampling, expected: tuple[str, int, str], small: Path, scratch: Path
) -> None:
    report = export_checkpoint(small, scratch / "bundle", sampling=sampling)
    bundle = Bundle.open(report.path)
    sampler = bundle.manifest.sampler
    assert sampler is not None
    assert (sampler.solver, sampler.steps, sampler.spacing) == expected
    assert report.max_error < TOLERANCE
    table = bundle.sampler_table()
    assert table.time.shape == (expected[1], VARIANTS[SMALL]["diffusion_step_embed_dim"])
    assert np.isclose(table.timesteps[0], understood(small, sampling).table.times[0])


def test_without_a_choice_a_policy_samples_as_its_configuration_says(small: Path) -> None:
    policy = understood(small)
    again = policy.with_sampling(FAST).with_sampling(Sampling())
    assert np.array_equal(again.table.coefficients, policy.table.coefficients)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(steps=3), "--force"),
        (Sampling(steps=101), "expected 1 to 100"),
        (Sampling(solver="ddpm", steps=0), "steps: 0 steps"),
        (Sampling(chain=3), "chaining is Consistency Policy's"),
    ],
)
def test_samplers_that_the_policy_cannot_have_are_refused(sampling: Sampling, expected: str, small: Path) -> None:
    assert expected in refusal(small, sampling=sampling)


def test_a_students_own_sampler_is_used_and_no_other(small: Path, scratch: Path) -> None:
    teacher = understood(small)
    samplers = ConsistencySamplers(schedule=teacher.samplers.schedule, timesteps=(99, 40))  # type: ignore[attr-defined]
    write_json(small / "sampler.json", samplers.document())
    report = export_checkpoint(small, scratch / "bundle")
    manifest = Bundle.open(report.path).manifest
    assert manifest.sampler is not None
    assert (manifest.sampler.solver, manifest.sampler.steps, manifest.sampler.distilled) == ("consistency", 2, True)
    assert manifest.sampler.draws_noise
    assert "sampler.json" in manifest.provenance.source_files
    assert understood(small).samplers == samplers
    assert "distilled to 2 steps" in refusal(small, sampling=FAST)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"solver": "magic", "timesteps": [99]}, "solver: 'magic' is not supported"),
        ({"solver": "consistency"}, "timesteps is missing"),
        ({"solver": "consistency", "timesteps": [99.5]}, "[99.5] is no list of integers"),
        ({"solver": "consistency", "timesteps": [50, 99]}, "each below the one before"),
        ({"solver": "consistency", "timesteps": [99], "sigma": 1}, "sigma is unknown"),
    ],
)
def test_a_students_sampler_that_is_none_is_refused(document: dict[str, Any], expected: str, small: Path) -> None:
    write_json(small / "sampler.json", document)
    assert expected in refusal(small)


# The networks as others use them


def test_a_batch_is_its_members_one_by_one_and_gradients_reach_every_weight(small: Path) -> None:
    policy = understood(small)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in policy.weights.items()}
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 10, 6, generator=generator)
    condition = torch.randn(3, policy.unet.condition_size, generator=generator)
    ops, times = TorchOperations(weights, {}), torch.tensor([3, 50, 99])
    together = unet(ops, policy.unet, sample, time_embedding(weights, policy.unet, times), condition)
    for index in range(3):
        one = slice(index, index + 1)
        embedded = time_embedding(weights, policy.unet, times[one])
        alone = unet(ops, policy.unet, sample[one], embedded, condition[one])
        assert (alone[0] - together[index]).abs().max() < 1e-5
    together.square().mean().backward()
    assert [name for name, tensor in weights.items() if tensor.grad is None or not tensor.grad.any()] == []


def test_a_network_that_is_told_two_times_takes_both() -> None:
    sizes = {"action_size": 2, "condition_size": 5, "embedding_size": 8, "down_dims": (16, 32), "groups": 4}
    net = UNet(**sizes, kernel_size=3, film_scale=True, times=2)  # type: ignore[arg-type]
    weights = {name: torch.from_numpy(weight(name, shape)) for name, shape in expected_weights(net).items()}
    embedded = time_embedding(weights, net, torch.tensor([[1095.5, -978.0], [600.0, -978.0]]))
    assert embedded.shape == (2, 16)
    assert torch.equal(embedded[0, 8:], embedded[1, 8:])
    answer = unet(TorchOperations(weights, {}), net, torch.zeros(2, 8, 2), embedded, torch.zeros(2, 5))
    assert (answer[0] - answer[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("before", "after"), [((480, 640), (224, 224)), ((48, 64), (56, 80)), ((31, 40), (31, 20))])
def test_resizing_is_that_of_torch(before: tuple[int, int], after: tuple[int, int]) -> None:
    picture = torch.rand(2, 3, *before, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(picture, size=after, mode="bilinear", antialias=True)
    ours = frame(TorchOperations({}, {}), Framing(resize=after), before, picture)
    assert (ours - expected).abs().max() < 1e-6
    assert np.allclose(resizing(before[0], after[0]).sum(axis=1), 1)


# What is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vision_backbone": "vgg16"}, "vision_backbone 'vgg16' is not supported"),
        ({"noise_scheduler_type": "EDM"}, "noise_scheduler_type 'EDM' is not supported; supported are DDPM, DDIM"),
        ({"prediction_type": "velocity"}, "prediction_type 'velocity' is not supported; supported are epsilon, sample"),
        ({"beta_schedule": "steep"}, "beta_schedule: 'steep' is not supported"),
        ({"crop_shape": [65, 96]}, "a crop of 65x96 px does not fit into pictures of 64x96"),
        ({"noise_scheduler_type": []}, "noise_scheduler_type [] is not supported"),
        ({"crop_shape": 56}, "crop_shape should be a list of positive integers, found 56"),
        ({"resize_shape": [64, 64], "crop_ratio": 1.5}, "crop_ratio should be above 0 and at most 1"),
        ({"horizon": 15}, "horizon 15 does not divide by 2"),
        ({"kernel_size": 4}, "kernel_size 4: an even one"),
        ({"n_groups": 7}, "expected widths that divide by n_groups 7"),
        ({"use_group_norm": 1}, "use_group_norm should be true or false, found 1"),
        ({"n_obs_steps": 40}, "a horizon of 16 ends before n_obs_steps 40"),
    ],
)
def test_configurations_that_lerobot_does_not_have_are_named(
    changes: dict[str, object], expected: str, seeing: Path
) -> None:
    change_json(seeing / "config.json", **changes)
    if "n_obs_steps" in changes:
        (seeing / "model.safetensors").unlink()
        write_checkpoint(seeing, VARIANTS[SEEING] | changes)
    assert expected in refusal(seeing)


def test_a_field_that_has_had_several_defaults_is_never_assumed(small: Path) -> None:
    document = json.loads((small / "config.json").read_text())
    del document["use_group_norm"]
    write_json(small / "config.json", document)
    assert "use_group_norm is missing, and its default has changed" in refusal(small)


def test_cameras_of_two_sizes_are_refused_as_in_lerobot(seeing: Path) -> None:
    document = json.loads((seeing / "config.json").read_text())
    document["input_features"]["observation.images.wrist_left"]["shape"] = [3, 48, 64]
    write_json(seeing / "config.json", document)
    assert "needs cameras of one size, found observation.images.front 64x96" in refusal(seeing)


def test_a_key_that_no_diffusion_policy_reads_is_a_warning(small: Path) -> None:
    change_json(small / "config.json", brand_new_option=1, policy_action_contract="libero", gradient_checkpointing=True)
    checkpoint = read_checkpoint(small)
    read_diffusion(checkpoint, Sampling())
    assert [warning for warning in checkpoint.warnings if "ignored" in warning] == [
        f"{small / 'config.json'}: ignored brand_new_option, which no known diffusion policy reads"
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"diffusion.unet.final_conv.1.bias": None}, "diffusion.unet.final_conv.1.bias is missing"),
        ({"diffusion.surprise": np.zeros(3, np.float32)}, "diffusion.surprise is unknown"),
        ({"diffusion.unet.final_conv.1.bias": np.zeros(7, np.float32)}, "should have shape [6], found [7]"),
        ({"diffusion.unet.final_conv.1.bias": np.full(6, np.nan, np.float32)}, "final_conv.1.bias holds NaN"),
    ],
)
def test_every_tensor_is_accounted_for(changes: dict[str, np.ndarray | None], expected: str, small: Path) -> None:
    change_tensors(small / "model.safetensors", **changes)
    assert expected in refusal(small)


def test_a_keypoint_grid_that_is_another_is_refused(scratch: Path) -> None:
    checkpoint = write_checkpoint(scratch / "checkpoint", VARIANTS["legacy"])
    other = {"diffusion.rgb_encoder.pool.pos_grid": np.zeros((4, 2), np.float32)}
    change_tensors(checkpoint / "model.safetensors", **other)
    assert "pool.pos_grid is not the grid from -1 to 1 of a map of 2x2 cells" in refusal(checkpoint)
