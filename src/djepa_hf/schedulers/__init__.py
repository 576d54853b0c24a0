"""Token schedulers: noise path, training loss and sampler step of each objective, apart from any network."""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from .scheduling_ddpm_token import DDPMTokenScheduler
from .scheduling_flow_match_token import FlowMatchTokenScheduler
from .scheduling_utils import TokenSchedulerOutput

TOKEN_SCHEDULERS = {"diffusion": DDPMTokenScheduler, "flow_matching": FlowMatchTokenScheduler}

SOLVERS = {
    "diffusion": {
        "ddpm": DDPMTokenScheduler,
        "ddim": DDIMScheduler,
        "dpmsolver++": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    },
    "flow_matching": dict.fromkeys(("euler", "heun", "midpoint"), FlowMatchTokenScheduler),
}


def solver_for(objective: str, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    A scheduler that samples in another way, with the configuration of the one given: its noise path above all. Those of
    diffusers choose timesteps in their own way, and know no temperature.

    Args:
        objective (`str`): of the model.
        name (`str`): one of `SOLVERS[objective]`.
        scheduler (`SchedulerMixin`): of the model's pipeline.

    Raises:
        ValueError: if the objective has no such solver.
    """
    if name not in SOLVERS[objective]:
        raise ValueError(
            f"The solvers for the objective {objective!r} are {', '.join(SOLVERS[objective])}, got {name!r}."
        )
    options = {"solver": name} if objective == "flow_matching" else {}
    return SOLVERS[objective][name].from_config(scheduler.config, **options)


def token_scheduler_for(objective: str, **options) -> DDPMTokenScheduler | FlowMatchTokenScheduler:
    """The scheduler that trains and samples models of an objective (`DJEPAConfig.objective`), with its options."""
    return TOKEN_SCHEDULERS[objective](**options)


__all__ = [
    "SOLVERS",
    "TOKEN_SCHEDULERS",
    "DDPMTokenScheduler",
    "FlowMatchTokenScheduler",
    "TokenSchedulerOutput",
    "solver_for",
    "token_scheduler_for",
]
