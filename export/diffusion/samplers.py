"""Which tables of steps one policy can be sampled by: its configuration's own, and those that a person may choose.

A reader puts one of these into a DiffusionPolicy; `export --solver`, `sweep` and `distill` ask it for tables. A policy
that was not distilled takes any solver, with no more steps than it was trained on and, unless forced, no fewer than
MIN_STEPS. A student has the steps that it was distilled for and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from export.diffusion.consistency import DEFAULT_TIMESTEPS, MIN_SIGNAL, consistency
from export.diffusion.sampler import SamplerTable
from export.diffusion.schedule import NoiseSchedule
from export.diffusion.solvers import ddim, ddpm, dpmpp
from export.errors import ExportError
from export.sampling import MIN_STEPS, Sampling

CONSISTENCY = "consistency"


class Samplers(Protocol):
    """Implementations are frozen dataclasses."""

    @property
    def distilled(self) -> bool:
        """Trained to need few steps."""

    def table(self, sampling: Sampling) -> SamplerTable:
        """As chosen, and as the checkpoint says where nothing is. Raises ExportError for what this policy cannot do."""


@dataclass(frozen=True, kw_only=True)
class DiffusionSamplers:
    """A policy as it was trained: `schedule`, and the scheduler that its configuration names."""

    schedule: NoiseSchedule
    solver: str  # ddpm or ddim
    steps: int
    spacing: str = "leading"
    variance_type: str = "fixed_small"
    set_alpha_to_one: bool = True
    steps_offset: int = 0

    @property
    def distilled(self) -> bool:
        return False

    def table(self, sampling: Sampling) -> SamplerTable:
        """See Samplers.table."""
        if sampling.chaining is not None or sampling.chain is not None:
            raise ExportError("chaining is Consistency Policy's; this policy takes a solver, steps and a spacing")
        if sampling.steps is not None and sampling.steps < MIN_STEPS and not sampling.force:
            raise ExportError(
                f"steps: {sampling.steps} steps of a policy that was not distilled answer between its modes; choose at "
                f"least {MIN_STEPS}, distill it, or say that this is meant with --force"
            )
        solver, steps = sampling.solver or self.solver, sampling.steps or self.steps
        # Another solver than the configuration's is taken with the spacing that diffusers gives it.
        spacing = sampling.spacing or (self.spacing if solver == self.solver else USUAL_SPACING[solver])
        offset = self.steps_offset if spacing == "leading" else 0
        if solver == "ddpm":
            return ddpm(self.schedule, steps, spacing, variance_type=self.variance_type, steps_offset=offset)
        if solver == "ddim":
            return ddim(self.schedule, steps, spacing, set_alpha_to_one=self.set_alpha_to_one, steps_offset=offset)
        return dpmpp(self.schedule, steps, spacing, steps_offset=offset)


USUAL_SPACING = {"ddpm": "leading", "ddim": "leading", "dpmpp": "linspace"}  # diffusers' defaults


@dataclass(frozen=True, kw_only=True)
class ConsistencySamplers:
    """A student by consistency distillation of a policy with this `schedule`; see export.diffusion.consistency."""

    schedule: NoiseSchedule
    timesteps: tuple[int, ...] = DEFAULT_TIMESTEPS
    sigma_data: float = 1.0
    min_signal: float = MIN_SIGNAL

    @property
    def distilled(self) -> bool:
        return True

    def table(self, sampling: Sampling) -> SamplerTable:
        """See Samplers.table."""
        if sampling.chosen:
            raise ExportError(
                f"this policy was distilled to {len(self.timesteps)} steps, so there is no solver, steps or spacing to "
                "choose; export its teacher for that"
            )
        return consistency(self.schedule, self.timesteps, sigma_data=self.sigma_data, min_signal=self.min_signal)

    def document(self) -> dict[str, Any]:
        """sampler.json of the student's checkpoint, which `read_student` reads."""
        return {
            "solver": CONSISTENCY,
            "timesteps": list(self.timesteps),
            "sigma_data": self.sigma_data,
            "min_signal": self.min_signal,
        }


def read_student(document: Mapping[str, Any], schedule: NoiseSchedule, where: str) -> ConsistencySamplers:
    """sampler.json beside a student's config.json: solver and timesteps, and sigma_data and min_signal where they are
    not the usual. Raises ExportError; `where` names the file."""
    if document.get("solver") != CONSISTENCY:
        raise ExportError(f"{where}: solver: {document.get('solver')!r} is not supported; supported is {CONSISTENCY}")
    checks: dict[str, Callable[[Any], bool]] = {
        "solver": lambda _: True,
        "timesteps": lambda found: isinstance(found, list) and all(type(time) is int for time in found),
        "sigma_data": _is_number,
        "min_signal": _is_number,
    }
    if unknown := sorted(set(document) - set(checks)):
        raise ExportError(f"{where}: {unknown[0]} is unknown; known are {', '.join(checks)}")
    for key, value in document.items():
        if not checks[key](value):
            raise ExportError(
                f"{where}: {key}: {value!r} is no {'list of integers' if key == 'timesteps' else 'number'}"
            )
    if "timesteps" not in document:
        raise ExportError(f"{where}: timesteps is missing: the steps that the student was distilled for")
    given = {key: value for key, value in document.items() if key != "solver"}
    return ConsistencySamplers(schedule=schedule, **given | {"timesteps": tuple(given["timesteps"])})


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found > 0
