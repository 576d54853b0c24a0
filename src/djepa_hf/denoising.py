"""Noise and features to tokens: the inner loop of sampling (D-JEPA, arXiv 2410.03755, section 3.3)."""

import copy
import inspect
from collections.abc import Iterator
from functools import partial

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .compilation import CUDAGraphs

# Rows of conditions that are worked on at once. A few tokens leave most of a matrix product's speed unused, because it
# waits for the weights; a thousand do not.
MODULATED_ROWS = 1024


class TokenDenoiser:
    """
    Denoises the tokens of all autoregressive steps of one call. What is the same in several of them is computed once.

    Timesteps and the schedulers' coefficients stay on the CPU, where Python reads them without waiting for an
    accelerator.

    Args:
        network (`DenoisingMLP`): predicts noise or velocity.
        scheduler (`SchedulerMixin`): stays as it is.
        temperature (`float`): factor on the noise that steps add, or on the initial noise, where the scheduler has it.
        generator (`torch.Generator` or list of them, *optional*): draws the noise of ancestral steps; one for all, or
            one for each sample.
        max_rows (`int`, *optional*): tokens that the network sees at once, the null class's included; all if not given.
        graphs ([`CUDAGraphs`], *optional*): plays the loops of token schedulers back, where the network is on a CUDA
            device to stay.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler: SchedulerMixin,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        max_rows: int | None = None,
        graphs: CUDAGraphs | None = None,
    ):
        self.network, self.scheduler, self.max_rows = network, scheduler, max_rows
        self.temperature, self.generator, self.graphs = temperature, generator, graphs
        self._prepared: dict[int, SchedulerMixin] = {}
        self._time_embeddings: dict[int, torch.Tensor] = {}

    def prepare(self, num_steps: int) -> SchedulerMixin:
        """
        The scheduler with its timesteps set.

        Raises:
            ValueError: if it cannot make so many steps.
        """
        if num_steps not in self._prepared:
            self._prepared[num_steps] = copy.deepcopy(self.scheduler)
            self._prepared[num_steps].set_timesteps(num_steps)
        return self._prepared[num_steps]

    @torch.no_grad()
    def __call__(
        self, noise: torch.Tensor, conditioning: torch.Tensor, num_steps: int, guidance: float | None = None
    ) -> torch.Tensor:
        """
        Denoises some tokens.

        Args:
            noise (`torch.Tensor` of shape `(B, n, C)`): float32.
            conditioning (`torch.Tensor` of shape `(B, n, P)`): their features; with guidance `(2B, n, P)`, those for
                the null class behind the others.
            num_steps (`int`): network evaluations.
            guidance (`float`, *optional*): scale of classifier-free guidance; without it, there is no null class.

        Returns:
            `torch.Tensor` of shape `(B, n, C)`, float32.
        """
        if num_steps not in self._time_embeddings:  # not before: offloaded weights have just arrived
            timesteps = self.prepare(num_steps).timesteps.to(noise.device)
            self._time_embeddings[num_steps] = self.network.time_embedding(timesteps).unsqueeze(1)
        inputs = {"noise": noise, "conditioning": conditioning, "time_embeddings": self._time_embeddings[num_steps]}
        is_ours = hasattr(self.scheduler, "is_stochastic")
        if is_ours and self.scheduler.is_stochastic:
            inputs["step_noise"] = self._draw(num_steps, noise)
        if self.graphs is None or not is_ours:
            return self._loop(num_steps, **inputs, guidance=guidance)
        if guidance is not None:  # what is played back knows no numbers of Python's
            inputs["guidance"] = torch.full((), guidance, device=noise.device)
        weights = tuple(weight.data_ptr() for weight in self.network.parameters())
        key = (num_steps, self.temperature, repr(self.scheduler.config), weights, _adapter_state(self.network))
        return self.graphs(key, partial(self._loop, num_steps), **inputs)

    def _draw(self, num_steps: int, like: torch.Tensor) -> torch.Tensor:
        """The noise of all steps, `(T, *like.shape)`: generators of the CPU work there, and cost one copy together."""
        generators = self.generator if isinstance(self.generator, list) else [self.generator]
        on_cpu = any(generator is not None and generator.device.type == "cpu" for generator in generators)
        device = torch.device("cpu") if on_cpu else like.device
        draws = [randn_tensor(like.shape, self.generator, device, like.dtype) for _ in range(num_steps)]
        return torch.stack(draws).to(like.device, non_blocking=True)

    def _loop(
        self,
        num_steps: int,
        noise: torch.Tensor,
        conditioning: torch.Tensor,
        time_embeddings: torch.Tensor,
        guidance: float | torch.Tensor | None = None,
        step_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `__call__` does, the noise of all steps `(T, B, n, C)` being there."""
        scheduler = copy.deepcopy(self.prepare(num_steps))  # some change as they go
        accepted = inspect.signature(scheduler.step).parameters
        options = {"temperature": self.temperature, "generator": self.generator}
        options = {name: value for name, value in options.items() if name in accepted}
        if hasattr(scheduler, "scale_initial_noise"):
            sample = scheduler.scale_initial_noise(noise, self.temperature)
        else:
            sample = noise * scheduler.init_noise_sigma
        modulations = self._modulations(conditioning.flatten(0, 1), time_embeddings)
        for i, (timestep, modulation) in enumerate(zip(scheduler.timesteps, modulations, strict=True)):
            output = self._evaluate(scheduler.scale_model_input(sample, timestep), *modulation, guidance)
            if step_noise is not None:
                options["variance_noise"] = step_noise[i]
            sample = scheduler.step(output, timestep, sample, **options).prev_sample
        return sample

    def _modulations(
        self, conditioning: torch.Tensor, time_embeddings: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor | None, tuple[torch.Tensor, ...] | None]]:
        """For each timestep what the network takes beside the tokens: a condition, or what it makes of one."""
        network = self.network
        condition = network.condition_projection(conditioning.to(network.input_projection.weight.dtype))
        at_once = MODULATED_ROWS // len(condition)
        if at_once < 2:
            yield from ((embedding + condition, None) for embedding in time_embeddings)
            return
        for some in time_embeddings.split(at_once):
            modulations = network.modulate(some + condition)  # (timesteps, M, ...) each
            yield from ((None, modulation) for modulation in zip(*modulations, strict=True))

    def _evaluate(
        self,
        noisy: torch.Tensor,
        condition: torch.Tensor | None,
        modulations: tuple[torch.Tensor, ...] | None,
        guidance: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """The network's output for noisy tokens `(B, n, C)` as the scheduler wants it, guided, in float32."""
        size, dtype = noisy.shape[-1], self.network.input_projection.weight.dtype
        if guidance is not None:  # both halves denoise the same noisy tokens
            noisy = torch.cat([noisy, noisy])
        tokens = noisy.flatten(0, 1).to(dtype)
        if condition is None:
            output = self.network(tokens, None, modulations)
        else:
            rows = self.max_rows or len(tokens)
            parts = zip(tokens.split(rows), condition.split(rows), strict=True)
            output = torch.cat([self.network(*part) for part in parts])
        output = output.float().unflatten(0, noisy.shape[:2])
        if guidance is not None:
            output, null_output = output.chunk(2)
            prediction, null_prediction = output[..., :size], null_output[..., :size]
            guided = null_prediction + guidance * (prediction - null_prediction)
            output = torch.cat([guided, output[..., size:]], dim=-1)  # the variance is the class's own
        return output if getattr(self.scheduler, "takes_variance", False) else output[..., :size]


def _adapter_state(network: nn.Module) -> tuple:
    """What peft's layers do, as far as it is no weight: which adapters are at work, and how strongly."""
    layers = (module for module in network.modules() if hasattr(module, "base_layer"))
    return tuple(
        (*layer.active_adapters, layer.disable_adapters, *layer.merged_adapters, *layer.scaling.items())
        for layer in layers
    )
