"""Diffusion Policy's own checkpoints, understood: which policy it is, its weights and its normalisation.

`read_stanford` takes what `export.readers.diffusion_policy` read. Three policies are known: the hybrid one (robomimic's
encoder), the one of several images (torchvision's ResNets) and the one of vectors only, each with the observation as a
global condition of a UNet; others are refused by name. The vectors of the original's keys become observation.state, one
behind the other in the policy's order, which a warning tells. Every tensor is accounted for. Source: Chi et al. 2023
(arXiv:2303.04137), diffusion_policy/policy.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from device.bundle import ACTION, STATE
from export.checkpoint import Checkpoint, Feature, check_weights
from export.diffusion import unet
from export.diffusion.keyed_encoder import KeyedEncoder, Slot
from export.diffusion.policy import DiffusionPolicy
from export.diffusion.samplers import Samplers
from export.diffusion.stanford_config import IMAGES, read_samplers, read_shape, read_unet
from export.diffusion.stanford_eyes import Seen, read_keypoint_eyes, read_pooled_eyes
from export.diffusion.unet import UNet
from export.errors import ExportError
from export.normalize import Normalizer
from export.readers import linear_normalizer
from export.readers.diffusion_policy import policy_section
from export.readers.hydra_config import Section
from export.sampling import Sampling

# What is saved beside the weights that run: parameters that only say the device, and in hybrid policies every network's
# parts a second time, as a sequence.
UNUSED = re.compile(r"(.*\.)?_dummy_variable$|normalizer\.|obs_encoder\.obs_nets\.[^.]+\.nets\.[01]\.")
# fmt: off
COMMON_KEYS = (
    "shape_meta", "noise_scheduler", "horizon", "n_action_steps", "n_obs_steps", "num_inference_steps",
    "obs_as_global_cond", "diffusion_step_embed_dim", "down_dims", "kernel_size", "n_groups", "cond_predict_scale",
)
HYBRID_KEYS = (*COMMON_KEYS, "crop_shape", "obs_encoder_group_norm", "eval_fixed_crop")
IMAGE_KEYS = (*COMMON_KEYS, "obs_encoder")
VECTOR_KEYS = (
    "model", "noise_scheduler", "horizon", "obs_dim", "action_dim", "n_action_steps", "n_obs_steps",
    "num_inference_steps", "obs_as_local_cond", "obs_as_global_cond", "pred_action_steps_only", "oa_step_convention",
)
# fmt: on


def read_stanford(checkpoint: Checkpoint, sampling: Sampling) -> DiffusionPolicy:
    """Check and convert a checkpoint of one of POLICIES. Raises ExportError."""
    policy = policy_section(checkpoint)
    name = policy.target()
    if name not in POLICIES:
        raise ExportError(f"{policy.where}: {name} is not supported; supported are {', '.join(POLICIES)}")
    return POLICIES[name](checkpoint, policy, sampling)


def _read_hybrid(checkpoint: Checkpoint, policy: Section, sampling: Sampling) -> DiffusionPolicy:
    policy.refuse_others(HYBRID_KEYS)
    shape = read_shape(policy)
    seen = read_keypoint_eyes(checkpoint, policy, shape)
    net = read_unet(policy, policy, shape.action_size, seen.encoder.feature_size)
    return build(checkpoint, policy, seen, net, read_samplers(checkpoint, policy), sampling)


def _read_image(checkpoint: Checkpoint, policy: Section, sampling: Sampling) -> DiffusionPolicy:
    policy.refuse_others(IMAGE_KEYS)
    shape = read_shape(policy)
    seen = read_pooled_eyes(checkpoint, policy.section("obs_encoder"), shape)
    net = read_unet(policy, policy, shape.action_size, seen.encoder.feature_size)
    return build(checkpoint, policy, seen, net, read_samplers(checkpoint, policy), sampling)


def _read_vector(checkpoint: Checkpoint, policy: Section, sampling: Sampling) -> DiffusionPolicy:
    """Vectors only: the key is `obs`, the network has a section of its own, with other defaults."""
    policy.refuse_others(VECTOR_KEYS)
    model, size = policy.section("model"), policy.integer("obs_dim")
    seen = Seen(KeyedEncoder((Slot(0, size),)), {"obs": size})
    defaults = {"kernel_size": 3, "cond_predict_scale": False}
    net = read_unet(policy, Section(defaults | dict(model.values), model.where), policy.integer("action_dim"), size)
    # Where an action does not stand beside the observation that it answers, it stands beside the one that it led to.
    steps = policy.integer("n_obs_steps")
    first = steps - 1 if policy.boolean("oa_step_convention", False) else steps
    horizon = policy.integer("horizon")
    if policy.boolean("pred_action_steps_only", False):
        horizon, first = policy.integer("n_action_steps"), 0
    samplers = read_samplers(checkpoint, policy)
    return build(checkpoint, policy, seen, net, samplers, sampling, horizon=horizon, first=first)


POLICIES: dict[str, Callable[[Checkpoint, Section, Sampling], DiffusionPolicy]] = {
    "DiffusionUnetHybridImagePolicy": _read_hybrid,
    "DiffusionUnetImagePolicy": _read_image,
    "DiffusionUnetLowdimPolicy": _read_vector,
}


def build(
    checkpoint: Checkpoint,
    policy: Section,
    seen: Seen,
    net: UNet,
    samplers: Samplers,
    sampling: Sampling,
    *,
    horizon: int | None = None,
    first: int | None = None,
) -> DiffusionPolicy:
    """The policy of these parts; fills the checkpoint's features, normalizers and statistics. `first`: the chunk's
    first action in the horizon, by default the newest observation's. Raises ExportError."""
    horizon, steps = horizon or policy.integer("horizon"), policy.integer("n_obs_steps")
    first = steps - 1 if first is None else first
    _name_features(checkpoint, seen, net.action_size)
    return DiffusionPolicy(
        encoder=seen.encoder,
        unet=net,
        horizon=horizon,
        observation_steps=steps,
        chunk_size=_chunk_size(checkpoint, policy, horizon, first),
        samplers=samplers,
        table=samplers.table(sampling),
        weights=_weights(checkpoint, seen.encoder, net),
        normalizers=checkpoint.normalizers,
        begins=first,
    )


def published_name(name: str, net: UNet) -> str:
    """The name of one of the UNet's tensors in Diffusion Policy, which LeRobot and this project have renamed."""
    name = "model." + name.removeprefix(net.prefix)
    name = name.replace(".conv1.", ".blocks.0.").replace(".conv2.", ".blocks.1.")
    return re.sub(r"((?:down|up)_modules\.\d+\.2\.)", r"\1conv.", name)


def _weights(checkpoint: Checkpoint, encoder: KeyedEncoder, net: UNet) -> dict[str, torch.Tensor]:
    """The weights that run, as our networks name them, once every tensor of the file is accounted for."""
    names = {published_name(name, net): name for name in unet.expected_weights(net)}
    shapes = unet.expected_weights(net)
    expected = {published: shapes[name] for published, name in names.items()}
    for eye in encoder.eyes:
        expected |= eye.published()
    checkpoint.weights = {name: found for name, found in checkpoint.weights.items() if not UNUSED.match(name)}
    check_weights(checkpoint, expected)
    weights = {name: checkpoint.weights[published] for published, name in names.items()}
    for eye in encoder.eyes:
        try:
            weights |= eye.runnable(checkpoint.weights)
        except ExportError as error:
            raise ExportError(f"{checkpoint.weights_path}: {error}") from None
    return weights


def _name_features(checkpoint: Checkpoint, seen: Seen, action_size: int) -> None:
    where, weights, inputs = str(checkpoint.weights_path), checkpoint.weights, seen.encoder.inputs
    pictures = [Feature(name, "VISUAL", (3, height, width)) for name, height, width in inputs.images]
    checkpoint.inputs = (Feature(STATE, "STATE", (inputs.state_size,)), *pictures)
    checkpoint.outputs = (Feature(ACTION, "ACTION", (action_size,)),)
    normalizers: dict[str, Normalizer] = {
        STATE: linear_normalizer.joined(
            [linear_normalizer.vector(weights, key, size, where) for key, size in seen.vectors.items()]
        ),
        ACTION: linear_normalizer.vector(weights, ACTION, action_size, where),
    }
    for name in (picture.name for picture in pictures):
        key = name.removeprefix(IMAGES)
        normalizers[name] = linear_normalizer.picture(weights, key, where, imagenet=seen.imagenet)
    checkpoint.normalizers = normalizers
    for name, keys in ((STATE, tuple(seen.vectors)), (ACTION, (ACTION,))):
        if found := linear_normalizer.statistics(weights, keys):
            checkpoint.statistics[name] = found
    if len(seen.vectors) > 1:
        parts = ", ".join(f"{key} [{size}]" for key, size in seen.vectors.items())
        checkpoint.warnings.append(f"{STATE} is {parts}, one behind the other")


def _chunk_size(checkpoint: Checkpoint, policy: Section, horizon: int, first: int) -> int:
    """n_action_steps, or what the horizon has of them: the original cuts there without a word."""
    wanted, there = policy.integer("n_action_steps"), horizon - first
    if there < 1:
        raise ExportError(f"{policy.where}: a horizon of {horizon} ends before the chunk's first action, {first}")
    if wanted > there:
        checkpoint.warnings.append(
            f"{policy.where}: n_action_steps {wanted} does not fit into the horizon; the chunk has {there}"
        )
    return min(wanted, there)
