"""What an ACT network consists of: its configuration, and the name and shape of every tensor.

`export.act.read` holds a checkpoint against this list, and the tests make checkpoints from it. Names and shapes are
those that LeRobot saves (without its prefix `model.`), and torchvision's for the backbone; fixtures recorded from
LeRobot hold this list to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.networks import resnet
from export.networks.resnet import ResNet

BACKBONE = "backbone."  # how the names of its tensors begin; backbone.0. for the first of several
TRAINING_ONLY = "vae_encoder"  # how the names of tensors begin that inference has no use for


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
    separate_backbones: bool = False  # one for each camera, as forks of the original have it; LeRobot shares one

    @property
    def resnet(self) -> ResNet:
        """Of the first camera, and of all that share it."""
        return self.backbones[0]

    @property
    def backbones(self) -> tuple[ResNet, ...]:
        """In the order of the cameras where they are separate, otherwise one."""
        prefixes = (
            [f"{BACKBONE}{index}." for index in range(len(self.images))] if self.separate_backbones else [BACKBONE]
        )
        return tuple(ResNet(prefix, self.backbone, self.dilate) for prefix in prefixes)

    @property
    def state_tokens(self) -> int:
        """Tokens that come before the images': latent, robot state, environment state."""
        return 2 + (self.environment_state is not None)


def expected_weights(config: ActConfig) -> dict[str, tuple[int, ...]]:
    """Name (without `model.`) -> shape of every tensor that a checkpoint of this configuration holds."""
    dim, shapes = config.dim, dict[str, tuple[int, ...]]()
    if config.images:
        for net in config.backbones:
            shapes |= resnet.expected_weights(net)
        shapes |= {
            "encoder_img_feat_input_proj.weight": (dim, config.resnet.channels, 1, 1),
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
