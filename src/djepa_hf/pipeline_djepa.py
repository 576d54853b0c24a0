"""Class labels to images: generalized next-token prediction (D-JEPA, arXiv 2410.03755, Algorithm 1)."""

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel

from .compilation import CUDAGraphs, check_compilation
from .denoising import TokenDenoiser
from .hub import PipelineHubMixin
from .labels import find_label_id
from .latents import decode_samples
from .lora import DJEPALoraLoaderMixin
from .masking import (
    checkerboard_token_order,
    gather_tokens,
    num_denoising_steps_per_step,
    num_masked_per_step,
    random_token_order,
    scatter_tokens,
)
from .profiles import find_profile
from .schedulers import TOKEN_SCHEDULERS, solver_for

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TOKEN_ORDERS = ("random", "checkerboard")
GUIDANCE_SCHEDULES = ("linear", "constant")


class DJEPAPipeline(DJEPALoraLoaderMixin, PipelineHubMixin, DiffusionPipeline):
    """
    Class-conditional generation with D-JEPA, in the latent space of an autoencoder or in pixels.

    Args:
        transformer ([`DJEPAModel`]): the networks.
        scheduler ([`DDPMTokenScheduler`], [`FlowMatchTokenScheduler`] or a scheduler of diffusers that predicts noise):
            denoises tokens; must fit the model's objective.
        vae ([`~diffusers.AutoencoderKL`], *optional*): decodes latents. Without it samples are images in [-1, 1].

    Raises:
        ValueError: if the components do not fit each other.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "mask"]

    # annotated with base classes: a self-contained folder has its own copies of ours
    def __init__(self, transformer: PreTrainedModel, scheduler: SchedulerMixin, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._graphs: CUDAGraphs | None = None
        self.check_components()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Autoregressive steps of the running or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current autoregressive step."""
        return self._interrupt

    def get_label_ids(self, class_labels: int | str | list | torch.Tensor) -> list[int]:
        """
        Class ids of ids and names.

        Names are those of the model's `id2label`, or any comma-separated part of them. Where none is exactly the same,
        case and underscores do not matter.

        Args:
            class_labels (`int`, `str`, or list, tuple, array or tensor of them): nested ones are flattened row by row.

        Returns:
            `list[int]`.

        Raises:
            ValueError: if an id is out of range, a name unknown (the closest names are given) or that of several
                classes (their ids are given).
        """
        if isinstance(class_labels, torch.Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, list | tuple):
            return [i for label in class_labels for i in self.get_label_ids(label)]
        if isinstance(class_labels, str):
            return [find_label_id(class_labels, self.transformer.config.id2label)]
        num_labels = self.transformer.config.num_labels
        if not isinstance(class_labels, numbers.Integral) or isinstance(class_labels, bool):
            raise ValueError(f"`class_labels` must be class ids or names, got {class_labels!r}.")
        if not 0 <= class_labels < num_labels:
            raise ValueError(f"Class id {class_labels} is out of range: this model knows 0..{num_labels - 1}.")
        return [int(class_labels)]

    def check_components(self):
        """Raises a `ValueError` unless scheduler and VAE fit the model."""
        config = self.transformer.config
        expected = {"diffusion": "epsilon", "flow_matching": "flow_matching"}[config.objective]
        found = getattr(self.scheduler.config, "prediction_type", None)
        if found != expected:
            raise ValueError(
                f"The model's objective is {config.objective!r}, which needs a scheduler with prediction type "
                f"{expected!r}, such as {TOKEN_SCHEDULERS[config.objective].__name__}; "
                f"{type(self.scheduler).__name__} has {found!r}."
            )
        noise_path = getattr(self.scheduler.config, "beta_schedule", None)
        if config.objective == "diffusion" and noise_path != "squaredcos_cap_v2":
            raise ValueError(
                f"The scheduler's `beta_schedule` must be 'squaredcos_cap_v2', got {noise_path!r}: build it with "
                f"{type(self.scheduler).__name__}.from_config(DDPMTokenScheduler().config)."
            )
        if self.vae is not None and len(config.sample_shape) != 2:
            raise ValueError(f"A VAE decodes grids of rank 2; this model's has rank {len(config.sample_shape)}.")
        if self.vae is not None and self.vae.config.latent_channels != config.num_channels:
            raise ValueError(
                f"The VAE has {self.vae.config.latent_channels} latent channels, the model {config.num_channels}: they "
                "do not belong together."
            )
        factor = config.latent_scaling_factor
        if self.vae is not None and factor is not None and self.vae.config.scaling_factor != factor:
            raise ValueError(
                f"The model was trained on latents times {factor}, but the VAE's `scaling_factor` is "
                f"{self.vae.config.scaling_factor}. If it is the right VAE, load it with "
                f"AutoencoderKL.from_pretrained(..., scaling_factor={factor})."
            )

    def check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        num_denoising_steps: int,
        guidance_scale: float,
        guidance_schedule: str,
        temperature: float,
        num_images_per_label: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        token_order: torch.Tensor | str | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        final_denoising_steps: int | None = None,
        solver: str | None = None,
        profile: str = "exact",
        null_refresh_interval: int = 1,
        max_batch_size: int = 64,
    ):
        """Raises a `ValueError`, before any work, for the first argument of a call that cannot be right."""
        self.check_components()
        find_profile(profile, self.transformer.config.objective)
        self.scheduler_for(solver)
        config = self.transformer.config
        num_tokens = config.num_tokens
        if num_images_per_label < 1:
            raise ValueError(f"`num_images_per_label` must be at least 1, got {num_images_per_label}.")
        if batch_size == 0:
            raise ValueError("`class_labels` is empty: pass at least one class.")
        if not 1 <= num_inference_steps <= num_tokens:
            raise ValueError(
                f"`num_inference_steps` must lie in 1..{num_tokens}, because this model has {num_tokens} tokens and "
                f"every autoregressive step reveals at least one; got {num_inference_steps}."
            )
        if num_denoising_steps < 1:
            raise ValueError(f"`num_denoising_steps` must be at least 1, got {num_denoising_steps}.")
        if final_denoising_steps is not None and final_denoising_steps < 1:
            raise ValueError(f"`final_denoising_steps` must be at least 1, got {final_denoising_steps}.")
        if null_refresh_interval < 1:
            raise ValueError(f"`null_refresh_interval` must be at least 1, got {null_refresh_interval}.")
        if max_batch_size < 1:
            raise ValueError(f"`max_batch_size` must be at least 1, got {max_batch_size}.")
        if guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"`guidance_schedule` must be one of {GUIDANCE_SCHEDULES}, got {guidance_schedule!r}.")
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(f"`guidance_scale` must be finite and not negative, got {guidance_scale}.")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and not negative, got {temperature}.")
        given = generator if isinstance(generator, list) else [generator] if generator is not None else []
        if any(not isinstance(one, torch.Generator) for one in given):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) not in (1, batch_size):
            raise ValueError(
                f"`generator` must be one generator or one per image ({batch_size}), got a list of {len(generator)}."
            )
        shape = (batch_size, num_tokens, config.token_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        if isinstance(token_order, torch.Tensor):
            if tuple(token_order.shape) != shape[:2]:
                raise ValueError(f"`token_order` must have shape {shape[:2]}, got {tuple(token_order.shape)}.")
            in_order = torch.arange(num_tokens, device=token_order.device).expand(shape[:2])
            if token_order.is_floating_point() or not torch.equal(token_order.sort(-1).values.long(), in_order):
                raise ValueError(f"Every row of `token_order` must be a permutation of 0..{num_tokens - 1}.")
        elif token_order is not None and token_order not in TOKEN_ORDERS:
            raise ValueError(f"`token_order` must be a tensor or one of {TOKEN_ORDERS}, got {token_order!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        channels = config.num_channels if self.vae is None else self.vae.config.out_channels
        if output_type == "pil" and (len(config.sample_shape) != 2 or channels not in (1, 3)):
            raise ValueError(
                f"Samples with {channels} channels on a grid of rank {len(config.sample_shape)} are no pictures: use "
                "`output_type` 'np', 'pt' or 'latent'."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, got {unknown}."
            )

    def compile(self, **options):
        """
        Compiles the transformers' blocks and the denoising MLP, each for any number of tokens and images, so that few
        programs serve all calls. On a CUDA device, the loops of the token schedulers are recorded as CUDA graphs
        besides, one for each number of tokens that a step reveals. The first call takes a while.

        Call it when the pipeline is on its device. Where weights come and go (CPU offload), there are no CUDA graphs.

        Args:
            **options: of `torch.compile`.

        Raises:
            ValueError: if there is nothing to compile with here; the pipeline stays as it is.
        """
        device, model = self._execution_device, self.transformer
        if options.get("backend", "inductor") == "inductor":
            check_compilation(device)
        # of all pipelines in a process together: beyond it, what is new would run as it is, without a word
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        # not the encoder and the predictor as a whole: one program each for no, one and several visible tokens, and the
        # same again for those that are wanted, would take minutes
        for part in (*model.encoder.layers, *model.predictor.layers, model.denoiser):
            part.compile(**{"dynamic": True, **options})
        self._graphs = CUDAGraphs()

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The initial noise of every token, `(batch_size, N, C)` in float32, drawn unless given."""
        device, config = self._execution_device, self.transformer.config
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        shape = (batch_size, config.num_tokens, config.token_size)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def prepare_token_order(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        token_order: torch.Tensor | str | None = None,
    ) -> torch.LongTensor:
        """The order in which tokens are generated, `(batch_size, N)`, drawn unless given; see `__call__`."""
        device, config = self._execution_device, self.transformer.config
        if isinstance(token_order, torch.Tensor):
            return token_order.to(device=device, dtype=torch.long)
        if token_order == "checkerboard":
            return checkerboard_token_order(batch_size, config.grid_size, device, generator)
        return random_token_order(batch_size, config.num_tokens, device, generator)

    def predict_features(
        self,
        tokens: torch.Tensor,
        class_labels: torch.LongTensor,
        visible: torch.LongTensor,
        wanted: torch.LongTensor,
        max_rows: int | None = None,
    ) -> torch.Tensor:
        """
        Features of tokens to come.

        Args:
            tokens (`torch.Tensor` of shape `(B, N, C)`): those that are there, in their places.
            class_labels (`torch.LongTensor` of shape `(B,)`): class ids, or that of the null class.
            visible (`torch.LongTensor` of shape `(B, visible)`): places of the tokens that are there.
            wanted (`torch.LongTensor` of shape `(B, wanted)`): places whose features are asked for.
            max_rows (`int`, *optional*): samples that the networks see at once; all if not given.

        Returns:
            `torch.Tensor` of shape `(B, wanted, P)`.
        """
        model, features = self.transformer, []
        inputs = (part.split(max_rows or len(part)) for part in (tokens, class_labels, visible, wanted))
        for some_tokens, some_labels, some_visible, some_wanted in zip(*inputs, strict=True):
            context_features = model.encode(some_tokens, some_labels, visible=some_visible)
            features.append(model.predict(context_features, visible=some_visible, wanted=some_wanted))
        return torch.cat(features)

    def decode_tokens(
        self,
        tokens: torch.Tensor,
        output_type: str = "pil",
        mask: torch.BoolTensor | None = None,
        max_rows: int | None = None,
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """
        Tokens to images. Serves callbacks, too, that show what there is so far.

        Args:
            tokens (`torch.Tensor` of shape `(B, N, C)`).
            output_type (`str`): as in `__call__`.
            mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): tokens to leave out (they count as zeros).
            max_rows (`int`, *optional*): samples that the VAE sees at once; all if not given.
        """
        if mask is not None:
            tokens = tokens.masked_fill(mask.unsqueeze(-1), 0.0)
        samples = self.transformer.unpatchify(tokens)
        if output_type == "latent":
            return samples
        images = torch.cat([decode_samples(some, self.vae).float() for some in samples.split(max_rows or len(samples))])
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.movedim(1, -1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.Tensor,
        num_inference_steps: int = 64,
        num_denoising_steps: int = 100,
        guidance_scale: float = 3.0,
        guidance_schedule: str = "linear",
        temperature: float = 0.98,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        token_order: torch.Tensor | str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DJEPAPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        final_denoising_steps: int | None = None,
        solver: str | None = None,
        profile: str = "exact",
        null_refresh_interval: int = 1,
        max_batch_size: int = 64,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images of classes.

        Args:
            class_labels (`int`, `str`, or list of them):
                Class ids or names, see [`~DJEPAPipeline.get_label_ids`].
            num_inference_steps (`int`, *optional*, defaults to 64):
                Autoregressive steps (K), at most the model's number of tokens. The published models use 64 for their
                256 tokens.
            num_denoising_steps (`int`, *optional*, defaults to 100):
                Denoising steps per token (T), which are network evaluations for the token schedulers.
            guidance_scale (`float`, *optional*, defaults to 3.0):
                Classifier-free guidance; 1 does without, at half the cost.
            guidance_schedule (`"linear"` or `"constant"`, *optional*, defaults to `"linear"`):
                Linear guidance grows from 1 to `guidance_scale` with the share of generated tokens.
            temperature (`float`, *optional*, defaults to 0.98):
                Factor on the noise that each DDPM step adds, or on the initial noise of flow matching (also where
                `latents` are given). diffusers' own schedulers know no temperature.
            num_images_per_label (`int`, *optional*, defaults to 1):
                Images per entry of `class_labels`, next to each other in the result.
            generator (`torch.Generator` or list of them, *optional*):
                One for all, or one per image: then an image does not depend on its neighbours in the batch.
            latents (`torch.Tensor` of shape `(B, N, C)`, *optional*):
                Initial noise of every token.
            token_order (`"random"`, `"checkerboard"` or `torch.LongTensor` of shape `(B, N)`, *optional*):
                The order in which tokens are generated, first to last; random if not given. `"checkerboard"` is random
                among the fields of one colour first, then among the others ([`~masking.checkerboard_token_order`]).
            output_type (`"pil"`, `"np"`, `"pt"` or `"latent"`, *optional*, defaults to `"pil"`):
                Pictures; arrays `(B, H, W, channels)` in [0, 1]; tensors `(B, channels, H, W)` in [0, 1]; or samples of
                the model's space `(B, num_channels, *sample_size)`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~diffusers.ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after every autoregressive step as `callback(pipe, step, num_hidden, tensors)`, where
                `num_hidden` tokens are still to come. The `"latents"` that it returns replace those of the run.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                `"latents"` are tokens `(B, N, C)`, generated where they are done, initial noise elsewhere; `"mask"`
                `(B, N)` is True where a token is still to come. [`~DJEPAPipeline.decode_tokens`] shows both.
            final_denoising_steps (`int`, *optional*):
                Denoising steps in the last autoregressive step: they go there from `num_denoising_steps` on a line. The
                first tokens need most, because they know least (DiSA, arXiv 2505.20297). The same number in all steps
                if not given.
            solver (`str`, *optional*):
                How tokens are denoised in this call, instead of by `pipe.scheduler`: `"ddpm"`, `"ddim"`,
                `"dpmsolver++"` or `"unipc"` for the diffusion objective; `"euler"`, `"heun"` or `"midpoint"` for flow
                matching.
            profile (`"exact"`, `"balanced"` or `"fast"`, *optional*, defaults to `"exact"`):
                How much of the work that the other options ask for is really done, see
                [`~DJEPAPipeline.expand_profile`]. `"exact"` does all of it.
            null_refresh_interval (`int`, *optional*, defaults to 1):
                With guidance, the networks see the null class in every so manieth autoregressive step; in between, its
                features differ from those of the class as they did then (the condition cache of LazyMAR, arXiv
                2503.12450).
            max_batch_size (`int`, *optional*, defaults to 64):
                Images that the networks see at once. More are worked on in parts, so that memory stays bounded; the
                result is the same.
            attention_kwargs (`dict`, *optional*):
                `{"scale": 0.5}` halves what the active LoRA adapters do, in this call.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: for an argument that cannot be right, before any work.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        ids = self.get_label_ids(class_labels)
        batch_size = len(ids) * num_images_per_label
        self.check_inputs(
            batch_size,
            num_inference_steps,
            num_denoising_steps,
            guidance_scale,
            guidance_schedule,
            temperature,
            num_images_per_label,
            generator,
            latents,
            token_order,
            output_type,
            callback_on_step_end_tensor_inputs,
            final_denoising_steps,
            solver,
            profile,
            null_refresh_interval,
            max_batch_size,
        )
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        options = num_inference_steps, num_denoising_steps, final_denoising_steps, solver, null_refresh_interval
        options = self.expand_profile(profile, *options).values()
        num_inference_steps, num_denoising_steps, final_denoising_steps, solver, null_refresh_interval = options
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_inference_steps, False

        # 2. Prepare labels, noise and order; with guidance, each sample has a twin of the null class
        device, config = self._execution_device, self.transformer.config
        labels = torch.tensor(ids).repeat_interleave(num_images_per_label)
        order = self.prepare_token_order(batch_size, generator, token_order)
        latents = self.prepare_latents(batch_size, generator, latents)
        twins = 1 if guidance_scale == 1.0 else 2
        if twins == 2:
            labels = torch.cat([labels, torch.full_like(labels, config.num_labels)])
        kinds, kind_of_row = (part.to(device) for part in labels.unique(return_inverse=True))
        labels, places, max_rows = labels.to(device), order.repeat(twins, 1), twins * max_batch_size
        if twins == 1:
            null_refresh_interval = 1

        # 3. Prepare the schedules of both kinds of steps
        num_masked = num_masked_per_step(config.num_tokens, num_inference_steps)
        denoising_steps = num_denoising_steps_per_step(num_denoising_steps, final_denoising_steps, num_inference_steps)
        draw, max_tokens = (temperature, generator), max_rows * config.num_tokens
        graphs = self._graphs if device.type == "cuda" else None
        if graphs is not None and any(hasattr(module, "_hf_hook") for module in self.transformer.modules()):
            graphs = None  # weights that come and go cannot be played
        denoise = TokenDenoiser(self.transformer.denoiser, self.scheduler_for(solver), *draw, max_tokens, graphs)
        for count in set(denoising_steps):
            denoise.prepare(count)

        # 4. Reveal tokens, a few at a time
        with self._lora_scaled(attention_kwargs):
            for step in self.progress_bar(range(num_inference_steps)):
                if self.interrupt:
                    continue
                done, upto = config.num_tokens - num_masked[step], config.num_tokens - num_masked[step + 1]

                # 5. Features of the tokens to come
                if done == 0:  # they know nothing but the class yet: one row for each will do
                    tokens, visible = latents[:1].expand(len(kinds), -1, -1), places[: len(kinds), :0]
                    everywhere = torch.arange(config.num_tokens, device=device).expand(len(kinds), -1)
                    features = self.predict_features(tokens, kinds, visible, everywhere, max_rows)
                    conditioning = features[kind_of_row.unsqueeze(-1), places[:, :upto]]
                elif (step - 1) % null_refresh_interval == 0:  # for all steps until the null class is looked at again
                    known, last = done, min(step + null_refresh_interval, num_inference_steps)
                    visible, wanted = places[:, :done], places[:, done : config.num_tokens - num_masked[last]]
                    features = self.predict_features(latents.repeat(twins, 1, 1), labels, visible, wanted, max_rows)
                    null_difference = features[-batch_size:] - features[:batch_size]
                    conditioning = features[:, : upto - done]
                else:
                    rows = labels[:batch_size], order[:, :done], order[:, done:upto]
                    features = self.predict_features(latents, *rows, max_rows)
                    conditioning = torch.cat([features, features + null_difference[:, done - known : upto - known]])

                # 6. Denoise them, each by itself
                guidance = self._guidance_of_step(guidance_schedule, num_masked[step + 1])
                chosen = order[:, done:upto]
                denoised = denoise(gather_tokens(latents, chosen), conditioning, denoising_steps[step], guidance)
                latents = scatter_tokens(latents, chosen, denoised)

                if callback_on_step_end is not None:
                    mask = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :upto], False)
                    tensors = {"latents": latents, "mask": mask}
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    result = callback_on_step_end(self, step, num_masked[step + 1], tensors) or {}
                    latents = result.pop("latents", latents)

        # 7. Decode
        images = self.decode_tokens(latents, output_type, max_rows=max_batch_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def expand_profile(
        self,
        profile: str,
        num_inference_steps: int = 64,
        num_denoising_steps: int = 100,
        final_denoising_steps: int | None = None,
        solver: str | None = None,
        null_refresh_interval: int = 1,
    ) -> dict[str, int | str | None]:
        """
        The options that a profile stands for: `pipe(label, **pipe.expand_profile("fast"))` is
        `pipe(label, profile="fast")`.

        Args:
            profile (`str`): one of [`~profiles.PROFILES`].
            num_inference_steps, num_denoising_steps, final_denoising_steps, solver, null_refresh_interval: as in
                `__call__`, where they say how images would be made with all the work. What they save already, and the
                solver, stay as they are.

        Raises:
            ValueError: if there is no such profile.
        """
        chosen = find_profile(profile, self.transformer.config.objective)
        steps = num_inference_steps, num_denoising_steps, final_denoising_steps
        return chosen.options(*steps, solver, null_refresh_interval)

    def scheduler_for(self, solver: str | None) -> SchedulerMixin:
        """
        The scheduler of a call with that `solver`: the pipeline's own, if none is given.

        Raises:
            ValueError: if the model's objective has no such solver.
        """
        if solver is None:
            return self.scheduler
        return solver_for(self.transformer.config.objective, solver, self.scheduler)

    def _guidance_of_step(self, schedule: str, num_still_masked: int) -> float | None:
        if self.guidance_scale == 1.0:
            return None
        if schedule == "constant":
            return self.guidance_scale
        # the schedule's m never falls below 1, not even in the last step, which reveals all that remain
        num_tokens = self.transformer.config.num_tokens
        return 1 + (self.guidance_scale - 1) * (num_tokens - max(1, num_still_masked)) / num_tokens
