"""Flow matching on tokens (rectified flow, arXiv 2210.02747 and 2209.03003)."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_utils import TokenSchedulerOutput, check_num_steps, per_token


class FlowMatchTokenScheduler(SchedulerMixin, ConfigMixin):
    """
    Straight paths from noise (t = 0) to clean tokens (t = 1), and Euler steps along the predicted velocity.

    The model is given `t` in [0, 1] and predicts `clean - noise`. Tokens may have any leading axes. Mind the direction:
    diffusers' own flow-matching schedulers run from t = 1 (noise) to 0 and do not fit.

    Args:
        shift (`float`, defaults to 1.0):
            Where sampling spends its steps: `t' = t / (t + shift - shift * t)`. Above 1, more of them near the noise.
        prediction_type (`str`, defaults to `"flow_matching"`):
            The only prediction there is.

    Raises:
        ValueError: if `shift` is not positive or `prediction_type` is another.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, shift: float = 1.0, prediction_type: str = "flow_matching"):
        if shift <= 0:
            raise ValueError(f"`shift` must be positive, got {shift}.")
        if prediction_type != "flow_matching":
            raise ValueError(f"`prediction_type` must be 'flow_matching', got {prediction_type!r}.")
        self.register_to_config(_use_default_values=[])  # see DDPMTokenScheduler
        self.set_timesteps(50)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None):
        """
        Prepares sampling with `num_inference_steps` network evaluations per token.

        Sets `timesteps`, a float `torch.Tensor` of that length, ascending from 0.

        Raises:
            ValueError: if the number is below 1.
        """
        check_num_steps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        times = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64, device="cpu")
        times = (times / (times + self.config.shift - self.config.shift * times)).float().to(device)
        self.timesteps = times[:-1]
        self._step_sizes = times.diff()

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
        One Euler step. Free of state: steps may be asked for in any order.

        Args:
            model_output (`torch.Tensor` of shape `(..., C)`): velocity.
            timestep (`float` or 0-d `torch.Tensor`): one of `timesteps`.
            sample (`torch.Tensor` of shape `(..., C)`): noisy tokens.
            temperature, generator, variance_noise: the signature of all token schedulers. An Euler step adds no noise;
                temperature acts in [`~FlowMatchTokenScheduler.scale_initial_noise`].

        Returns:
            [`TokenSchedulerOutput`], or a tuple if `return_dict` is `False`.
        """
        nearest = (self.timesteps - timestep).abs().argmin()
        prev_sample = sample + self._step_sizes[nearest] * model_output
        return TokenSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
