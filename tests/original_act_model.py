"""The original ACT repository's two networks in plain PyTorch, as the reference that its checkpoints are tested with.

Written from the description in detr/models (tonyzhaozh/act) and sharing nothing with export/: torch's own attention and
batch axes, cameras put side by side in width, seven decoder layers of which the first one's output is taken, the VAE
encoder and the heads that inference does not use. Names of modules are the repository's, since its state dict is what
an exporter reads. `answer` does what imitate_episodes.py does around them: pictures / 255, ImageNet's mean and
deviation, the statistics of dataset_stats.pkl.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

Array = np.ndarray[Any, np.dtype[Any]]


class FrozenNorm(nn.Module):
    """Batch norm with fixed statistics; eps 1e-5 inside the root."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = FrozenNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = FrozenNorm(outputs)
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), FrozenNorm(outputs))
        else:
            self.downsample = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.downsample(x)).relu()


class Body(nn.Module):
    """ResNet-18 up to its last feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = FrozenNorm(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class SinePositions(nn.Module):
    """DETR's sine positions of a feature map [1, 2 * half, H, W], normalised to 2 pi."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.half = half

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        height, width = features.shape[-2:]
        rows = torch.ones(height, width).cumsum(0) / (height + 1e-6) * 2 * math.pi
        columns = torch.ones(height, width).cumsum(1) / (width + 1e-6) * 2 * math.pi
        index = torch.arange(self.half)
        period = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / self.half)
        parts = []
        for angle in (rows[..., None] / period, columns[..., None] / period):
            parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2))
        return torch.cat(parts, dim=-1).permute(2, 0, 1)[None]


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()


def joiner(dim: int) -> nn.Sequential:
    """A backbone and its positions, as number 0 and 1 of a sequence; run by hand, since both results are needed."""
    return nn.Sequential(Backbone(), SinePositions(dim // 2))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if self.pre_norm:
            seen = self.norm1(x)
            x = x + self.self_attn(seen + position, seen + position, seen)[0]
            return x + self.linear2(self.linear1(self.norm2(x)).relu())
        x = self.norm1(x + self.self_attn(x + position, x + position, x)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.multihead_attn = nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, position: torch.Tensor, query: torch.Tensor
    ) -> torch.Tensor:
        if self.pre_norm:
            seen = self.norm1(x)
            x = x + self.self_attn(seen + query, seen + query, seen)[0]
            x = x + self.multihead_attn(self.norm2(x) + query, memory + position, memory)[0]
            return x + self.linear2(self.linear1(self.norm3(x)).relu())
        x = self.norm1(x + self.self_attn(x + query, x + query, x)[0])
        x = self.norm2(x + self.multihead_attn(x + query, memory + position, memory)[0])
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class Transformer(nn.Module):
    def __init__(self, dim: int, feedforward: int, encoders: int, decoders: int, pre_norm: bool) -> None:
        super().__init__()
        size = (dim, 8, feedforward, pre_norm)
        self.encoder = Stack([EncoderLayer(*size) for _ in range(encoders)], nn.LayerNorm(dim) if pre_norm else None)
        self.decoder = Stack([DecoderLayer(*size) for _ in range(decoders)], nn.LayerNorm(dim))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, queries: torch.Tensor) -> list[torch.Tensor]:
        """What every decoder layer gives, normed, each [queries, batch, dim]."""
        for layer in self.encoder.layers:
            tokens = layer(tokens, positions)
        memory = tokens if self.encoder.norm is None else self.encoder.norm(tokens)
        x, intermediate = torch.zeros_like(queries), []
        for layer in self.decoder.layers:
            x = layer(x, memory, positions, queries)
            intermediate.append(self.decoder.norm(x))
        return intermediate


class DetrVae(nn.Module):
    """The policy class ACT. `backbones`: one that all cameras share, or one for each."""

    def __init__(
        self,
        cameras: int,
        *,
        backbones: int = 1,
        state: int = 14,
        actions: int = 14,
        chunk: int = 5,
        dim: int = 64,
        feedforward: int = 96,
        encoders: int = 2,
        decoders: int = 7,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.cameras = cameras
        self.transformer = Transformer(dim, feedforward, encoders, decoders, pre_norm)
        vae = [EncoderLayer(dim, 8, feedforward, pre_norm) for _ in range(encoders)]
        self.encoder = Stack(vae, nn.LayerNorm(dim) if pre_norm else None)
        self.action_head = nn.Linear(dim, actions)
        self.is_pad_head = nn.Linear(dim, 1)
        self.query_embed = nn.Embedding(chunk, dim)
        self.input_proj = nn.Conv2d(512, dim, 1)
        self.backbones = nn.ModuleList([joiner(dim) for _ in range(backbones)])
        self.input_proj_robot_state = nn.Linear(state, dim)
        self.cls_embed = nn.Embedding(1, dim)
        self.encoder_action_proj = nn.Linear(actions, dim)
        self.encoder_joint_proj = nn.Linear(state, dim)
        self.latent_proj = nn.Linear(dim, 64)
        self.register_buffer("pos_table", torch.zeros(1, chunk + 2, dim))
        self.latent_out_proj = nn.Linear(32, dim)
        self.additional_pos_embed = nn.Embedding(2, dim)

    def forward(self, qpos: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """qpos [B, S] and pictures [B, cameras, 3, H, W], both normalised, to actions [B, K, A], normalised."""
        features, positions = [], []
        for camera in range(self.cameras):
            backbone, sine = self.backbones[camera if len(self.backbones) > 1 else 0]
            found = backbone.body(pictures[:, camera])
            features.append(self.input_proj(found))
            positions.append(sine(found))
        wide, places = torch.cat(features, dim=3), torch.cat(positions, dim=3)
        latent = self.latent_out_proj(torch.zeros(len(qpos), 32))
        tokens = torch.cat([torch.stack([latent, self.input_proj_robot_state(qpos)]), wide.flatten(2).permute(2, 0, 1)])
        placed = torch.cat([self.additional_pos_embed.weight, places.flatten(2)[0].T])[:, None]
        queries = self.query_embed.weight[:, None].repeat(1, len(qpos), 1)
        decoded = self.transformer(tokens, placed.repeat(1, len(qpos), 1), queries)
        return self.action_head(decoded[0].transpose(0, 1))


class CnnMlp(nn.Module):
    """The policy class CNNMLP."""

    def __init__(self, cameras: int, cells: int, *, state: int = 14, actions: int = 14, hidden: int = 1024) -> None:
        """`cells`: of a camera's map after the convolutions (24 at 480x640)."""
        super().__init__()
        self.action_head = nn.Linear(1000, actions)
        self.backbones = nn.ModuleList([joiner(64) for _ in range(cameras)])
        self.backbone_down_projs = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(512, 128, 5), nn.Conv2d(128, 64, 5), nn.Conv2d(64, 32, 5)) for _ in range(cameras)]
        )
        self.mlp = nn.Sequential(
            nn.Linear(cameras * 32 * cells + state, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, actions),
        )

    def forward(self, qpos: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """As for DetrVae, to one action [B, A]."""
        maps = [
            down(backbone[0].body(pictures[:, camera]))
            for camera, (backbone, down) in enumerate(zip(self.backbones, self.backbone_down_projs, strict=True))
        ]
        return self.mlp(torch.cat([*(each.reshape(len(qpos), -1) for each in maps), qpos], dim=1))


class Policy(nn.Module):
    """What the repository saves the state dict of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def answer(policy: Policy, statistics: dict[str, Array], qpos: Array, pictures: list[Array]) -> Array:
    """Raw qpos [S] and uint8 pictures [H, W, 3] to actions as the repository gives them to the robot, [K, A]."""
    normal = (torch.from_numpy(qpos) - torch.from_numpy(statistics["qpos_mean"])) / torch.from_numpy(
        statistics["qpos_std"]
    )
    seen = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]).float() / 255
    mean, deviation = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        raw = policy.eval().model(normal.float()[None], ((seen - mean) / deviation)[None])
    actions = raw[0].numpy() * statistics["action_std"] + statistics["action_mean"]
    return np.atleast_2d(actions)
