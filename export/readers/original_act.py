"""Reads what the original ACT repository saves: policy_best.ckpt, with dataset_stats.pkl in the same folder.

The first is a bare state dict, the second a pickle of means and standard deviations, and neither says anything about
the robot: camera names, picture size, rate and units are asked for. Its policy class ACT becomes a Checkpoint of type
act under LeRobot's names, CNNMLP (plain behaviour cloning) one of type cloning under its own. Only the first decoder
layer of ACT is kept: the code takes element 0 of the stack of all layers' outputs, so the others are dead weight, which
is why LeRobot has one layer. Training on real arms paired an observation with the action before it (utils.py), which
changes nothing here: the first action of a chunk is meant for now. Nothing is run that a file holds. Source:
github.com/tonyzhaozh/act, imitate_episodes.py, policy.py, detr/models/detr_vae.py and transformer.py; forks with a
backbone for each camera (act-plus-plus) are told apart by their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device.bundle import ACTION, STATE, file_sha256
from export.checkpoint import Checkpoint, Feature, Told
from export.errors import ExportError
from export.networks import resnet
from export.normalize import Normalizer, Statistics, normalizer
from export.readers.safe_pickle import load_plain, load_torch

STATISTICS = "dataset_stats.pkl"
BEST = "policy_best.ckpt"
SUFFIX = ".ckpt"
IMAGES = "observation.images."
LAYOUT = "the original ACT repository"
PREFIX = "model."  # of every tensor: the policy keeps its network under this name
HEADS = 8  # written into imitate_episodes.py, and into no file
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # policy.py
_BACKBONE = r"backbones\.(\d+)\."  # the number is the camera's, where there are several

# How the names of tensors begin in the repository (without PREFIX) -> in LeRobot; None for what inference never reads.
# First match counts.
_NAMES: tuple[tuple[str, str | None], ...] = (
    (r"transformer\.encoder\.", "encoder."),
    (r"transformer\.decoder\.layers\.0\.", "decoder.layers.0."),
    (r"transformer\.decoder\.layers\.[1-9]\d*\.", None),
    (r"transformer\.decoder\.norm\.", "decoder.norm."),
    (r"is_pad_head\.", None),
    (r"encoder\.", "vae_encoder."),
    (r"cls_embed\.", "vae_encoder_cls_embed."),
    (r"encoder_action_proj\.", "vae_encoder_action_input_proj."),
    (r"encoder_joint_proj\.", "vae_encoder_robot_state_input_proj."),
    (r"latent_proj\.", "vae_encoder_latent_output_proj."),
    (r"pos_table$", "vae_encoder_pos_enc"),
    (r"query_embed\.", "decoder_pos_embed."),
    (r"input_proj\.", "encoder_img_feat_input_proj."),
    (r"input_proj_robot_state\.", "encoder_robot_state_input_proj."),
    (r"latent_out_proj\.", "encoder_latent_input_proj."),
    (r"additional_pos_embed\.", "encoder_1d_feature_pos_embed."),
    (r"action_head\.", "action_head."),
)


def recognises(path: Path) -> bool:
    """Whether `path` is to be read here: a .ckpt file, or a folder with statistics or checkpoints of this kind."""
    if path.is_dir() and not (path / "config.json").is_file():
        return (path / STATISTICS).is_file() or any(path.glob(f"policy_*{SUFFIX}"))
    return path.suffix == SUFFIX


def read_checkpoint(path: Path, told: Told) -> Checkpoint:
    """Read policy_best.ckpt, or the folder that holds it. Raises ExportError."""
    weights_path = _find_weights(path)
    statistics_path = weights_path.parent / STATISTICS
    published = _tensors(weights_path)
    clones = _holds(published, "backbone_down_projs.") and _holds(published, "mlp.")
    if not clones and not (_holds(published, "transformer.") and _holds(published, "query_embed.")):
        raise _foreign(weights_path, published)
    if not statistics_path.is_file():
        raise ExportError(
            f"{statistics_path} is missing: training writes it beside {weights_path.name}, and without it nothing can "
            "be normalised; copy it there"
        )
    _refuse_untold(weights_path, told)
    statistics = _read_statistics(statistics_path)
    inputs, outputs = _features(statistics, told)
    checkpoint = Checkpoint(
        path=weights_path,
        config_path=weights_path,
        weights_path=weights_path,
        config={"type": "cloning"} if clones else _act_config(published, weights_path, told),
        inputs=inputs,
        outputs=outputs,
        weights=published if clones else _renamed(published),
        layout=LAYOUT,
        statistics=dict(statistics),
        source_files={file.name: file_sha256(file) for file in (weights_path, statistics_path)},
    )
    for feature in (*inputs, *outputs):
        checkpoint.normalizers[feature.name] = _normalizer(feature, statistics, statistics_path)
    return checkpoint


def _find_weights(path: Path) -> Path:
    if not path.exists():
        raise ExportError(f"{path} does not exist; give the folder that holds {BEST} and {STATISTICS}")
    if path.is_file():
        return path
    if (path / BEST).is_file():
        return path / BEST
    others = ", ".join(sorted(found.name for found in path.glob(f"*{SUFFIX}"))) or "no checkpoint"
    raise ExportError(f"{path / BEST} is missing; the folder holds {others}: give one of its files")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict, floating point as float32, without the names that torch.compile and DataParallel put in."""
    found = load_torch(path)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        what = f"a {type(found).__name__}"
        if isinstance(found, dict):
            what = f"a dictionary of {', '.join(str(key)[:40] for key in list(found)[:5])}"
        raise ExportError(f"{path} is not a policy of the original ACT: it should hold tensors by name, found {what}")
    return {
        str(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
        if not str(name).endswith(".num_batches_tracked")  # a counter, of backbones whose norms are not frozen
    }


def _holds(published: Mapping[str, torch.Tensor], start: str) -> bool:
    return any(name.startswith(PREFIX + start) for name in published)


def _foreign(path: Path, published: Mapping[str, torch.Tensor]) -> ExportError:
    starts = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in published))
    more = f" and {len(starts) - 4} more" if len(starts) > 4 else ""
    found = f"its tensors begin with {', '.join(starts[:4])}{more}" if starts else "it holds no tensors"
    return ExportError(f"{path} is not a policy of the original ACT: {found}")


def _refuse_untold(path: Path, told: Told) -> None:
    asked = {
        "--cameras NAMES (in training's order)": told.cameras,
        "--image-size HEIGHTxWIDTH": told.image_size,
        "--rate HZ": told.rate_hz,
        "--units radians (or what the joints were in)": told.units,
    }
    if missing := [option for option, value in asked.items() if not value]:
        raise ExportError(
            f"{path}: a checkpoint of the original ACT does not say everything: give {', '.join(missing)}"
        )


def _read_statistics(path: Path) -> dict[str, Statistics]:
    found = load_plain(path)
    if not isinstance(found, dict):
        raise ExportError(f"{path} should hold a dictionary of statistics, found a {type(found).__name__}")
    statistics: dict[str, Statistics] = {}
    for feature, name in ((STATE, "qpos"), (ACTION, "action")):
        statistics[feature] = {key: _vector(found, f"{name}_{key}", path) for key in ("mean", "std")}
    return statistics


def _vector(found: Mapping[Any, Any], key: str, path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    if key not in found:
        there = ", ".join(str(name)[:40] for name in list(found)[:8])
        raise ExportError(f"{path}: {key} is missing; found {there or 'nothing'}")
    value = found[key]
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "fiu" or value.ndim > 1:
        raise ExportError(f"{path}: {key} should be one row of numbers, found {_kind(value)}")
    return value.astype(np.float64).reshape(-1)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _features(statistics: Mapping[str, Statistics], told: Told) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    assert told.cameras is not None and told.image_size is not None  # _refuse_untold
    names = [IMAGES + camera.strip().removeprefix(IMAGES) for camera in told.cameras]
    if IMAGES in names or len(set(names)) != len(names):
        raise ExportError(f"--cameras has a name that is empty or given twice: {', '.join(told.cameras)}")
    state = Feature(STATE, "STATE", statistics[STATE]["mean"].shape)
    action = Feature(ACTION, "ACTION", statistics[ACTION]["mean"].shape)
    return (state, *(Feature(name, "VISUAL", (3, *told.image_size)) for name in names)), (action,)


def _normalizer(feature: Feature, statistics: Mapping[str, Statistics], path: Path) -> Normalizer:
    if feature.kind == "VISUAL":
        return Normalizer("MEAN_STD", np.array(IMAGENET_MEAN), np.array(IMAGENET_STD))
    found, size = statistics[feature.name], feature.channels
    return normalizer(feature.name, "MEAN_STD", found, size, eps=0.0, inverse=True, where=str(path))


def _act_config(published: Mapping[str, torch.Tensor], path: Path, told: Told) -> dict[str, Any]:
    """What LeRobot's config.json would say, read off the tensors."""
    backbones, cameras = _count(published, _BACKBONE), len(told.cameras or ())
    if backbones == 0:
        raise ExportError(f"{path} is an ACT that sees states and no cameras, which is not supported")
    if backbones > 1 and backbones != cameras:
        raise ExportError(
            f"{path}: trained with {backbones} cameras, but --cameras names {cameras}; name all of them in training's "
            "order"
        )
    chunk_size, dim = _shape(published, "query_embed.weight", 2, path)
    return {
        "type": "act",
        "chunk_size": chunk_size,
        "vision_backbone": _backbone(published),
        "replace_final_stride_with_dilation": False,
        "pre_norm": _holds(published, "transformer.encoder.norm."),
        "dim_model": dim,
        "n_heads": HEADS,
        "dim_feedforward": _shape(published, "transformer.encoder.layers.0.linear1.weight", 2, path)[0],
        "feedforward_activation": "relu",
        "n_encoder_layers": _count(published, r"transformer\.encoder\.layers\.(\d+)\."),
        "n_decoder_layers": 1,
        "use_vae": True,
        "latent_dim": _shape(published, "latent_out_proj.weight", 2, path)[1],
        "n_vae_encoder_layers": _count(published, r"encoder\.layers\.(\d+)\."),
        "temporal_ensemble_coeff": None,
        "separate_backbones": backbones > 1,
    }


def _backbone(published: Mapping[str, torch.Tensor]) -> str:
    """torchvision's name of the ResNet, by its kind of block and their number in the third stage."""
    bottleneck = _holds(published, "backbones.0.0.body.layer1.0.conv3.")
    blocks = _count(published, r"backbones\.0\.0\.body\.layer3\.(\d+)\.")
    return next(
        (name for name, (wide, counts) in resnet.VARIANTS.items() if (wide, counts[2]) == (bottleneck, blocks)),
        f"with {blocks} blocks in layer3",
    )


def _count(published: Mapping[str, torch.Tensor], pattern: str) -> int:
    """One more than the largest index that `pattern` finds."""
    found = [re.match(re.escape(PREFIX) + pattern, name) for name in published]
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _shape(published: Mapping[str, torch.Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    tensor = published.get(PREFIX + name)
    if tensor is None or tensor.ndim != dimensions:
        found = "nothing" if tensor is None else str(list(tensor.shape))
        raise ExportError(f"{path}: {PREFIX}{name} should have {dimensions} dimensions, found {found}")
    return tuple(tensor.shape)


def _renamed(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under LeRobot's names, where a single backbone has no number."""
    separate = _count(published, _BACKBONE) > 1
    names = ((_BACKBONE + r"0\.body\.", r"backbone.\1." if separate else "backbone."), *_NAMES)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        bare = name.removeprefix(PREFIX)
        for pattern, replacement in names:
            if name.startswith(PREFIX) and (match := re.match(pattern, bare)):
                if replacement is not None:
                    weights[PREFIX + match.expand(replacement) + bare[match.end() :]] = tensor
                break
        else:
            weights[name] = tensor  # which the family refuses by its name
    return weights
