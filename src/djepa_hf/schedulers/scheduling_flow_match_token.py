"""Flow matching on tokens (rectified flow, arXiv 2210.02747 and 2209.03003)."""

from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_utils import TokenSchedulerOutput, check_num_steps, look_up, per_token

_EVALUATIONS = {"euler": 1, "heun": 2, "midpoint": 2}  # per interval


class FlowMatchTokenScheduler(SchedulerMixin, ConfigMixin):
    """
    Straight paths from noise (t = 0) to clean tokens (t = 1), and steps along the predicted velocity.

    The model is given `t` in [0, 1] and predicts `clean - noise`. Tokens may have any leading axes. Mind the direction:
    diffusers' own flow-matching schedulers run from t = 1 (noise) to 0 and do not fit.

    Args:
        shift (`float`, defaults to 1.0):
            Where sampling spends its steps: `t' = t / (t + shift - shift * t)`. Above 1, more of them near the noise.
        prediction_type (`str`, defaults to `"flow_matching"`):
            The only prediction there is.
        solver (`"euler"`, `"heun"` or `"midpoint"`, defaults to `"euler"`):
            How sampling goes along. The last two are of second order: they evaluate the network twice per interval, and
            so make half as many steps with as many evaluations.

    Raises:
        ValueError: if `shift` is not positive, or there is no such solver or prediction.
    """

    order = 1
    init_noise_sigma = 1.0
    is_stochastic = False  # `step` adds no noise

    @register_to_config
    def __init__(
        self,
        shift: float = 1.0,
        prediction_type: str = "flow_matching",
        solver: Literal["euler", "heun", "midpoint"] = "euler",
    ):
        if shift <= 0:
            raise ValueError(f"`shift` must be positive, got {shift}.")
        if solver not in _EVALUATIONS:
            raise ValueError(f"`solver` must be one of {', '.join(_EVALUATIONS)}, got {solver!r}.")
        if prediction_type != "flow_matching":
            raise ValueError(f"`prediction_type` must be 'flow_matching', got {prediction_type!r}.")
        self.register_to_config(_use_default_values=[])  # see DDPMTokenScheduler
        self.set_timesteps(50)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None):
        """
        Prepares sampling with `num_inference_steps` network evaluations per token. Where a solver takes two per
        interval and their number is odd, the last interval is an Euler step.

        Sets `timesteps`, a float `torch.Tensor` of that length, from 0 on.

        Raises:
            ValueError: if the number is below 1.
        """
        check_num_steps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        num_intervals = -(-num_inference_steps // _EVALUATIONS[self.config.solver])
        times = torch.linspace(0, 1, num_intervals + 1, dtype=torch.float64, device="cpu")
        times = (times / (times + self.config.shift - self.config.shift * times)).float()
        second = {"euler": None, "heun": times[1:], "midpoint": (times[1:] + times[:-1]) / 2}[self.config.solver]
        evaluated = times[:-1] if second is None else torch.stack([times[:-1], second], dim=1).flatten()
        self.timesteps = evaluated[:num_inference_steps].to(device)
        self._starts, self._step_sizes = times[:-1].to(device), times.diff().to(device)
        self._evaluations_left, self._begun = num_inference_steps, None

    def sample_timesteps(
        self,
        num_tokens: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draws training timesteps, uniform over [0, 1), of shape `(num_tokens,)`."""
        return torch.rand(num_tokens, device=device, generator=generator)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The model takes samples as they are. Here because diffusers' samplers scale some."""
        return sample

    def scale_initial_noise(self, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """What sampling starts from: the noise times the temperature."""
        return temperature * noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Clean tokens to time `timesteps` on their way from noise.

        Args:
            original_samples, noise (`torch.Tensor` of shape `(M, C)`).
            timesteps (`torch.Tensor` of shape `(M,)`): 0 is noise, 1 is clean.
        """
        time = per_token(timesteps, noise)
        return time * original_samples + (1 - time) * noise

    def token_loss(
        self, model_output: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """
        Squared error of the velocity, per token.

        Args:
            model_output (`torch.Tensor` of shape `(M, C)`): for `add_noise(clean, noise, timesteps)`.
            clean, noise (`torch.Tensor` of shape `(M, C)`).
            timesteps (`torch.Tensor` of shape `(M,)`): do not weigh the loss.

        Returns:
            `torch.Tensor` of shape `(M,)`.
        """
        return ((model_output - (clean - noise)) ** 2).mean(-1)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenSchedulerOutput | tuple[torch.Tensor]:
        """
        One Euler step, free of state; or one evaluation of a solver of second order, which remembers the first one of
        an interval, so that steps must be asked for in the order of `timesteps`.

        Args:
            model_output (`torch.Tensor` of shape `(..., C)`): velocity.
            timestep (`float` or 0-d `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor` of shape `(..., C)`): noisy tokens.
            temperature, generator, variance_noise: the signature of all token schedulers. No step adds noise here;
                temperature acts in [`~FlowMatchTokenScheduler.scale_initial_noise`].

        Returns:
            [`TokenSchedulerOutput`], or a tuple if `return_dict` is `False`.
        """
        self._evaluations_left -= 1
        if self._begun is not None:
            start, velocity, size = self._begun
            slope = (velocity + model_output) / 2 if self.config.solver == "heun" else model_output
            prev_sample, self._begun = start + size * slope, None
        else:
            size = look_up(self._step_sizes, (self._starts - timestep).abs().argmin())
            if self.config.solver != "euler" and self._evaluations_left > 0:
                self._begun = sample, model_output, size
                size = size / 2 if self.config.solver == "midpoint" else size
            prev_sample = sample + size * model_output
        return TokenSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
