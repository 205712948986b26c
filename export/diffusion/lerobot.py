"""A LeRobot checkpoint of type diffusion, understood: its configuration, its weights, and the sampler it asks for.

`read_diffusion` takes what `export.readers.lerobot` read, from LeRobot 0.3.3 to HEAD (August 2026). Defaults have moved
between these (horizon 16 to 64, a crop to none, group norms to ImageNet's batch norms, one encoder to one a camera), so
the configuration is read and never assumed: only fields that came later have a value here for the files from before.
Every tensor is accounted for. A student that `understudy distill` made has a sampler.json beside its configuration.
"""

from __future__ import annotations

from typing import Any

import torch

from device.bundle import file_sha256
from export.checkpoint import Checkpoint, check_weights, integer, read_json
from export.diffusion import encoder, unet
from export.diffusion.encoder import KeypointEncoder
from export.diffusion.policy import DiffusionPolicy
from export.diffusion.samplers import DiffusionSamplers, Samplers, read_student
from export.diffusion.schedule import NoiseSchedule
from export.diffusion.unet import UNet
from export.errors import ExportError
from export.features import Declared, declared
from export.networks import resnet
from export.networks.framing import Framing
from export.sampling import Sampling

PREFIX = "diffusion."  # of every published tensor name
STUDENT = "sampler.json"
STUDENT_RECORD = "distillation.json"  # where a student comes from, and what its gate found
PREDICTIONS = ("epsilon", "sample")  # what LeRobot takes
SOLVERS = {"DDPM": "ddpm", "DDIM": "ddim"}
# Fields that came after LeRobot 0.3.3, and what was done before they came.
LATER = {"resize_shape": None, "crop_ratio": 1.0}

# What LeRobot 0.3.3 to HEAD write into config.json beside what is read here: nothing that inference computes.
# fmt: off
OTHER_KEYS = frozenset({
    "type", "input_features", "output_features", "normalization_mapping", "device", "use_amp", "use_peft",
    "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path", "drop_n_last_frames", "crop_is_random",
    "pretrained_backbone_weights", "gradient_checkpointing", "compile_model", "compile_mode",
    "do_mask_loss_for_padding", "policy_action_contract", "optimizer_lr", "optimizer_betas", "optimizer_eps",
    "optimizer_weight_decay", "scheduler_name", "scheduler_warmup_steps",
})
READ_KEYS = frozenset({
    "n_obs_steps", "horizon", "n_action_steps", "vision_backbone", "resize_shape", "crop_ratio", "crop_shape",
    "use_group_norm", "spatial_softmax_num_keypoints", "use_separate_rgb_encoder_per_camera", "down_dims",
    "kernel_size", "n_groups", "diffusion_step_embed_dim", "use_film_scale_modulation", "noise_scheduler_type",
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample",
    "clip_sample_range", "num_inference_steps",
})
# fmt: on


def read_diffusion(checkpoint: Checkpoint, sampling: Sampling) -> DiffusionPolicy:
    """Check and convert a checkpoint of type diffusion. Raises ExportError."""
    if unknown := sorted(set(checkpoint.config) - READ_KEYS - OTHER_KEYS):
        checkpoint.warnings.append(
            f"{checkpoint.config_path}: ignored {', '.join(unknown)}, which no known diffusion policy reads"
        )
    eyes, net = read_networks(checkpoint)
    samplers = read_samplers(checkpoint)
    horizon, steps = integer(checkpoint, "horizon"), integer(checkpoint, "n_obs_steps")
    expected = expected_weights(eyes, net)
    check_weights(checkpoint, expected)
    weights = {name.removeprefix(PREFIX): checkpoint.weights[name] for name in expected}
    _check_grids(checkpoint, eyes, weights)
    runnable = encoder.runnable(eyes, weights) | {name: weights[name] for name in unet.expected_weights(net)}
    return DiffusionPolicy(
        encoder=eyes,
        unet=net,
        horizon=horizon,
        observation_steps=steps,
        chunk_size=_chunk_size(checkpoint, horizon, steps),
        samplers=samplers,
        table=samplers.table(sampling),
        weights=runnable,
        normalizers=checkpoint.normalizers,
    )


def expected_weights(eyes: KeypointEncoder, net: UNet) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor that LeRobot saves of such a policy."""
    shapes = encoder.expected_weights(eyes) | unet.expected_weights(net)
    return {PREFIX + name: shape for name, shape in shapes.items()}


def read_networks(checkpoint: Checkpoint) -> tuple[KeypointEncoder, UNet]:
    """config.json to what sees and what denoises. Raises ExportError for what LeRobot could not run either."""
    features, where = declared(checkpoint, "Diffusion Policy"), checkpoint.config_path
    eyes = KeypointEncoder(
        state_size=features.state_size,
        environment_state=features.environment_state,
        images=features.images,
        backbone=str(_given(checkpoint, "vision_backbone")),
        group_norm=_boolean(checkpoint, "use_group_norm"),
        separate=_boolean(checkpoint, "use_separate_rgb_encoder_per_camera"),
        keypoints=integer(checkpoint, "spatial_softmax_num_keypoints"),
        framing=_framing(checkpoint),
    )
    _check_eyes(checkpoint, eyes, features)
    try:
        net = UNet(
            action_size=features.action_size,
            condition_size=eyes.feature_size * integer(checkpoint, "n_obs_steps"),
            embedding_size=integer(checkpoint, "diffusion_step_embed_dim"),
            down_dims=_integers(checkpoint, "down_dims"),
            kernel_size=integer(checkpoint, "kernel_size"),
            groups=integer(checkpoint, "n_groups"),
            film_scale=_boolean(checkpoint, "use_film_scale_modulation"),
        )
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from None
    return eyes, net


def read_samplers(checkpoint: Checkpoint) -> Samplers:
    """The configuration's scheduler, or what sampler.json says of a student. Raises ExportError."""
    where, scheduler = checkpoint.config_path, _given(checkpoint, "noise_scheduler_type")
    if not isinstance(scheduler, str) or scheduler not in SOLVERS:
        known = ", ".join(SOLVERS)
        raise ExportError(f"{where}: noise_scheduler_type {scheduler!r} is not supported; supported are {known}")
    prediction = _given(checkpoint, "prediction_type")
    if prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise ExportError(f"{where}: prediction_type {prediction!r} is not supported; supported are {known}")
    trained = integer(checkpoint, "num_train_timesteps")
    try:
        schedule = NoiseSchedule(
            num_train_timesteps=trained,
            beta_schedule=str(_given(checkpoint, "beta_schedule")),
            beta_start=_number(checkpoint, "beta_start"),
            beta_end=_number(checkpoint, "beta_end"),
            prediction_type=prediction,
            clip_sample=_boolean(checkpoint, "clip_sample"),
            clip_sample_range=_number(checkpoint, "clip_sample_range"),
        )
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from None
    student = checkpoint.path / STUDENT
    if student.is_file():
        checkpoint.source_files[STUDENT] = file_sha256(student)
        _warn_of_failed_gate(checkpoint)
        return read_student(read_json(student), schedule, str(student))
    steps = trained if _given(checkpoint, "num_inference_steps") is None else integer(checkpoint, "num_inference_steps")
    return DiffusionSamplers(schedule=schedule, solver=SOLVERS[scheduler], steps=steps)


def _warn_of_failed_gate(checkpoint: Checkpoint) -> None:
    record = checkpoint.path / STUDENT_RECORD
    if not record.is_file():
        return
    gate = read_json(record).get("gate")
    if isinstance(gate, dict) and gate.get("passed") is not True:
        objections = "; ".join(str(objection) for objection in gate.get("objections", []))
        checkpoint.warnings.append(f"{record}: the student failed its gate against its teacher: {objections}")


def _framing(checkpoint: Checkpoint) -> Framing:
    """Resizing and crop. A crop_ratio of a resize goes before crop_shape, and one of 1 means no crop."""
    resize = _size(checkpoint, "resize_shape")
    if resize is None:
        return Framing(crop=_size(checkpoint, "crop_shape"))
    ratio = _number(checkpoint, "crop_ratio")
    if not 0 < ratio <= 1:
        raise ExportError(f"{checkpoint.config_path}: crop_ratio should be above 0 and at most 1, found {ratio}")
    crop = (int(resize[0] * ratio), int(resize[1] * ratio))
    if not min(crop):
        raise ExportError(f"{checkpoint.config_path}: crop_ratio {ratio} leaves nothing of {resize[0]}x{resize[1]} px")
    return Framing(resize, crop if ratio < 1 else None)


def _check_eyes(checkpoint: Checkpoint, eyes: KeypointEncoder, features: Declared) -> None:
    where = checkpoint.config_path
    if not features.images:
        return
    if eyes.backbone not in resnet.VARIANTS:
        known = ", ".join(resnet.VARIANTS)
        raise ExportError(f"{where}: vision_backbone {eyes.backbone!r} is not supported; supported are {known}")
    sizes = {name: (height, width) for name, height, width in features.images}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {height}x{width}" for name, (height, width) in sizes.items())
        raise ExportError(f"{where}: LeRobot's Diffusion Policy needs cameras of one size, found {found}")
    try:
        eyes.framing.size(features.images[0][1:])
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from None


def _check_grids(checkpoint: Checkpoint, eyes: KeypointEncoder, weights: dict[str, torch.Tensor]) -> None:
    """The keypoints' grid is saved with the weights but is no weight; the network has it as a constant."""
    for eye in eyes.eyes:
        name = f"{eye}pool.pos_grid"
        if not torch.allclose(weights[name], torch.from_numpy(encoder.grid(*eyes.cells)), rtol=0, atol=1e-5):
            raise ExportError(
                f"{checkpoint.weights_path}: {PREFIX}{name} is not the grid from -1 to 1 of a map of "
                f"{eyes.cells[0]}x{eyes.cells[1]} cells; the file is damaged"
            )


def _chunk_size(checkpoint: Checkpoint, horizon: int, steps: int) -> int:
    """n_action_steps, or what the horizon has of them: LeRobot cuts there without a word."""
    wanted, there = integer(checkpoint, "n_action_steps"), horizon - (steps - 1)
    if there < 1:
        raise ExportError(f"{checkpoint.config_path}: a horizon of {horizon} ends before n_obs_steps {steps}")
    if wanted > there:
        checkpoint.warnings.append(
            f"{checkpoint.config_path}: n_action_steps {wanted} does not fit into the horizon; the chunk has {there}"
        )
    return min(wanted, there)


def _given(checkpoint: Checkpoint, key: str) -> Any:
    if key in checkpoint.config:
        return checkpoint.config[key]
    if key in LATER:
        return LATER[key]
    raise ExportError(
        f"{checkpoint.config_path}: {key} is missing, and its default has changed between versions of LeRobot; add the "
        "one that the policy was trained with"
    )


def _boolean(checkpoint: Checkpoint, key: str) -> bool:
    value = _given(checkpoint, key)
    if not isinstance(value, bool):
        raise ExportError(f"{checkpoint.config_path}: {key} should be true or false, found {value!r}")
    return value


def _number(checkpoint: Checkpoint, key: str) -> float:
    value = _given(checkpoint, key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ExportError(f"{checkpoint.config_path}: {key} should be a number, found {value!r}")
    return float(value)


def _integers(checkpoint: Checkpoint, key: str) -> tuple[int, ...]:
    value = _given(checkpoint, key)
    if not isinstance(value, list) or not value or any(type(part) is not int or part < 1 for part in value):
        raise ExportError(f"{checkpoint.config_path}: {key} should be a list of positive integers, found {value!r}")
    return tuple(value)


def _size(checkpoint: Checkpoint, key: str) -> tuple[int, int] | None:
    if _given(checkpoint, key) is None:
        return None
    size = _integers(checkpoint, key)
    if len(size) != 2:
        raise ExportError(f"{checkpoint.config_path}: {key} should be height and width, found {list(size)}")
    return size[0], size[1]
