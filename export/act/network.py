"""ACT's forward pass, from raw observation to goals in joint units, written once over `Operations`.

Zhao et al. 2023 (arXiv:2304.13705) as LeRobot runs it at inference: the latent is zero, so its token is a bias; all
cameras of one size go through the ResNet as one batch; rows of all feature maps, the latent, the robot's state and
the environment's become the encoder's tokens; the decoder's queries are learned positions. Two parts do not depend on
the observation and stand in the graph as constants: the positions, and the first decoder layer's self-attention, whose
values are all the same row (its input is zero), so that any weighting of them is that row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from device.bundle import ACTION, ENVIRONMENT_STATE, STATE
from export.act.weights import ActConfig
from export.networks.operations import Operations, TorchOperations
from export.networks.resnet import ResNet, resnet

if TYPE_CHECKING:
    from export.act.policy import ActPolicy

T = TypeVar("T")
FIRST_DECODER_ROW = "decoder.first_self_attention"


def act(ops: Operations[T], policy: ActPolicy) -> T:
    """One chunk of goals [K, A], in joint units."""
    tokens, positions = _tokens(ops, policy)
    encoded = _encoder(ops, policy.config, tokens, positions)
    decoded = _decoder(ops, policy.config, encoded, positions)
    return ops.unnormalize(ops.linear(decoded, "action_head"), policy.normalizers[ACTION])


def positions_2d(height: int, width: int, dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sine positions of a feature map's cells, [height*width, dim]: half of a row says y, half x.

    Cells count from 1 and are scaled to (0, 2 pi]; temperature 10000; sine and cosine alternate (DETR, Carion et al.
    2020, A.4, with the normalisation of its code).
    """
    frequencies = 10000 ** (2 * (np.arange(dim // 2) // 2) / (dim // 2))

    def encode(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        angle = np.arange(1, count + 1)[:, None] / (count + 1e-6) * 2 * np.pi / frequencies
        return np.where(np.arange(dim // 2) % 2 == 0, np.sin(angle), np.cos(angle))

    y = np.broadcast_to(encode(height)[:, None], (height, width, dim // 2))
    x = np.broadcast_to(encode(width)[None], (height, width, dim // 2))
    return np.concatenate([y, x], axis=-1).reshape(height * width, dim)


def first_decoder_row(config: ActConfig, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the first decoder layer's self-attention gives every query, [1, dim]: it sees zeros, so it is constant."""
    layer, ops = "decoder.layers.0", TorchOperations(weights, {})
    value = torch.zeros(1, config.dim)
    if config.pre_norm:
        value = ops.layer_norm(value, f"{layer}.norm1")
    return ops.linear(ops.linear(value, f"{layer}.self_attn.v"), f"{layer}.self_attn.out_proj")


def _tokens(ops: Operations[T], policy: ActPolicy) -> tuple[T, T]:
    config = policy.config
    rows = [
        ops.constant("latent_token", policy.weights["encoder_latent_input_proj.bias"].numpy()[None]),
        ops.linear(ops.vector(STATE, policy.normalizers[STATE]), "encoder_robot_state_input_proj"),
    ]
    if config.environment_state is not None:
        environment = ops.vector(ENVIRONMENT_STATE, policy.normalizers[ENVIRONMENT_STATE])
        rows.append(ops.linear(environment, "encoder_env_state_input_proj"))
    positions = [policy.weights["encoder_1d_feature_pos_embed.weight"].double().numpy()]
    for (net, height, width), names in _batches(config).items():
        frames = ops.frames(names, [policy.normalizers[name] for name in names])
        features = ops.conv(resnet(ops, net, frames), "encoder_img_feat_input_proj")
        rows.append(ops.tokens(features, config.dim))
        cells = positions_2d(config.resnet.cells(height), config.resnet.cells(width), config.dim)
        positions.extend([cells] * len(names))
    return ops.concat(rows), ops.constant("token_positions", np.concatenate(positions).astype(np.float32))


def _batches(config: ActConfig) -> dict[tuple[ResNet, int, int], list[str]]:
    """Cameras of one backbone and size share a batch. The order of tokens is free: attention does not see it."""
    groups: dict[tuple[ResNet, int, int], list[str]] = {}
    for camera, (name, height, width) in enumerate(config.images):
        net = config.backbones[camera if config.separate_backbones else 0]
        groups.setdefault((net, height, width), []).append(name)
    return groups


def _encoder(ops: Operations[T], config: ActConfig, x: T, positions: T) -> T:
    for layer in (f"encoder.layers.{index}" for index in range(config.encoder_layers)):
        source = ops.layer_norm(x, f"{layer}.norm1") if config.pre_norm else x
        placed = ops.add(source, positions)
        x = ops.add(x, _attend(ops, config, f"{layer}.self_attn", placed, placed, source))
        x = _feed_forward(ops, config, layer, x, attention_norm="norm1", norm="norm2")
    return ops.layer_norm(x, "encoder.norm") if config.pre_norm else x


def _decoder(ops: Operations[T], config: ActConfig, encoded: T, positions: T) -> T:
    queries = ops.weight("decoder_pos_embed.weight")
    keys = ops.add(encoded, positions)
    x: T | None = None
    for layer in (f"decoder.layers.{index}" for index in range(config.decoder_layers)):
        if x is None:
            x = ops.weight(FIRST_DECODER_ROW)
        else:
            source = ops.layer_norm(x, f"{layer}.norm1") if config.pre_norm else x
            placed = ops.add(source, queries)
            x = ops.add(x, _attend(ops, config, f"{layer}.self_attn", placed, placed, source))
        if not config.pre_norm:
            x = ops.layer_norm(x, f"{layer}.norm1")
        asking = ops.layer_norm(x, f"{layer}.norm2") if config.pre_norm else x
        seen = _attend(ops, config, f"{layer}.multihead_attn", ops.add(asking, queries), keys, encoded)
        x = _feed_forward(ops, config, layer, ops.add(x, seen), attention_norm="norm2", norm="norm3")
    assert x is not None  # n_decoder_layers is at least 1
    return ops.layer_norm(x, "decoder.norm")


def _attend(ops: Operations[T], config: ActConfig, name: str, q: T, k: T, v: T) -> T:
    q, k, v = (ops.linear(x, f"{name}.{letter}") for x, letter in ((q, "q"), (k, "k"), (v, "v")))
    return ops.linear(ops.attention(q, k, v, config.heads, config.dim), f"{name}.out_proj")


def _feed_forward(ops: Operations[T], config: ActConfig, layer: str, x: T, attention_norm: str, norm: str) -> T:
    """The second half of a layer: with norms after (`attention_norm` closes the attention before it) or before."""
    x = x if config.pre_norm else ops.layer_norm(x, f"{layer}.{attention_norm}")
    source = ops.layer_norm(x, f"{layer}.{norm}") if config.pre_norm else x
    inner = ops.linear(source, f"{layer}.linear1")
    inner = ops.relu(inner) if config.activation == "relu" else ops.gelu(inner)
    x = ops.add(x, ops.linear(inner, f"{layer}.linear2"))
    return x if config.pre_norm else ops.layer_norm(x, f"{layer}.{norm}")
