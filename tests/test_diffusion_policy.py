"""Export of Diffusion Policy's own checkpoints: a bundle's numbers are those of the published networks written again in
plain PyTorch, for the same noise, and nothing in a checkpoint is run or passed over."""

from __future__ import annotations

import hashlib
import json
import os
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
from export.bundling import ExportReport, export_checkpoint
from export.checkpoint import Told
from export.errors import ExportError
from export.families import read_policy
from export.readers.diffusion_policy import find_payload, read_payload
from export.readers.hydra_config import Section, Unresolved, arithmetic, resolve
from export.sampling import Sampling
from firmware_bridge.calibration import Unit
from fixtures.diffusion_policy_files import PAYLOADS, Json, hybrid, scheduler, several_images, vectors, write_payload
from fixtures.diffusion_policy_models import HybridEncoder, ResNet, centre
from fixtures.diffusion_policy_originals import Policy, as_the_robot_gives_it, drawn, fill, observations
from fixtures.recipe import uniform

FIXTURES = Path(__file__).parent / "fixtures"
ROBOMIMIC = np.load(FIXTURES / "robomimic_0_2_0.npz")
RECORDED = FIXTURES / "diffusion_policy_vectors.ckpt"
TOLERANCE = 1e-3  # joint units
TOLD = Told(rate_hz=10)


def rgb(height: int, width: int) -> Json:
    return {"shape": [3, height, width], "type": "rgb"}


def resnet(name: str) -> Json:
    return {
        "_target_": "diffusion_policy.model.vision.model_getter.get_resnet",
        "name": name,
        "weights": "IMAGENET1K_V1",
    }


# Vectors between pictures, and in an order that sorting changes.
OBS = {"pose": {"shape": [2]}, "front": rgb(72, 96), "wrist": rgb(72, 96), "grip": {"shape": [3], "type": "low_dim"}}
# Betas that leave so much of the data that clipping does not hide what the network says.
LINEAR, LINEAR_DDPM = scheduler(beta_schedule="linear"), scheduler("DDPM", beta_schedule="linear")
VECTORS: dict[str, Json] = {
    "vectors": vectors(5, 6, noise_scheduler=LINEAR),
    "vectors_ddpm": vectors(5, 6, noise_scheduler=LINEAR_DDPM, num_inference_steps=None),
    "vectors_cosine_betas": vectors(5, 6, n_obs_steps=3, noise_scheduler=scheduler("DDPM"), num_inference_steps=40),
    "vectors_beside_the_action_before": vectors(
        5, 6, n_action_steps=2, oa_step_convention=False, noise_scheduler=LINEAR | {"set_alpha_to_one": False}
    ),
    "vectors_no_more_than_is_executed": vectors(
        5,
        6,
        pred_action_steps_only=True,
        noise_scheduler=scheduler(clip_sample=False, prediction_type="sample", steps_offset=1),
    ),
    "vectors_film_shifts_only": vectors(
        5, 6, {"cond_predict_scale": False, "kernel_size": 5, "down_dims": [8, 16, 24]}, noise_scheduler=LINEAR
    ),
}  # fmt: skip
PICTURES: dict[str, Json] = {
    "hybrid": hybrid(OBS, noise_scheduler=LINEAR),
    "hybrid_of_two_sizes": hybrid(
        {"pose": {"shape": [6]}, "front": rgb(64, 96), "wrist": rgb(96, 64)}, crop_shape=None, noise_scheduler=LINEAR
    ),
    "hybrid_batch_norm": hybrid(
        {"front": rgb(72, 97), "pose": {"shape": [5]}},
        obs_encoder_group_norm=False,
        eval_fixed_crop=False,
        cond_predict_scale=False,
        noise_scheduler=LINEAR_DDPM,
        num_inference_steps=None,
    ),
    "several_images": several_images(OBS, {"resize_shape": [60, 80], "crop_shape": [54, 71]}, noise_scheduler=LINEAR),
    "several_images_shared": several_images(
        OBS,
        {"share_rgb_model": True, "imagenet_norm": False},
        noise_scheduler=LINEAR_DDPM,
        num_inference_steps=40,
    ),
    "several_images_each_its_own": several_images(
        OBS,
        {
            "rgb_model": {"wrist": resnet("resnet18"), "front": resnet("resnet34")},
            "crop_shape": {"front": [64, 64], "wrist": [40, 81]},
            "use_group_norm": False,
            "random_crop": False,
        },
        noise_scheduler=LINEAR,
    ),
}
TEMPERATURE = {"hybrid_batch_norm": 0.5}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary folder that goes at once: checkpoints are large, and pytest keeps its own for days."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def original(config: Json, temperature: float = 1.0) -> Policy:
    return Policy(resolve(config, "policy"), temperature)


def save(folder: Path, config: Json, state: dict[str, Any] | None = None, **states: Any) -> Path:
    """A checkpoint of vectors, or of `state`, under a name as DP's topk gives them."""
    return write_payload(
        folder / "epoch=0100-train_loss=0.003.ckpt",
        config,
        original(config).state_dict() if state is None else state,
        **states,
    )


def export(checkpoint: Path, out: Path, **options: Any) -> ExportReport:
    return export_checkpoint(checkpoint, out, rate_hz=10, **options)


def difference(policy: Policy, report: ExportReport) -> float:
    """Largest difference of the bundle in its engine from the original, joint units, for the same noise."""
    bundle = Bundle.open(report.path)
    sampler = bundle.manifest.sampler
    assert sampler is not None
    noise = drawn("noise", sampler.horizon, 6)
    step_noise = drawn("step_noise", sampler.steps, sampler.horizon, 6) if sampler.draws_noise else None
    seen = observations(policy, bundle.manifest.observation_steps)
    given = as_the_robot_gives_it(policy, seen) | {"noise": noise}
    if step_noise is not None:
        given["step_noise"] = step_noise
    action = infer_observation(open_engine(bundle), bundle.manifest, given)
    expected = policy.predict(seen, noise, step_noise)
    assert action.shape == expected.shape
    assert expected.std() > 5, "actions that hardly move would hide an error"
    return float(np.abs(action - expected).max())


def refusal(checkpoint: Path, sampling: Sampling | None = None) -> str:
    with pytest.raises(ExportError) as caught:
        read_policy(checkpoint, TOLD, sampling or Sampling())
    return str(caught.value)


# What the originals compute


@pytest.mark.parametrize("case", ["hybrid", "hybrid_batch_norm_temperature"])
def test_the_encoder_written_again_sees_what_robomimic_sees(case: str) -> None:
    temperature, group_norm = (0.5, False) if "temperature" in case else (1.0, True)
    obs = {"eef": {"shape": [2]}, "front": rgb(72, 97), "grip": {"shape": [3]}, "wrist": rgb(72, 97)}
    holder = torch.nn.Module()
    holder.obs_encoder = HybridEncoder(obs, (61, 76), group_norm, temperature)
    fill(holder)
    assert _keys(holder) == str(ROBOMIMIC[f"{case}/keys"])
    seen = {key: torch.from_numpy(uniform(f"{key}.seen", (2, *entry["shape"]))) for key, entry in obs.items()}
    with torch.inference_mode():
        found = holder.eval().obs_encoder(seen).numpy()
    assert np.abs(found - ROBOMIMIC[f"{case}/features"]).max() < 1e-5


def test_the_resnet_written_again_is_torchvisions_and_so_is_what_it_is_shown() -> None:
    holder = torch.nn.Module()
    holder.net = ResNet((3, 4, 6, 3))
    fill(holder)
    assert _keys(holder) == str(ROBOMIMIC["resnet34/keys"])
    x = torch.from_numpy(uniform("front.seen", (2, 3, 72, 97)))
    x = centre(torch.nn.functional.interpolate(x, (60, 70), mode="bilinear"), (51, 63))
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        found = holder.eval().net((x - mean) / std).numpy()
    assert np.abs(found - ROBOMIMIC["resnet34/features"]).max() < 1e-4


def _keys(module: Any) -> str:
    listed = sorted((name, list(tensor.shape)) for name, tensor in module.state_dict().items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@pytest.mark.parametrize("variant", [*VECTORS, *PICTURES])
def test_every_variant_gives_the_actions_of_the_original(variant: str, scratch: Path, parity: Parity) -> None:
    config = (VECTORS | PICTURES)[variant]
    policy = original(config, TEMPERATURE.get(variant, 1.0))
    report = export(save(scratch, config, policy.state_dict()), scratch / "bundle")
    assert report.max_error < TOLERANCE
    found = difference(policy, report)
    assert parity("Diffusion Policy, the original", "its network written anew", variant, found) < TOLERANCE


def test_a_checkpoint_that_dill_and_omegaconf_wrote_gives_the_actions_of_the_original(scratch: Path) -> None:
    policy = original(PAYLOADS["diffusion_policy_vectors"])
    assert difference(policy, export(RECORDED, scratch / "bundle")) < TOLERANCE


def test_the_checkpoints_of_these_tests_are_like_those_of_dill_and_omegaconf(scratch: Path) -> None:
    ours, theirs = read_payload(save(scratch, PAYLOADS["diffusion_policy_vectors"]), TOLD), read_payload(RECORDED, TOLD)
    assert ours.config == theirs.config
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(tensor, theirs.weights[name]) for name, tensor in ours.weights.items())


# What a bundle says


def test_the_bundle_says_what_the_policy_is(scratch: Path) -> None:
    config = hybrid({"b": {"shape": [2]}, "a": {"shape": [4]}}, noise_scheduler=LINEAR)
    report = export(save(scratch, config), scratch / "bundle")
    manifest = Bundle.open(report.path).manifest
    sampler = manifest.sampler
    assert sampler is not None
    assert (manifest.family, manifest.observation_steps, manifest.state_size, manifest.chunk_size) == (
        "diffusion", 2, 6, 4,
    )  # fmt: skip
    assert (sampler.solver, sampler.steps, sampler.horizon, sampler.first_action) == ("ddim", 8, 8, 1)
    assert (manifest.action_rate_hz, manifest.provenance.dataset) == (10, "data/pusht_real")
    assert manifest.provenance.policy_type == "diffusion_policy"
    assert report.warnings == ("observation.state is b [2], a [4], one behind the other",)


def test_several_images_sort_their_keys(scratch: Path) -> None:
    config = several_images({"b": {"shape": [2]}, "z": rgb(32, 32), "a": {"shape": [4]}, "y": rgb(48, 32)}, {})
    source, policy = read_policy(save(scratch, config), TOLD, Sampling())
    assert "observation.state is a [4], b [2], one behind the other" in source.warnings
    assert policy.inputs.images == (("observation.images.y", 48, 32), ("observation.images.z", 32, 32))


def test_another_solver_and_fewer_steps_can_be_chosen(scratch: Path) -> None:
    checkpoint = save(scratch, VECTORS["vectors"])
    _, policy = read_policy(checkpoint, TOLD, Sampling(solver="dpmpp", steps=5))
    assert policy.sampler is not None
    assert (policy.sampler.solver, policy.sampler.steps, policy.sampler.distilled) == ("dpmpp", 5, False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hybrid({"p": {"shape": [6]}, "c": rgb(72, 96)}, eval_fixed_crop=False), "the bundle crops from the middle"),
        (several_images({"p": {"shape": [6]}, "c": rgb(72, 96)}, {"resize_shape": [36, 48]}), "without antialiasing"),
        (vectors(5, 6, noise_scheduler=LINEAR_DDPM, num_inference_steps=10), "10 of 40 steps of DDPM"),
        (vectors(5, 6, n_action_steps=8), "n_action_steps 8 does not fit into the horizon; the chunk has 7"),
    ],
)
def test_what_differs_from_the_original_is_a_warning(config: Json, expected: str, scratch: Path) -> None:
    source, _ = read_policy(save(scratch, config), TOLD, Sampling())
    assert any(expected in warning for warning in source.warnings)


def test_a_rate_that_nobody_said_is_a_warning(scratch: Path) -> None:
    source, _ = read_policy(save(scratch, VECTORS["vectors"]), Told(), Sampling())
    assert "say it with --rate if" in source.warnings[0]


def test_the_latest_checkpoint_of_a_run_is_found(scratch: Path) -> None:
    run = scratch / "run"
    (run / "checkpoints").mkdir(parents=True)
    save(run / "checkpoints", VECTORS["vectors"]).rename(run / "checkpoints" / "latest.ckpt")
    for given in (run, run / "checkpoints"):
        source, _ = read_policy(given, TOLD, Sampling())
        assert source.path == run / "checkpoints" / "latest.ckpt"
        assert "using" in source.warnings[0]
    assert find_payload(scratch) is None


def test_the_model_itself_is_taken_where_training_kept_no_average(scratch: Path) -> None:
    config = VECTORS["vectors"] | {"training": {"use_ema": False}}
    state = original(config).state_dict()
    report = export(save(scratch, config, state, model=state, ema_model=None), scratch / "bundle")
    assert difference(original(config), report) < TOLERANCE


# What is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_target_": "a.DiffusionTransformerLowdimPolicy"}, "DiffusionTransformerLowdimPolicy is not supported"),
        ({"_target_": "a.KarrasUnetHybridImagePolicy"}, "teacher is not supported: export its student"),
        ({"obs_as_global_cond": False}, "conditioned in another way"),
        ({"obs_as_local_cond": True}, "conditioned in another way"),
        ({"eta": 0.5}, "cfg.policy.eta is not supported"),
        ({"n_obs_steps": "2"}, "cfg.policy.n_obs_steps should be a positive integer, at most 65536, found '2'"),
        ({"n_action_steps": "${missing}"}, "is '${missing}', which names nothing in the configuration"),
        ({"n_action_steps": "${eval:'len(range(3))'}"}, "more than arithmetic of integers, and is not run"),
        ({"horizon": 7}, "horizon 7 does not divide by 2"),
        ({"horizon": 2, "n_obs_steps": 3}, "ends before the chunk's first action"),
        ({"noise_scheduler": LINEAR | {"_target_": "EulerDiscreteScheduler"}}, "EulerDiscreteScheduler is not"),
        ({"noise_scheduler": LINEAR | {"thresholding": True}}, "noise_scheduler.thresholding is not supported"),
        ({"noise_scheduler": LINEAR | {"prediction_type": "flow"}}, "prediction_type: 'flow' is not supported"),
        ({"noise_scheduler": LINEAR | {"num_train_timesteps": 0}}, "num_train_timesteps should be a positive integer"),
        ({"noise_scheduler": None}, "noise_scheduler should be a group of values"),
        ({"num_inference_steps": 41}, "expected 1 to 40"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_exported_are_named(changes: Json, expected: str, scratch: Path) -> None:
    config = VECTORS["vectors"]
    checkpoint = save(scratch, config | {"policy": config["policy"] | changes}, original(config).state_dict())
    assert expected in refusal(checkpoint)


POSE, SMALL = {"p": {"shape": [6]}}, {"p": {"shape": [6]}, "c": rgb(32, 32)}
DEPTH = {"shape": [1, 72, 96], "type": "depth"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (hybrid({"c": rgb(72, 96)}), "has no low_dim key"),
        (hybrid(POSE | {"d": DEPTH}), "type 'depth' of shape [1, 72, 96] is not supported"),
        (hybrid(SMALL), "crop_shape: c: a crop of 60x76 px does not fit into pictures of 32x32"),
        (hybrid(POSE, down_dims=[12]), "down_dims [12]: expected widths that divide by n_groups 8"),
        (several_images(SMALL, {"rgb_model": resnet("resnet18") | {"weights": "r3m"}}), "not R3M's"),
        (several_images(SMALL, {"rgb_model": {"_target_": "timm.create_model"}}), "create_model of None"),
        (several_images(SMALL, {"_target_": "a.TimmObsEncoder"}), "TimmObsEncoder is not supported"),
        (several_images(SMALL, {"feature_aggregation": "mean"}), "feature_aggregation is not supported"),
    ],
)
def test_encoders_that_cannot_be_exported_are_named(config: Json, expected: str, scratch: Path) -> None:
    checkpoint = save(scratch, config, original(VECTORS["vectors"]).state_dict())
    assert expected in refusal(checkpoint)


SCALE, STATE_SCALE = "normalizer.params_dict.action.scale", "normalizer.params_dict.obs.scale"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.final_conv.1.bias": None}, "model.final_conv.1.bias is missing"),
        ({"model.surprise": torch.zeros(3)}, "model.surprise is unknown"),
        ({"model.final_conv.1.bias": torch.zeros(7)}, "model.final_conv.1.bias should have shape [6], found [7]"),
        ({"model.final_conv.1.bias": torch.full((6,), torch.nan)}, "model.final_conv.1.bias holds NaN or infinity"),
        ({"model._orig_mod.final_conv.1.bias": torch.zeros(6)}, "is there twice, with and without _orig_mod"),
        ({SCALE: None}, f"{SCALE} is missing"),
        ({SCALE: torch.full((6,), torch.nan)}, f"{SCALE} holds NaN or infinity"),
        ({SCALE: torch.tensor([1.0, 0, 1, 1, 1, 1])}, f"{SCALE} is zero in element 1"),
        ({STATE_SCALE: torch.ones(4)}, f"{STATE_SCALE} should hold 5 values, found 4"),
    ],
)
def test_every_tensor_is_accounted_for(changes: dict[str, Any], expected: str, scratch: Path) -> None:
    state = original(VECTORS["vectors"]).state_dict() | changes
    checkpoint = save(
        scratch, VECTORS["vectors"], {name: tensor for name, tensor in state.items() if tensor is not None}
    )
    assert expected in refusal(checkpoint)


def test_an_average_that_is_missing_is_said(scratch: Path) -> None:
    assert "state_dicts.ema_model is missing, found model, optimizer" in refusal(
        save(scratch, VECTORS["vectors"], ema_model=None)
    )


def test_units_that_contradict_the_statistics_are_refused(scratch: Path) -> None:
    checkpoint = save(scratch, VECTORS["vectors"], original(VECTORS["vectors"]).state_dict() | {
        "normalizer.params_dict.action.input_stats.max": torch.full((6,), 130.0)
    })  # fmt: skip
    with pytest.raises(ExportError, match="but range_m100_100 ends at 100"):
        export(checkpoint, scratch / "bundle", units=Unit.range_m100_100)


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def test_code_in_a_checkpoint_is_named_and_not_run(scratch: Path) -> None:
    proof = scratch / "it ran"
    checkpoint = save(scratch, VECTORS["vectors"], optimizer=Hostile(proof))
    assert f"contains code ({os.system.__module__}.system), which is not run" in refusal(checkpoint)
    assert not proof.exists()


def test_damaged_checkpoints_are_named(scratch: Path) -> None:
    checkpoint = save(scratch, VECTORS["vectors"])
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "cut off or damaged" in refusal(checkpoint)
    checkpoint.write_bytes(whole.replace(b"state_dicts", b"state_dictz"))
    assert checkpoint.name in refusal(checkpoint)
    directory = whole.rindex(b"PK\x01\x02")  # the last record of the archive's directory; its flags say UTF-8
    name = directory + 46
    flags = (int.from_bytes(whole[directory + 8 : directory + 10], "little") | 0x800).to_bytes(2, "little")
    changed = whole[: directory + 8] + flags + whole[directory + 10 : name] + b"\xff" + whole[name + 1 :]
    checkpoint.write_bytes(changed)
    assert checkpoint.name in refusal(checkpoint)


# What a configuration's interpolations are


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8+1", 9),
        ("2*(3-1)//3", 1),
        ("-4", -4),
        ("8", 8),
        ("8/2", None),
        ("2**9", None),
        ("True", None),
        ("1//0", None),
        ("x", None),
        ("(lambda: 1)()", None),
        ("__import__('os')", None),
        ("(" * 150 + "1" + ")" * 150, None),
        ("1+" * 300 + "1", None),
        ("", None),
    ],
)
def test_arithmetic_is_of_integers_only(text: str, value: int | None) -> None:
    assert arithmetic(text) == value


def test_interpolations_are_followed_and_never_run() -> None:
    tree = {
        "a": {"b": [3, {"c": "${d}"}], "nothing": None},
        "d": "${e}", "e": 5, "sum": "${eval:'${a.b.0}*${e}'}", "text": "${e}_${d}", "null": "${a.nothing}",
        "round": "${about}", "about": "${round}", "now": "${now:%Y}", "open": "${e", "group": "x${a}",
    }  # fmt: skip
    for key, value in {"a.b": [3, {"c": 5}], "sum": 15, "text": "5_5", "null": None, "x.y": None}.items():
        assert resolve(tree, key) == value
    for key in ("round", "now", "open", "group"):
        assert isinstance(resolve(tree, key), Unresolved)
    with pytest.raises(ExportError, match=r"cfg\.now is '\${now:%Y}', which asks the resolver 'now'"):
        Section({"now": resolve(tree, "now")}, "cfg").given("now")


def test_interpolations_that_unfold_without_end_are_stopped() -> None:
    tree: Json = {f"k{i}": [f"${{k{i + 1}}}"] * 10 for i in range(30)} | {"k30": 1}
    text: Json = {f"k{i}": f"${{k{i + 1}}}" * 10 for i in range(30)} | {"k30": "x"}
    assert "without end" in repr(resolve(tree, "k0"))
    assert isinstance(resolve(text, "k0"), Unresolved)
