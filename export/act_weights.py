"""What an ACT network consists of: its configuration, its convolutions, and the name and shape of every tensor.

`export.act` holds a checkpoint against this list, `export.act_network` walks the same list of convolutions, and the
tests make checkpoints from it. Names and shapes are those that LeRobot saves (without its prefix `model.`), and
torchvision's for the backbone; fixtures recorded from LeRobot hold this list to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TRAINING_ONLY = "vae_encoder"  # how the names of tensors begin that inference has no use for

# torchvision.models.resnet: bottleneck or basic blocks, and how many of them in each of the four stages
RESNETS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}


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
