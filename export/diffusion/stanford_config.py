"""What the configurations of Diffusion Policy and of its relatives have in common: inputs, UNet, noise scheduler.

`export.diffusion.stanford` and `export.diffusion.consistency_policy` call these for their policies. Configurations
leave out what the code has a default for, so the defaults here are those of the published code and of diffusers;
whatever else would change numbers is refused by name. Source: diffusion_policy/policy of Chi et al. 2023
(arXiv:2303.04137).
"""

from __future__ import annotations

from dataclasses import dataclass

from device.bundle import STATE
from export.checkpoint import Checkpoint
from export.diffusion.samplers import DiffusionSamplers, Samplers
from export.diffusion.schedule import NoiseSchedule
from export.diffusion.unet import UNet
from export.errors import ExportError
from export.readers.hydra_config import Section

IMAGES = "observation.images."
VECTORS = "DiffusionUnetLowdimPolicy"  # the one whose observation is no global condition by default
SOLVERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}
# fmt: off
SCHEDULER_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample", "clip_sample_range",
    "prediction_type", "variance_type", "set_alpha_to_one", "steps_offset",
)
# fmt: on


@dataclass(frozen=True)
class Shape:
    """shape_meta: keys of vectors with their sizes and of pictures with height and width, in the file's order."""

    vectors: dict[str, int]
    pictures: dict[str, tuple[int, int]]
    order: tuple[str, ...]
    action_size: int

    def image(self, key: str) -> tuple[str, int, int]:
        return (f"{IMAGES}{key}", *self.pictures[key])


def read_shape(policy: Section) -> Shape:
    """shape_meta. Raises ExportError for what is neither a vector nor an RGB picture."""
    meta = policy.section("shape_meta")
    action, observed = meta.section("action").integers("shape"), meta.section("obs")
    if len(action) != 1:
        raise ExportError(f"{meta.where}.action.shape should be one number, found {list(action)}")
    shape = Shape({}, {}, tuple(observed.values), action[0])
    for key in shape.order:
        entry = observed.section(key)
        size, kind = entry.integers("shape"), entry.given("type", "low_dim")
        if kind == "low_dim" and len(size) == 1:
            shape.vectors[key] = size[0]
        elif kind == "rgb" and len(size) == 3 and size[0] == 3:
            shape.pictures[key] = (size[1], size[2])
        else:
            raise ExportError(
                f"{entry.where}: type {kind!r} of shape {list(size)} is not supported; supported are low_dim [n] and "
                "rgb [3, height, width]"
            )
    if not shape.vectors:
        raise ExportError(
            f"{observed.where} has no low_dim key; a bundle's policy sees the joints' positions ({STATE}), so one is "
            "needed"
        )
    return shape


def read_unet(policy: Section, network: Section, action_size: int, features: int, *, times: int = 1) -> UNet:
    """The network's shape from the section that has it; `features` of one observation step."""
    if policy.given("obs_as_local_cond") or not policy.boolean("obs_as_global_cond", policy.target() != VECTORS):
        raise ExportError(
            f"{policy.where}.obs_as_global_cond: {policy.target()} that is conditioned in another way (by inpainting, "
            "or locally) is not supported; train it with obs_as_global_cond"
        )
    try:
        return UNet(
            action_size=action_size,
            condition_size=policy.integer("n_obs_steps") * features,
            embedding_size=network.integer("diffusion_step_embed_dim", 256 if times == 1 else 128),
            times=times,
            down_dims=network.integers("down_dims", (256, 512, 1024)),
            kernel_size=network.integer("kernel_size", 5),
            groups=network.integer("n_groups", 8),
            film_scale=network.boolean("cond_predict_scale", True),
        )
    except ExportError as error:
        known = str(error).startswith(network.where)
        raise ExportError(str(error) if known else f"{network.where}: {error}") from None


def read_samplers(checkpoint: Checkpoint, policy: Section) -> Samplers:
    """noise_scheduler, with the defaults of diffusers, and num_inference_steps."""
    scheduler = policy.section("noise_scheduler")
    if scheduler.target() not in SOLVERS:
        raise ExportError(
            f"{scheduler.where}: {scheduler.target()} is not supported; supported are {', '.join(SOLVERS)}"
        )
    scheduler.refuse_others(SCHEDULER_KEYS)
    solver, trained = SOLVERS[scheduler.target()], scheduler.integer("num_train_timesteps", 1000)
    try:
        schedule = NoiseSchedule(
            num_train_timesteps=trained,
            beta_schedule=str(scheduler.given("beta_schedule", "linear")),
            beta_start=scheduler.number("beta_start", 0.0001),
            beta_end=scheduler.number("beta_end", 0.02),
            prediction_type=str(scheduler.given("prediction_type", "epsilon")),
            clip_sample=scheduler.boolean("clip_sample", True),
            clip_sample_range=scheduler.number("clip_sample_range", 1.0),
        )
    except ExportError as error:
        known = str(error).startswith(scheduler.where)
        raise ExportError(str(error) if known else f"{scheduler.where}: {error}") from None
    steps = trained if policy.given("num_inference_steps") is None else policy.integer("num_inference_steps")
    if solver == "ddpm" and steps < trained:
        checkpoint.warnings.append(
            f"{policy.where}.num_inference_steps: {steps} of {trained} steps of DDPM are taken as diffusers does it "
            "today; the version that Diffusion Policy asks for (0.11.1) skips steps without removing their noise"
        )
    return DiffusionSamplers(
        schedule=schedule,
        solver=solver,
        steps=min(steps, trained) if solver == "ddpm" else steps,
        variance_type=str(scheduler.given("variance_type", "fixed_small")),
        set_alpha_to_one=scheduler.boolean("set_alpha_to_one", True),
        steps_offset=int(scheduler.number("steps_offset", 0)),
    )
