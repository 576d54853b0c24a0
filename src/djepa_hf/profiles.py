"""Named trade-offs between quality and time: what each does to the options of a call."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingProfile:
    """
    How much of the work that a call asks for is done.

    Args:
        inference_steps (`float`): share of the autoregressive steps, of more than `least_inference_steps` of them.
        denoising_steps (`float`): share of the denoising steps, of more than `least_denoising_steps` of them.
        solver (`str`, *optional*): how tokens are denoised, if the call does not say.
        null_refresh_interval (`int`): autoregressive steps between two looks at the null class, at least.
    """

    inference_steps: float = 1.0
    denoising_steps: float = 1.0
    solver: str | None = None
    null_refresh_interval: int = 1
    least_inference_steps: int = 8
    least_denoising_steps: int = 4

    def options(
        self,
        num_inference_steps: int,
        num_denoising_steps: int,
        final_denoising_steps: int | None = None,
        solver: str | None = None,
        null_refresh_interval: int = 1,
    ) -> dict[str, int | str | None]:
        """What the profile makes of options of [`DJEPAPipeline`]'s call, under the same names and in this order."""
        denoising_steps, final = num_denoising_steps, final_denoising_steps
        return {
            "num_inference_steps": _share_of(num_inference_steps, self.inference_steps, self.least_inference_steps),
            "num_denoising_steps": _share_of(denoising_steps, self.denoising_steps, self.least_denoising_steps),
            "final_denoising_steps": final and _share_of(final, self.denoising_steps, self.least_denoising_steps),
            "solver": solver or self.solver,
            "null_refresh_interval": max(null_refresh_interval, self.null_refresh_interval),
        }


# Chosen by measurement (README, "How fast"). Flow matching's paths are nearly straight, so that a solver of second
# order needs few steps; with the diffusion objective nothing does with few what ancestral steps do with many.
PROFILES = {
    "exact": {"diffusion": SamplingProfile(), "flow_matching": SamplingProfile()},
    "balanced": {
        "diffusion": SamplingProfile(denoising_steps=0.5, null_refresh_interval=2),
        "flow_matching": SamplingProfile(denoising_steps=0.16, solver="midpoint", null_refresh_interval=2),
    },
    "fast": {
        "diffusion": SamplingProfile(0.75, 0.16, null_refresh_interval=2, least_denoising_steps=8),
        "flow_matching": SamplingProfile(0.75, 0.12, "midpoint", null_refresh_interval=2),
    },
}


def find_profile(name: str, objective: str) -> SamplingProfile:
    """
    The profile of a name for models of an objective.

    Raises:
        ValueError: if there is no profile of that name.
    """
    if name not in PROFILES:
        raise ValueError(f"`profile` must be one of {', '.join(PROFILES)}, got {name!r}.")
    return PROFILES[name][objective]


def _share_of(number: int, share: float, least: int) -> int:
    return min(number, max(least, round(share * number)))
