"""Consistency Policy's students: Diffusion Policy's hybrid policy with a UNet that is told two times and jumps.

`read_consistency_policy` takes what `export.readers.diffusion_policy` read. The published code runs the student itself;
its average, and the teacher that is saved with it, are left behind. It jumps once from noise to actions unless chaining
is asked for, here with `--chain` and `--chaining`, which also says how the times of the chain are read. Prasad et al.
2024, arXiv:2405.07503 (Aaditya-Prasad/consistency-policy); the table of steps is `export.diffusion.ctm`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.checkpoint import Checkpoint
from export.diffusion.ctm import CtmSchedule, ctm
from export.diffusion.policy import DiffusionPolicy
from export.diffusion.sampler import SamplerTable
from export.diffusion.stanford import HYBRID_KEYS, build
from export.diffusion.stanford_config import read_shape, read_unet
from export.diffusion.stanford_eyes import read_keypoint_eyes
from export.errors import ExportError
from export.readers.diffusion_policy import STUDENTS, policy_section
from export.readers.hydra_config import Section
from export.sampling import Chaining, Sampling

LEFT_BEHIND = ("model_ema.", "teacher.")
DEFAULT_CHAIN = ["D", 27, 54]  # of the published code
# Of training alone; dropout adds no tensors, and ctm_sampler and the losses are training's.
# fmt: off
OTHER_KEYS = (
    "inference_mode", "dropout_rate", "initial_ema_decay", "delta", "special_skip", "teacher_path",
    "teacher_time_embed", "use_kde", "kde_samples", "edm", "losses", "dsm_weights", "ctm_sampler", "chaining_times",
)
# fmt: on


def read_consistency_policy(checkpoint: Checkpoint, sampling: Sampling) -> DiffusionPolicy:
    """Check and convert a student's checkpoint. Raises ExportError."""
    policy = policy_section(checkpoint)
    if policy.target() not in STUDENTS:
        raise ExportError(f"{policy.where}: {policy.target()} is not supported; supported are {', '.join(STUDENTS)}")
    policy.refuse_others((*HYBRID_KEYS, *OTHER_KEYS))
    checkpoint.weights = {
        name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(LEFT_BEHIND)
    }
    shape = read_shape(policy)
    seen = read_keypoint_eyes(checkpoint, policy, shape)
    net = read_unet(policy, policy, shape.action_size, seen.encoder.feature_size, times=2)
    samplers = CtmSamplers(_schedule(policy.section("noise_scheduler")), *_chain(policy))
    student = build(checkpoint, policy, seen, net, samplers, sampling)
    _warn(checkpoint, policy, student)
    return student


@dataclass(frozen=True)
class CtmSamplers:
    """One jump, or one more for each of the first of `times`, which the published code reads as `reading`. See
    export.diffusion.samplers.Samplers."""

    schedule: CtmSchedule
    times: tuple[float, ...]
    reading: Chaining

    @property
    def distilled(self) -> bool:
        return True

    def table(self, sampling: Sampling) -> SamplerTable:
        """See Samplers.table. Asked for a reading alone, it chains all times."""
        if sampling.solver or sampling.steps or sampling.spacing:
            raise ExportError("a Consistency Policy has no solver, steps or spacing to choose; it has --chain STEPS")
        longest = 1 + len(self.times)
        chain = sampling.chain if sampling.chain is not None else longest if sampling.chaining else 1
        if not 1 <= chain <= longest:
            known = ", ".join(f"{time:g}" for time in self.times) or "none"
            raise ExportError(f"chain: expected 1 to {longest} steps, found {chain}; the chaining times are {known}")
        return ctm(self.times[: chain - 1], reading=sampling.chaining or self.reading, schedule=self.schedule)


def _schedule(scheduler: Section) -> CtmSchedule:
    """Of its keys, those that inference reads; the others are training's."""
    if scheduler.target() != "CTM_Scheduler":
        raise ExportError(f"{scheduler.where}: {scheduler.target()} is not supported; supported is CTM_Scheduler")
    return CtmSchedule(
        time_min=scheduler.number("time_min", 0.02),
        time_max=scheduler.number("time_max", 80.0),
        rho=scheduler.number("rho", 7.0),
        bins=scheduler.integer("bins", 80),
        data_std=scheduler.number("data_std", 0.5),
        scaling=str(scheduler.given("scaling", "boundary")),
    )


def _chain(policy: Section) -> tuple[tuple[float, ...], Chaining]:
    """chaining_times: a letter, then times. The published code takes them for bins after "C" only."""
    found: Any = policy.given("chaining_times", DEFAULT_CHAIN)
    if not isinstance(found, list) or not found or any(type(time) not in (int, float) for time in found[1:]):
        raise ExportError(f"{policy.where}.chaining_times should be a letter and times, found {found!r}")
    return tuple(float(time) for time in found[1:]), "bins" if found[0] == "C" else "sigma"


def _warn(checkpoint: Checkpoint, policy: Section, student: DiffusionPolicy) -> None:
    if policy.boolean("use_kde", False):
        checkpoint.warnings.append(
            f"{policy.where}.use_kde: the original draws kde_samples chunks and takes the densest; the bundle draws one"
        )
    if student.table.steps > 1:
        times = ", ".join(f"{sigma:.4g}" for sigma in student.table.column("k_noise")[:-1])
        read = student.table.spacing
        other = "the paper means bins: --chaining bins" if read == "sigma" else "the published default is sigma"
        checkpoint.warnings.append(f"chaining times are read as {read}: noise of scale {times} ({other})")
