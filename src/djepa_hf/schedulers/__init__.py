"""Token schedulers: noise path, training loss and sampler step of each objective, apart from any network."""

from .scheduling_ddpm_token import DDPMTokenScheduler
from .scheduling_flow_match_token import FlowMatchTokenScheduler
from .scheduling_utils import TokenSchedulerOutput

TOKEN_SCHEDULERS = {"diffusion": DDPMTokenScheduler, "flow_matching": FlowMatchTokenScheduler}


def token_scheduler_for(objective: str, **options) -> DDPMTokenScheduler | FlowMatchTokenScheduler:
    """The scheduler that trains and samples models of an objective (`DJEPAConfig.objective`), with its options."""
    return TOKEN_SCHEDULERS[objective](**options)


__all__ = [
    "TOKEN_SCHEDULERS",
    "DDPMTokenScheduler",
    "FlowMatchTokenScheduler",
    "TokenSchedulerOutput",
    "token_scheduler_for",
]
