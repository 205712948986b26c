"""An ACT checkpoint, understood: its configuration, the weights that it must hold, and those weights ready to run.

`read_act` takes what `export.checkpoint` read. It is strict about every tensor: one that is missing, unknown, of
another shape or not finite is an ExportError that names it, because LeRobot's own loader only warns and an arm then
moves by random numbers. What training alone needs (the VAE encoder, a third of the parameters) is checked and left
behind. Frozen batch norms are folded into their convolutions and packed attention matrices are split, so that the
network in `export.act.network` is the same for PyTorch and for ONNX. Architecture: Zhao et al. 2023, arXiv:2304.13705,
as LeRobot 0.4.4 has it (identical from 0.3.3 to 0.6.2).
"""

from __future__ import annotations

import torch

from export.act.network import FIRST_DECODER_ROW, first_decoder_row
from export.act.policy import ActPolicy
from export.act.weights import BACKBONE, TRAINING_ONLY, ActConfig, expected_weights
from export.checkpoint import Checkpoint, check_weights, integer
from export.errors import ExportError
from export.features import declared
from export.networks import resnet

PREFIX = "model."  # of every published tensor name
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
    "latent_dim", "n_vae_encoder_layers", "temporal_ensemble_coeff", "separate_backbones",
})
# fmt: on


def read_act(checkpoint: Checkpoint) -> ActPolicy:
    """Check and convert a checkpoint of type act. Raises ExportError."""
    config = read_config(checkpoint)
    expected = {PREFIX + name: shape for name, shape in expected_weights(config).items()}
    check_weights(checkpoint, expected, training_only=PREFIX + TRAINING_ONLY)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.weights.items()}
    runnable = _runnable(config, weights)
    # What the network reads as a weight, but training did not store.
    runnable[FIRST_DECODER_ROW] = first_decoder_row(config, runnable)
    return ActPolicy(config, runnable, checkpoint.normalizers)


def read_config(checkpoint: Checkpoint) -> ActConfig:
    """config.json to ActConfig. Raises ExportError for anything that LeRobot's ACT could not run either."""
    where, found = checkpoint.config_path, checkpoint.config
    if unknown := sorted(set(found) - READ_KEYS - OTHER_KEYS):
        checkpoint.warnings.append(f"{where}: ignored {', '.join(unknown)}, which no known ACT reads")
    features = declared(checkpoint, "ACT")
    config = ActConfig(
        state_size=features.state_size,
        environment_state=features.environment_state,
        images=features.images,
        action_size=features.action_size,
        chunk_size=integer(checkpoint, "chunk_size"),
        backbone=str(found.get("vision_backbone", "")),
        dilate=bool(found.get("replace_final_stride_with_dilation", False)),
        pre_norm=bool(found.get("pre_norm", False)),
        dim=integer(checkpoint, "dim_model"),
        heads=integer(checkpoint, "n_heads"),
        feedforward=integer(checkpoint, "dim_feedforward"),
        activation=str(found.get("feedforward_activation", "")),
        encoder_layers=integer(checkpoint, "n_encoder_layers"),
        decoder_layers=integer(checkpoint, "n_decoder_layers"),
        latent=integer(checkpoint, "latent_dim"),
        vae=bool(found.get("use_vae", True)),
        vae_layers=integer(checkpoint, "n_vae_encoder_layers"),
        ensemble_coefficient=found.get("temporal_ensemble_coeff"),
        separate_backbones=bool(found.get("separate_backbones", False)),
    )
    _refuse_unsupported(checkpoint, config)
    return config


def _refuse_unsupported(checkpoint: Checkpoint, config: ActConfig) -> None:
    where = checkpoint.config_path
    if config.images and config.backbone not in resnet.VARIANTS:
        known = ", ".join(resnet.VARIANTS)
        raise ExportError(f"{where}: vision_backbone {config.backbone!r} is not supported; supported are {known}")
    if config.images and config.dilate and not config.resnet.bottleneck:
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


def _runnable(config: ActConfig, published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for net in config.backbones if config.images else ():
        weights |= resnet.runnable(net, published)
    for name, tensor in published.items():
        if name.startswith((TRAINING_ONLY, BACKBONE)):
            continue
        if ".in_proj_" in name:
            attention, _, part = name.partition(".in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{attention}.{letter}.{part}"] = third
        else:
            weights[name] = tensor
    return weights
