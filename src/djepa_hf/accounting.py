"""What a training step costs: parameters per part, floating-point operations, memory."""

import torch
from torch import nn

from .configuration_djepa import DJEPAConfig
from .masking import draw_num_masked, num_denoising_steps_per_step, num_masked_per_step
from .modeling_djepa import DJEPAForPreTraining


def num_parameters(module: nn.Module, only_trainable: bool = False) -> int:
    """Parameters of a module, those included that ZeRO-3 has spread over other processes."""
    wanted = (p for p in module.parameters() if p.requires_grad or not only_trainable)
    return sum(getattr(p, "ds_numel", p.numel()) for p in wanted)


def parameters_per_part(model: DJEPAForPreTraining) -> dict[str, int]:
    """Parameters of each network of a training model."""
    parts = {
        "context encoder": model.djepa.encoder,
        "feature predictor": model.djepa.predictor,
        "denoising MLP": model.djepa.denoiser,
        "prediction head": model.prediction_head,
        "EMA copy (not trained)": model.target,
    }
    return {name: num_parameters(part) for name, part in parts.items() if part is not None}


def mean_num_masked(config: DJEPAConfig, draws: int = 4096) -> float:
    """Hidden tokens per image, on average."""
    generator, ratio = torch.Generator().manual_seed(0), (config.mask_ratio_min, config.mask_ratio_mean)
    options = (*ratio, config.mask_ratio_std)
    return sum(draw_num_masked(config.num_tokens, *options, generator=generator) for _ in range(draws)) / draws


def training_flops(config: DJEPAConfig) -> dict[str, float]:
    """
    Floating-point operations of one training step per image and part: two per multiplication in a linear layer or in
    attention, backward counted as two forwards. Everything else is left out, as is usual.
    """
    hidden = mean_num_masked(config)
    buffer, tokens, size = config.num_buffer_tokens, config.num_tokens, config.token_size
    width, predictor_width = config.hidden_size, config.predictor_hidden_size

    encoder = _transformer_flops(config, buffer + tokens - hidden, width, config.num_hidden_layers)
    encoder += 2 * (tokens - hidden) * size * width
    target = _transformer_flops(config, buffer + tokens, width, config.num_hidden_layers) + 2 * tokens * size * width
    predictor = _transformer_flops(config, buffer + tokens, predictor_width, config.predictor_num_hidden_layers)
    predictor += 2 * (buffer + tokens - hidden) * width * predictor_width
    per_draw, inner = _denoiser_products(config), config.denoiser_hidden_size
    denoiser = 2 * hidden * (config.diffusion_batch_mul * per_draw + predictor_width * inner)
    head = 2 * hidden * 4 * predictor_width * (predictor_width + width) if config.prediction_loss_weight else 0.0
    return {
        "context encoder": 3 * encoder,
        "feature predictor": 3 * predictor,
        "denoising MLP": 3 * denoiser,
        "prediction head": 3 * head,
        "target encoder (forward only)": target if config.prediction_loss_weight else 0.0,
    }


def sampling_flops(
    config: DJEPAConfig,
    num_inference_steps: int,
    num_denoising_steps: int,
    guidance_scale: float,
    final_denoising_steps: int | None = None,
    null_refresh_interval: int = 1,
) -> dict[str, float]:
    """
    Floating-point operations of sampling one image and part, counted as in [`training_flops`]. The options are those of
    the pipeline. Counted is the algorithm as it is written down: what the pipeline spares without changing the image
    (some 5%: features that nobody asks for, rows that are the same) is not taken off.
    """
    buffer, tokens, size = config.num_buffer_tokens, config.num_tokens, config.token_size
    width, predictor_width = config.hidden_size, config.predictor_hidden_size
    encoder = predictor = evaluations = 0.0
    masked = num_masked_per_step(tokens, num_inference_steps)
    steps = num_denoising_steps_per_step(num_denoising_steps, final_denoising_steps, num_inference_steps)
    is_guided = guidance_scale != 1
    for step, denoising_steps in enumerate(steps):
        hidden, still_hidden = masked[step : step + 2]
        visible, length = tokens - hidden, buffer + tokens
        passes = 2 if is_guided and (step == 0 or (step - 1) % null_refresh_interval == 0) else 1
        evaluations += (hidden - still_hidden) * denoising_steps
        encoder += passes * _transformer_flops(config, buffer + visible, width, config.num_hidden_layers)
        encoder += passes * 2 * visible * size * width
        layers = config.predictor_num_hidden_layers
        predictor += passes * _transformer_flops(config, length, predictor_width, layers)
        predictor += passes * 2 * (buffer + visible) * width * predictor_width
    denoiser = 2 * evaluations * _denoiser_products(config)
    denoiser += 2 * tokens * predictor_width * config.denoiser_hidden_size
    return {"encoder": encoder, "predictor": predictor, "denoiser": (2 if is_guided else 1) * denoiser}


def _transformer_flops(config: DJEPAConfig, length: float, width: int, layers: int) -> float:
    linear = 4 * width**2 + 2 * width * int(config.mlp_ratio * width)
    return 2 * layers * length * (linear + 2 * length * width)


def _denoiser_products(config: DJEPAConfig) -> float:
    """Multiplications of one evaluation of the denoising MLP for one token, but for the projection of its features."""
    inner, size = config.denoiser_hidden_size, config.token_size
    outputs = size * (2 if config.objective == "diffusion" else 1)
    products = size * inner + 256 * inner + inner**2 + 5 * inner**2 * config.denoiser_num_hidden_layers
    return products + 2 * inner**2 + inner * outputs


def training_memory(model: DJEPAForPreTraining, batch_size: int, half: bool) -> dict[str, float]:
    """
    Estimated bytes per process of a training run without sharding and without activation checkpointing. Activations are
    what linear layers keep for the backward pass; norms, dropout and copies in other types come on top.
    """
    config = model.config
    trained, average = num_parameters(model, only_trainable=True), num_parameters(model.target)
    hidden, element = mean_num_masked(config), 2 if half else 4
    length = config.num_buffer_tokens + config.num_tokens
    visible = length - hidden
    per_token = 2 * (6 + 2 * config.mlp_ratio)  # inputs and outputs of a block's layers, in widths
    transformer = visible * config.hidden_size * config.num_hidden_layers
    transformer += length * config.predictor_hidden_size * config.predictor_num_hidden_layers
    denoiser = hidden * config.diffusion_batch_mul * config.denoiser_hidden_size * 9 * config.denoiser_num_hidden_layers
    return {
        "weights, gradients, AdamW": 16.0 * trained,
        "EMA copy": 4.0 * average,
        "activations (at least)": batch_size * element * (per_token * transformer + denoiser),
    }


def cost_of_training(model: DJEPAForPreTraining, batch_size: int, images_per_step: int, half: bool) -> dict[str, str]:
    """
    What a training step costs, in words.

    Args:
        model ([`DJEPAForPreTraining`]): to train.
        batch_size (`int`): images per process and forward.
        images_per_step (`int`): of all processes and accumulated batches together.
        half (`bool`): whether in half precision.
    """
    flops, memory = training_flops(model.config), training_memory(model, batch_size, half)
    cost = {f"parameters, {name}": f"{count:,}" for name, count in parameters_per_part(model).items()}
    hidden = mean_num_masked(model.config)
    cost["tokens per image"] = f"{model.config.num_tokens}, {hidden:.0f} of them hidden on average"
    cost |= {f"FLOPs per image, {name}": f"{count / 1e9:,.1f} G" for name, count in flops.items()}
    cost["FLOPs per step, all"] = f"{sum(flops.values()) * images_per_step / 1e12:,.2f} T"
    cost |= {f"memory per process, {name}": f"{count / 2**30:,.2f} GiB" for name, count in memory.items()}
    return cost
