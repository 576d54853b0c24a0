"""DDPM on tokens, with a learned variance (improved DDPM, arXiv 2102.09672)."""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .scheduling_utils import TokenSchedulerOutput, check_num_steps, look_up, per_token


class DDPMTokenScheduler(SchedulerMixin, ConfigMixin):
    """
    Gaussian diffusion of tokens: cosine alpha-bar schedule, noise prediction, and a variance that the model learns
    between the posterior's (lower) and beta (upper).

    The model gives `2C` numbers for a token of `C`: the noise, then the raw variance `v`, where -1 stands for the lower
    and 1 for the upper end. Tokens may have any leading axes.

    The configuration speaks diffusers' language, so that its schedulers can take this one's place in a pipeline:
    `DDIMScheduler.from_config(pipe.scheduler.config)`.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Noise levels in training. Timestep 0 is nearly clean.
        beta_schedule (`str`, defaults to `"squaredcos_cap_v2"`):
            The only schedule there is, named as in diffusers.
        prediction_type (`str`, defaults to `"epsilon"`):
            The only prediction there is.
        timestep_spacing (`"linspace"` or `"leading"`, defaults to `"linspace"`):
            `"linspace"` spreads the sampling timesteps linearly over all training timesteps, rounded, as the official
            code does. `"leading"` starts each of equal parts, 0 included, and so leaves out the noisiest end, where
            the clean tokens are the predicted noise's error times 20,000: kinder to models that have not trained long.
        clip_sample (`bool`, defaults to `False`):
            Always off: latent tokens have no bounds. Recorded because diffusers' schedulers would clip by default.

    Raises:
        ValueError: if an argument has a value that does not exist.
    """

    order = 1
    init_noise_sigma = 1.0
    is_stochastic = True  # `step` adds noise
    takes_variance = True  # `step` wants the model's raw variance beside its noise; diffusers' schedulers do not
    _compatibles = [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        clip_sample: bool = False,
    ):
        only = {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "clip_sample": False,
        }
        for name, value in only.items():
            if getattr(self.config, name) != value:
                raise ValueError(f"`{name}` must be {value!r}, got {getattr(self.config, name)!r}.")
        if timestep_spacing not in ("linspace", "leading"):
            raise ValueError(f"`timestep_spacing` must be 'linspace' or 'leading', got {timestep_spacing!r}.")
        # diffusers drops what it believes to be a default when another class takes the configuration over: without this
        # line, its schedulers would run on their own linear schedule.
        self.register_to_config(_use_default_values=[])
        steps = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
        alpha_bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        self._alphas_cumprod = (1 - betas).cumprod(0)  # float64 on the CPU, the source of all tables below
        self._training = _DiffusionTables(self._alphas_cumprod)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None):
        """
        Prepares sampling with `num_inference_steps` network evaluations per token.

        Sets `timesteps`, a `torch.LongTensor` of that length, descending.

        Raises:
            ValueError: if the number is not in `1 .. num_train_timesteps`.
        """
        check_num_steps(num_inference_steps, self.config.num_train_timesteps)
        self.num_inference_steps = num_inference_steps
        if self.config.timestep_spacing == "leading":
            part = self.config.num_train_timesteps // num_inference_steps
            ascending = part * torch.arange(num_inference_steps, device="cpu")
        else:
            last = self.config.num_train_timesteps - 1
            ascending = torch.linspace(0, last, num_inference_steps, dtype=torch.float64, device="cpu").round().long()
        self.timesteps = ascending.flip(0).to(device)
        # The kept timesteps form a shorter diffusion of their own (improved DDPM, section 4). Looking its row up by
        # timestep, on the device, keeps the step free of state and of waiting.
        rows = torch.zeros(self.config.num_train_timesteps, dtype=torch.long, device="cpu")
        rows[ascending] = torch.arange(num_inference_steps, device="cpu")
        self._row_of_timestep = rows.to(device)
        self._sampling = _DiffusionTables(self._alphas_cumprod[ascending]).to(device)

    def sample_timesteps(
        self,
        num_tokens: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor:
        """Draws training timesteps, uniform over `0 .. num_train_timesteps - 1`, of shape `(num_tokens,)`."""
        return torch.randint(self.config.num_train_timesteps, (num_tokens,), device=device, generator=generator)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The model takes samples as they are. Here because diffusers' samplers scale some."""
        return sample

    def scale_initial_noise(self, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """What sampling starts from: the noise as it is. Temperature acts on the noise of each step instead."""
        return noise

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.LongTensor
    ) -> torch.Tensor:
        """
        Clean tokens to noise level `timesteps` of the training schedule.

        Args:
            original_samples, noise (`torch.Tensor` of shape `(M, C)`).
            timesteps (`torch.LongTensor` of shape `(M,)`): 0 is nearly clean.
        """
        tables = self._training_tables(timesteps)
        signal = look_up(tables.sqrt_alphas_cumprod, timesteps)
        spread = look_up(tables.sqrt_one_minus_alphas_cumprod, timesteps)
        return per_token(signal, noise) * original_samples + per_token(spread, noise) * noise

    def token_loss(
        self, model_output: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.LongTensor
    ) -> torch.Tensor:
        """
        The hybrid loss of improved DDPM, per token: squared error of the noise, plus the variational bound in bits per
        dimension, which trains the variance alone (its mean is detached) and is not rescaled.

        Args:
            model_output (`torch.Tensor` of shape `(M, 2C)`): for `add_noise(clean, noise, timesteps)`.
            clean, noise (`torch.Tensor` of shape `(M, C)`).
            timesteps (`torch.LongTensor` of shape `(M,)`).

        Returns:
            `torch.Tensor` of shape `(M,)`.
        """
        predicted_noise, raw_variance = model_output.chunk(2, dim=-1)
        tables = self._training_tables(timesteps)
        noisy = self.add_noise(clean, noise, timesteps)
        true_mean = tables.posterior_mean(clean, noisy, timesteps)
        true_log_variance = per_token(look_up(tables.posterior_log_variance, timesteps), clean)
        mean = tables.posterior_mean(tables.predict_clean(noisy, predicted_noise.detach(), timesteps), noisy, timesteps)
        log_variance = tables.learned_log_variance(raw_variance, timesteps)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        likelihood = _discretized_gaussian_log_likelihood(clean, mean, 0.5 * log_variance)
        bound = torch.where(per_token(timesteps == 0, clean), -likelihood, divergence)
        return ((predicted_noise - noise) ** 2).mean(-1) + bound.mean(-1) / math.log(2)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.LongTensor | int,
        sample: torch.Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenSchedulerOutput | tuple[torch.Tensor]:
        """
        One ancestral sampling step. Free of state: steps may be asked for in any order.

        Args:
            model_output (`torch.Tensor` of shape `(..., 2C)`): noise and raw variance.
            timestep (`int` or 0-d `torch.LongTensor`): one of `timesteps`.
            sample (`torch.Tensor` of shape `(..., C)`): noisy tokens.
            temperature (`float`, defaults to 1.0): factor on the noise that the step adds.
            generator (`torch.Generator` or list of them, *optional*): draws that noise.
            variance_noise (`torch.Tensor` of shape `(..., C)`, *optional*): that noise itself.

        Returns:
            [`TokenSchedulerOutput`], or a tuple if `return_dict` is `False`.
        """
        noise, raw_variance = model_output.chunk(2, dim=-1)
        row = look_up(self._row_of_timestep, torch.as_tensor(timestep, device=self._row_of_timestep.device))
        tables = self._sampling
        clean = tables.predict_clean(sample, noise, row)
        prev_sample = tables.posterior_mean(clean, sample, row)
        log_variance = tables.learned_log_variance(raw_variance, row)
        if variance_noise is None:
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        spread = temperature * (row > 0) * torch.exp(0.5 * log_variance)  # the last step adds no noise
        prev_sample = prev_sample + spread * variance_noise
        return TokenSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _training_tables(self, timesteps: torch.Tensor) -> "_DiffusionTables":
        if self._training.device != timesteps.device:
            self._training = self._training.to(timesteps.device)
        return self._training

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class _DiffusionTables:
    """
    The coefficients of a Gaussian diffusion, one row per timestep, in float32.

    They are computed in float64 on the CPU first: products of a thousand alphas near the end are 1e-9.
    """

    names = (
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "posterior_log_variance",
        "log_betas",
        "clean_coefficient",
        "noisy_coefficient",
    )

    def __init__(self, alphas_cumprod: torch.Tensor):
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        betas = 1 - alphas_cumprod / previous
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # the posterior of the first timestep is a point: its successor's variance stands in for log(0)
        variance = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else betas
        tables = {
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "posterior_log_variance": variance.log(),
            "log_betas": betas.log(),
            "clean_coefficient": betas * previous.sqrt() / (1 - alphas_cumprod),
            "noisy_coefficient": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        }
        for name, table in tables.items():
            setattr(self, name, table.float())

    @property
    def device(self) -> torch.device:
        return self.log_betas.device

    def to(self, device: torch.device | str | None) -> "_DiffusionTables":
        moved = object.__new__(type(self))
        for name in self.names:
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def predict_clean(self, noisy: torch.Tensor, noise: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        signal, spread = look_up(self.sqrt_alphas_cumprod, rows), look_up(self.sqrt_one_minus_alphas_cumprod, rows)
        return (noisy - per_token(spread, noisy) * noise) / per_token(signal, noisy)

    def posterior_mean(self, clean: torch.Tensor, noisy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (
            per_token(look_up(self.clean_coefficient, rows), clean) * clean
            + per_token(look_up(self.noisy_coefficient, rows), noisy) * noisy
        )

    def learned_log_variance(self, raw_variance: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        lower = per_token(look_up(self.posterior_log_variance, rows), raw_variance)
        upper = per_token(look_up(self.log_betas, rows), raw_variance)
        share = (raw_variance + 1) / 2
        return share * upper + (1 - share) * lower


def _discretized_gaussian_log_likelihood(
    values: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Log-likelihood of values in [-1, 1] that were rounded to 256 levels, under a Gaussian; elementwise."""

    def cumulative(x: torch.Tensor) -> torch.Tensor:
        # the tanh approximation of the normal distribution function, as in the official loss
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    centered, inverse_scales = values - means, torch.exp(-log_scales)
    upper = cumulative(inverse_scales * (centered + 1 / 255))
    lower = cumulative(inverse_scales * (centered - 1 / 255))
    # the outermost levels own the tails
    probability = torch.where(values < -0.999, upper, torch.where(values > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
