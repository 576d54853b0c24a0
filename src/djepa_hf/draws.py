"""Everything that is random in the losses of a training batch, drawn in one place."""

from dataclasses import dataclass, replace

import torch
from diffusers import SchedulerMixin

from .configuration_djepa import DJEPAConfig
from .masking import draw_num_masked, random_token_order


@dataclass
class TrainingDraws:
    """
    The random part of a training batch of `B` samples.

    Args:
        order (`torch.LongTensor` of shape `(B, N)`): places of the tokens, hidden ones first.
        num_masked (`int`): how many are hidden, the same for every sample.
        dropped_labels (`torch.BoolTensor` of shape `(B,)`): True where the null class takes the label's place.
        timesteps (`torch.Tensor` of shape `(draws, B, num_masked)`): noise levels of hidden tokens.
        noise (`torch.Tensor` of shape `(draws, B, num_masked, C)`): float32.
    """

    order: torch.LongTensor
    num_masked: int
    dropped_labels: torch.BoolTensor
    timesteps: torch.Tensor
    noise: torch.Tensor

    @property
    def hidden(self) -> torch.LongTensor:
        """Places of the hidden tokens, `(B, num_masked)`."""
        return self.order[:, : self.num_masked]

    @property
    def visible(self) -> torch.LongTensor:
        """Places of the visible tokens, `(B, N - num_masked)`."""
        return self.order[:, self.num_masked :]

    def rows(self, start: int, stop: int) -> "TrainingDraws":
        """The draws of some samples of the batch, as one process of many needs them."""
        return TrainingDraws(
            self.order[start:stop],
            self.num_masked,
            self.dropped_labels[start:stop],
            self.timesteps[:, start:stop],
            self.noise[:, start:stop],
        )


def at_noise_level(draws: TrainingDraws, level: float, token_scheduler: SchedulerMixin) -> TrainingDraws:
    """
    The same draws, but with all tokens equally noisy: where a loss is split by noise level.

    Args:
        draws ([`TrainingDraws`]): the others stay as they are.
        level (`float`): from 0, clean, to 1, nothing but noise.
        token_scheduler (`SchedulerMixin`): of the model.
    """
    if token_scheduler.config.prediction_type == "flow_matching":
        timestep = 1.0 - level
    else:
        timestep = round(level * (token_scheduler.config.num_train_timesteps - 1))
    return replace(draws, timesteps=torch.full_like(draws.timesteps, timestep))


def draw_training(
    config: DJEPAConfig,
    token_scheduler: SchedulerMixin,
    batch_size: int,
    device: torch.device | str | None = None,
    seed: int | None = None,
    order: torch.LongTensor | None = None,
    num_masked: int | None = None,
    num_draws: int | None = None,
) -> TrainingDraws:
    """
    Draws what a training batch needs.

    Args:
        config ([`DJEPAConfig`]): sizes, mask ratio, label dropout and draws per token.
        token_scheduler (`SchedulerMixin`): draws timesteps.
        batch_size (`int`): samples.
        device (`torch.device`, *optional*): where to draw.
        seed (`int`, *optional*): of all draws, which then depend on nothing else; the global generators are used
            without it.
        order, num_masked, num_draws (*optional*): instead of drawing them, or of `config.diffusion_batch_mul`.
    """
    on_cpu = on_device = None
    if seed is not None:
        on_cpu, on_device = torch.Generator().manual_seed(seed), torch.Generator(device or "cpu").manual_seed(seed)
    if num_masked is None:
        ratio = config.mask_ratio_min, config.mask_ratio_mean, config.mask_ratio_std
        num_masked = draw_num_masked(config.num_tokens, *ratio, generator=on_cpu)
    if order is None:
        order = random_token_order(batch_size, config.num_tokens, device, on_device)
    num_draws = num_draws or config.diffusion_batch_mul
    shape = (num_draws, batch_size, num_masked)
    return TrainingDraws(
        order,
        num_masked,
        torch.rand(batch_size, device=device, generator=on_device) < config.label_dropout_prob,
        token_scheduler.sample_timesteps(num_draws * batch_size * num_masked, device, on_device).reshape(shape),
        torch.randn((*shape, config.token_size), device=device, generator=on_device),
    )
