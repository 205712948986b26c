"""An ACT checkpoint, understood: its configuration, the weights that it must hold, and those weights ready to run.

`read_act` takes what `export.checkpoint` read. It is strict about every tensor: one that is missing, unknown, of
another shape or not finite is an ExportError that names it, because LeRobot's own loader only warns and an arm then
moves by random numbers. What training alone needs (the VAE encoder, a third of the parameters) is checked and left
behind. Frozen batch norms are folded into their convolutions and packed attention matrices are split, so that the
network in `export.act_network` is the same for PyTorch and for ONNX. Architecture: Zhao et al. 2023, arXiv:2304.13705,
as LeRobot 0.4.4 has it (identical from 0.3.3 to 0.6.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from device.bundle import ENVIRONMENT_STATE, STATE
from export.checkpoint import ACTION, CONFIG, WEIGHTS, Checkpoint, Feature
from export.errors import ExportError
from export.normalize import Normalizer

PREFIX = "model."  # of every published tensor name
TRAINING_ONLY = "vae_encoder"
BATCH_NORM_EPS = 1e-5  # torchvision.ops.FrozenBatchNorm2d
ACTIVATIONS = ("relu", "gelu")

# torchvision.models.resnet: bottleneck or basic blocks, and how many of them in each of the four stages
RESNETS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}

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
class ActConfig:
    """The part of ACTConfig that decides what the network computes. Sizes in elements; images (name, height, width)."""

    state_size: int
    environment_state: int | None
    images: tuple[tuple[str, int, int], ...]
    action_size: int
    chunk_size: int
    backbone: str
    dilate: bool
    pre_norm: bool
    dim: int
    heads: int
    feedforward: int
    activation: str
    encoder_layers: int
    decoder_layers: int
    latent: int
    vae: bool
    vae_layers: int
    ensemble_coefficient: float | None

    @property
    def bottleneck(self) -> bool:
        return RESNETS[self.backbone][0]

    @property
    def state_tokens(self) -> int:
        """Tokens that come before the images': latent, robot state, environment state."""
        return 2 + (self.environment_state is not None)


@dataclass(frozen=True)
class Convolution:
    """One convolution of the backbone with the batch norm that follows it, by their published names."""

    name: str
    norm: str
    shape: tuple[int, int, int, int]  # out, in, height, width
    stride: int
    padding: int
    dilation: int = 1


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
    where, found = checkpoint.path / CONFIG, checkpoint.config
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


def convolutions(config: ActConfig) -> Iterator[Convolution]:
    """The stem's convolution, then `blocks` in order: every convolution of the backbone."""
    yield Convolution("backbone.conv1", "backbone.bn1", (64, 3, 7, 7), stride=2, padding=3)
    for block in blocks(config):
        yield from block


def blocks(config: ActConfig) -> Iterator[list[Convolution]]:
    """Residual blocks: their convolutions in order; a `downsample` at the end is on the shortcut."""
    bottleneck, counts = RESNETS[config.backbone]
    expansion = 4 if bottleneck else 1
    channels = 64
    for stage, count in enumerate(counts):
        width = 64 << stage
        for index in range(count):
            first = index == 0
            stride = 2 if first and stage > 0 else 1
            dilation = 1
            if config.dilate and stage == 3:  # torchvision: the stride becomes dilation, from the second block on
                stride, dilation = 1, 1 if first else 2
            name = f"backbone.layer{stage + 1}.{index}"
            shortcut = first and (stage > 0 or bottleneck)
            yield _block(name, channels, width, width * expansion, stride, dilation, bottleneck, shortcut)
            channels = width * expansion


def backbone_channels(config: ActConfig) -> int:
    return 2048 if config.bottleneck else 512


def expected_weights(config: ActConfig) -> dict[str, tuple[int, ...]]:
    """Name (without `model.`) -> shape of every tensor that a checkpoint of this configuration holds."""
    dim, shapes = config.dim, dict[str, tuple[int, ...]]()
    if config.images:
        for convolution in convolutions(config):
            shapes[f"{convolution.name}.weight"] = convolution.shape
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{convolution.norm}.{part}"] = (convolution.shape[0],)
        shapes |= {
            "encoder_img_feat_input_proj.weight": (dim, backbone_channels(config), 1, 1),
            "encoder_img_feat_input_proj.bias": (dim,),
        }
    shapes |= _linear("encoder_robot_state_input_proj", dim, config.state_size)
    if config.environment_state is not None:
        shapes |= _linear("encoder_env_state_input_proj", dim, config.environment_state)
    shapes |= _linear("encoder_latent_input_proj", dim, config.latent)
    shapes["encoder_1d_feature_pos_embed.weight"] = (config.state_tokens, dim)
    shapes |= _stack("encoder", config.encoder_layers, config, ("self_attn",), config.pre_norm)
    shapes["decoder_pos_embed.weight"] = (config.chunk_size, dim)
    shapes |= _stack("decoder", config.decoder_layers, config, ("self_attn", "multihead_attn"), final_norm=True)
    shapes |= _linear("action_head", config.action_size, dim)
    return shapes | (_training_weights(config) if config.vae else {})


def _training_weights(config: ActConfig) -> dict[str, tuple[int, ...]]:
    """The VAE encoder: there in every checkpoint that was trained with it, and of no use to an arm."""
    shapes = _stack("vae_encoder", config.vae_layers, config, ("self_attn",), config.pre_norm)
    shapes["vae_encoder_cls_embed.weight"] = (1, config.dim)
    shapes |= _linear("vae_encoder_robot_state_input_proj", config.dim, config.state_size)
    shapes |= _linear("vae_encoder_action_input_proj", config.dim, config.action_size)
    shapes |= _linear("vae_encoder_latent_output_proj", 2 * config.latent, config.dim)
    shapes["vae_encoder_pos_enc"] = (1, config.chunk_size + 2, config.dim)
    return shapes


def _stack(
    name: str, layers: int, config: ActConfig, attentions: tuple[str, ...], final_norm: bool
) -> dict[str, tuple[int, ...]]:
    dim, shapes = config.dim, dict[str, tuple[int, ...]]()
    for layer in (f"{name}.layers.{index}" for index in range(layers)):
        for attention in attentions:
            shapes[f"{layer}.{attention}.in_proj_weight"] = (3 * dim, dim)
            shapes[f"{layer}.{attention}.in_proj_bias"] = (3 * dim,)
            shapes |= _linear(f"{layer}.{attention}.out_proj", dim, dim)
        shapes |= _linear(f"{layer}.linear1", config.feedforward, dim)
        shapes |= _linear(f"{layer}.linear2", dim, config.feedforward)
        for index in range(1 + len(attentions)):
            shapes |= _norm(f"{layer}.norm{index + 1}", dim)
    return shapes | (_norm(f"{name}.norm", dim) if final_norm else {})


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _block(
    name: str, inputs: int, width: int, outputs: int, stride: int, dilation: int, bottleneck: bool, shortcut: bool
) -> list[Convolution]:
    first, second, third = ((f"{name}.conv{index}", f"{name}.bn{index}") for index in (1, 2, 3))
    if bottleneck:
        block = [
            Convolution(*first, (width, inputs, 1, 1), 1, 0),
            Convolution(*second, (width, width, 3, 3), stride, dilation, dilation),
            Convolution(*third, (outputs, width, 1, 1), 1, 0),
        ]
    else:
        block = [
            Convolution(*first, (width, inputs, 3, 3), stride, 1),
            Convolution(*second, (width, width, 3, 3), 1, 1),
        ]
    if shortcut:
        block.append(Convolution(f"{name}.downsample.0", f"{name}.downsample.1", (outputs, inputs, 1, 1), stride, 0))
    return block


def _inputs(checkpoint: Checkpoint) -> tuple[Feature, Feature | None, list[Feature]]:
    where = f"{checkpoint.path / CONFIG}: input_features"
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
        raise ExportError(f"{checkpoint.path / CONFIG}: {key} should be a positive integer, found {value!r}")
    return value


def _refuse_unsupported(checkpoint: Checkpoint, config: ActConfig) -> None:
    where = checkpoint.path / CONFIG
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
    where = checkpoint.path / WEIGHTS
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
