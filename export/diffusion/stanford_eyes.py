"""The two image encoders of Diffusion Policy, from its configuration: robomimic's and the one of several images.

`export.diffusion.stanford` and `export.diffusion.consistency_policy` call these. Each says in which order features and
observation.state's vectors stand, for which the originals have different rules. What runs at random in the original, or
differently in different versions of its libraries, becomes a warning.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from export.checkpoint import Checkpoint
from export.diffusion.keyed_encoder import Eye, KeyedEncoder, KeypointEye, PooledEye, Slot
from export.diffusion.stanford_config import Shape
from export.errors import ExportError
from export.networks import resnet
from export.networks.framing import Framing
from export.networks.resnet import ResNet
from export.readers.hydra_config import Section

# fmt: off
ENCODER_KEYS = (
    "shape_meta", "rgb_model", "resize_shape", "crop_shape", "random_crop", "use_group_norm", "share_rgb_model",
    "imagenet_norm",
)
# fmt: on


@dataclass(frozen=True)
class Seen:
    """What a policy sees of one observation: its encoder, and the vectors (key, elements) that make observation.state,
    in their order."""

    encoder: KeyedEncoder
    vectors: Mapping[str, int]
    imagenet: bool = False  # pictures are normalised once more, as torchvision's pretrained networks want them


def read_keypoint_eyes(checkpoint: Checkpoint, policy: Section, shape: Shape) -> Seen:
    """robomimic's encoder: features in the order of shape_meta, one network a picture."""
    framing = Framing(crop=policy.size("crop_shape", (76, 76)))
    if framing.crop is not None and shape.pictures and not policy.boolean("eval_fixed_crop", False):
        checkpoint.warnings.append(
            f"{policy.where}.eval_fixed_crop is not set, so the original crops at random when it runs; the bundle "
            "crops from the middle"
        )
    eyes: dict[str, Eye] = {
        key: KeypointEye(
            f"obs_encoder.obs_nets.{key}.", shape.image(key), policy.boolean("obs_encoder_group_norm", False), framing
        )
        for key in shape.pictures
    }
    _check_framing(policy, framing, shape)
    return _seen(shape, shape.order, eyes)


def read_pooled_eyes(checkpoint: Checkpoint, encoder: Section, shape: Shape) -> Seen:
    """MultiImageObsEncoder: pictures by name, then vectors by name; one network a picture, or one for all."""
    if encoder.target() != "MultiImageObsEncoder":
        raise ExportError(f"{encoder.where}: {encoder.target()} is not supported; supported is MultiImageObsEncoder")
    encoder.refuse_others(ENCODER_KEYS)
    shared, eyes = encoder.boolean("share_rgb_model", False), dict[str, Eye]()
    for key in sorted(shape.pictures):
        framing = Framing(_size_of(encoder, "resize_shape", key), _size_of(encoder, "crop_shape", key), antialias=False)
        _check_framing(encoder, framing, shape, key)
        prefix = f"obs_encoder.key_model_map.{'rgb' if shared else key}."
        # As saved: the original replaces norms (use_group_norm) in networks that are not shared only.
        group_norm = f"{prefix}bn1.running_mean" not in checkpoint.weights
        net = ResNet(prefix, _variant(encoder, key), group_norm=group_norm, counts_batches=True)
        eyes[key] = PooledEye(shape.image(key), net, framing)
        if framing.resize is not None and any(map(operator.lt, framing.resize, shape.pictures[key])):
            checkpoint.warnings.append(
                f"{encoder.where}: {key} is made smaller without antialiasing, as the versions of torchvision do that "
                "Diffusion Policy asks for; since 0.17 they would antialias"
            )
    order = (*sorted(shape.pictures), *sorted(shape.vectors))
    return _seen(shape, order, eyes, imagenet=encoder.boolean("imagenet_norm", False))


def _seen(shape: Shape, order: tuple[str, ...], eyes: Mapping[str, Eye], imagenet: bool = False) -> Seen:
    parts: list[Slot | Eye] = []
    at = 0
    for key in order:
        if key in eyes:
            parts.append(eyes[key])
            continue
        start, at = at, at + shape.vectors[key]
        before = parts[-1] if parts else None
        if isinstance(before, Slot):
            parts[-1] = Slot(before.start, at)
        else:
            parts.append(Slot(start, at))
    return Seen(
        KeyedEncoder(tuple(parts)), {key: shape.vectors[key] for key in order if key in shape.vectors}, imagenet
    )


def _variant(encoder: Section, key: str) -> str:
    """The ResNet of a picture: `rgb_model` is one for all, or one a key."""
    model = encoder.section("rgb_model")
    model = model if "_target_" in model.values else model.section(key)
    name, weights = model.given("name"), model.given("weights")
    if model.target() != "get_resnet" or name not in resnet.VARIANTS or str(weights).lower() == "r3m":
        raise ExportError(
            f"{model.where}: {model.target()} of {name!r} with weights {weights!r} is not supported; supported is "
            f"get_resnet of {', '.join(resnet.VARIANTS)}, not R3M's"
        )
    return str(name)


def _size_of(encoder: Section, name: str, key: str) -> tuple[int, int] | None:
    """resize_shape or crop_shape: one for all pictures, or one a key."""
    return encoder.section(name).size(key) if isinstance(encoder.given(name), dict) else encoder.size(name)


def _check_framing(section: Section, framing: Framing, shape: Shape, *keys: str) -> None:
    for key in keys or shape.pictures:
        try:
            framing.size(shape.pictures[key])
        except ExportError as error:
            raise ExportError(f"{section.where}.crop_shape: {key}: {error}") from None
