"""An ACT checkpoint, understood: its configuration, the weights that it must hold, and those weights ready to run.

`read_act` takes what `export.checkpoint` read. It is strict about every tensor: one that is missing, unknown, of
another shape or not finite is an ExportError that names it, because LeRobot's own loader only warns and an arm then
moves by random numbers. What training alone needs (the VAE encoder, a third of the parameters) is checked and left
behind. Frozen batch norms are folded into their convolutions and packed attention matrices are split, so that the
network in `export.act_network` is the same for PyTorch and for ONNX. Architecture: Zhao et al. 2023, arXiv:2304.13705,
as LeRobot 0.4.4 has it (identical from 0.3.3 to 0.6.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from device.bundle import ACTION, ENVIRONMENT_STATE, STATE
from export.act_weights import RESNETS, TRAINING_ONLY, ActConfig, Convolution, convolutions, expected_weights
from export.checkpoint import Checkpoint, Feature
from export.errors import ExportError
from export.normalize import Normalizer

PREFIX = "model."  # of every published tensor name
BATCH_NORM_EPS = 1e-5  # torchvision.ops.FrozenBatchNorm2d
ACTIVATIONS = ("relu", "gelu")

# What LeRobot 0.3.3 to 0.6.2 write into config.json beside what `read_config` reads: nothing that inference computes.
# fmt: off
OTHER_KEYS = frozenset({
    "type", "input_features", "output_features", "normalization_mapping", "n_action_steps", "device", "use_amp",
    "use_peft", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path", "dropout", "kl_weight",
    "pretrained_backbone_weights", "optimizer_lr", "optimizer_weight_decay", "optimizer_lr_backbone",
})
READ_KEYS = frozenset({
    "n_obs_steps", "chunk_size", "vision_backbone", "replace_final_stride_with_dilation", "pre_norm", "dim_model",
    "n_heads", "dim_feedforward", "feedforward_activation", "n_encoder_layers", "n_decoder_layers", "use_vae",
    "latent_dim", "n_vae_encoder_layers", "temporal_ensemble_coeff",
})
# fmt: on


@dataclass(frozen=True)
class ActPolicy:
    """A policy ready to run: weights as export.act_network names them, normalisation by the policy's feature names."""

    config: ActConfig
    weights: dict[str, torch.Tensor]
    normalizers: dict[str, Normalizer]


def read_act(checkpoint: Checkpoint) -> ActPolicy:
    """Check and convert a checkpoint of type act. Raises ExportError."""
    config = read_config(checkpoint)
    _check_weights(checkpoint, config)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.weights.items()}
    return ActPolicy(config, _runnable(config, weights), checkpoint.normalizers)


def read_config(checkpoint: Checkpoint) -> ActConfig:
    """config.json to ActConfig. Raises ExportError for anything that LeRobot's ACT could not run either."""
    where, found = checkpoint.config_path, checkpoint.config
    if unknown := sorted(set(found) - READ_KEYS - OTHER_KEYS):
        checkpoint.warnings.append(f"{where}: ignored {', '.join(unknown)}, which no known ACT reads")
    state, environment, images = _inputs(checkpoint)
    actions = [feature for feature in checkpoint.outputs if feature.name == ACTION and len(feature.shape) == 1]
    if len(checkpoint.outputs) != 1 or not actions:
        names = ", ".join(feature.name for feature in checkpoint.outputs)
        raise ExportError(f"{where}: output_features should be one vector named {ACTION!r}, found {names}")
    config = ActConfig(
        state_size=state.shape[0],
        environment_state=environment.shape[0] if environment else None,
        images=tuple((image.name, image.shape[1], image.shape[2]) for image in images),
        action_size=actions[0].shape[0],
        chunk_size=_integer(checkpoint, "chunk_size"),
        backbone=str(found.get("vision_backbone", "")),
        dilate=bool(found.get("replace_final_stride_with_dilation", False)),
        pre_norm=bool(found.get("pre_norm", False)),
        dim=_integer(checkpoint, "dim_model"),
        heads=_integer(checkpoint, "n_heads"),
        feedforward=_integer(checkpoint, "dim_feedforward"),
        activation=str(found.get("feedforward_activation", "")),
        encoder_layers=_integer(checkpoint, "n_encoder_layers"),
        decoder_layers=_integer(checkpoint, "n_decoder_layers"),
        latent=_integer(checkpoint, "latent_dim"),
        vae=bool(found.get("use_vae", True)),
        vae_layers=_integer(checkpoint, "n_vae_encoder_layers"),
        ensemble_coefficient=found.get("temporal_ensemble_coeff"),
    )
    _refuse_unsupported(checkpoint, config)
    return config


def _inputs(checkpoint: Checkpoint) -> tuple[Feature, Feature | None, list[Feature]]:
    where = f"{checkpoint.config_path}: input_features"
    state: Feature | None = None
    environment: Feature | None = None
    images: list[Feature] = []
    for feature in checkpoint.inputs:
        if feature.kind == "VISUAL":
            if feature.shape[0] != 3:
                raise ExportError(f"{where}: {feature.name} has {feature.shape[0]} channels; only RGB is supported")
            images.append(feature)
        elif feature.name == STATE and len(feature.shape) == 1:
            state = feature
        elif feature.name == ENVIRONMENT_STATE and len(feature.shape) == 1:
            environment = feature
        else:
            raise ExportError(f"{where}: {feature.name} ({feature.kind} {list(feature.shape)}) is not supported by ACT")
    if state is None:
        raise ExportError(f"{where}: {STATE} is missing; LeRobot's ACT cannot run without it either")
    if not images and environment is None:
        raise ExportError(f"{where}: neither a camera nor {ENVIRONMENT_STATE}; ACT needs one of them")
    return state, environment, images


def _integer(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ExportError(f"{checkpoint.config_path}: {key} should be a positive integer, found {value!r}")
    return value


def _refuse_unsupported(checkpoint: Checkpoint, config: ActConfig) -> None:
    where = checkpoint.config_path
    if config.images and config.backbone not in RESNETS:
        known = ", ".join(RESNETS)
        raise ExportError(f"{where}: vision_backbone {config.backbone!r} is not supported; supported are {known}")
    if config.images and config.dilate and not config.bottleneck:
        raise ExportError(f"{where}: replace_final_stride_with_dilation exists for resnet50 and larger only")
    if config.activation not in ACTIVATIONS:
        # LeRobot's config takes glu too, but its ACT then fails: glu halves the width that the next layer expects
        known = ", ".join(ACTIVATIONS)
        raise ExportError(
            f"{where}: feedforward_activation {config.activation!r} is not supported; supported are {known}"
        )
    if checkpoint.config.get("n_obs_steps", 1) != 1:
        raise ExportError(f"{where}: n_obs_steps {checkpoint.config['n_obs_steps']!r}: ACT takes one observation")
    if config.dim % config.heads or config.dim % 4:
        raise ExportError(f"{where}: dim_model {config.dim} does not divide by n_heads {config.heads} and by 4")
    if config.ensemble_coefficient is not None and not isinstance(config.ensemble_coefficient, int | float):
        raise ExportError(f"{where}: temporal_ensemble_coeff should be a number, found {config.ensemble_coefficient!r}")


def _check_weights(checkpoint: Checkpoint, config: ActConfig) -> None:
    where = checkpoint.weights_path
    expected = {PREFIX + name: shape for name, shape in expected_weights(config).items()}
    found = checkpoint.weights
    for kind, names in (("missing", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            raise ExportError(f"{where}: {_listed(sorted(names))} {'is' if len(names) == 1 else 'are'} {kind}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ExportError(f"{where}: {name} should have shape {list(shape)}, found {list(found[name].shape)}")
        if not name.startswith(PREFIX + TRAINING_ONLY) and not torch.stack(found[name].aminmax()).isfinite().all():
            raise ExportError(f"{where}: {name} holds NaN or infinity")


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _runnable(config: ActConfig, published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    folded: set[str] = set()
    for convolution in convolutions(config) if config.images else ():
        weights |= _fold(convolution, published)
        folded.add(convolution.name + ".weight")
    for name, tensor in published.items():
        if name in folded or name.startswith(TRAINING_ONLY) or (name.startswith("backbone.") and name not in folded):
            continue
        if ".in_proj_" in name:
            attention, _, part = name.partition(".in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{attention}.{letter}.{part}"] = third
        else:
            weights[name] = tensor
    return weights


def _fold(convolution: Convolution, published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A convolution with its frozen batch norm folded in, computed in float64."""
    parts = ("weight", "bias", "running_mean", "running_var")
    gain, shift, mean, variance = (published[f"{convolution.norm}.{part}"].double() for part in parts)
    gain = gain / torch.sqrt(variance + BATCH_NORM_EPS)
    weight = published[f"{convolution.name}.weight"].double() * gain[:, None, None, None]
    return {f"{convolution.name}.weight": weight.float(), f"{convolution.name}.bias": (shift - mean * gain).float()}
