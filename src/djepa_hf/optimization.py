"""The recipe's optimizer: which weights decay, and how much as training goes on. Needs nothing but torch."""

import torch
from torch import nn

# Paper, appendix: these parts never decay, beside all biases, norms and embeddings.
UNDECAYED_PARTS = (
    "djepa.encoder.input_projection.",
    "djepa.predictor.input_projection.",
    "djepa.denoiser.",
    "prediction_head.",
)
UNDECAYED_NAMES = ("buffer_tokens", "position_embeddings", "mask_token", "class_embeddings", "lora_")


def parameter_groups(model: nn.Module) -> list[dict]:
    """
    The trainable parameters of a [`DJEPAForPreTraining`] in two groups for an optimizer.

    Args:
        model ([`DJEPAForPreTraining`]): the frozen target is left out.

    Returns:
        `list[dict]`: first the parameters that decay, then those that do not (`weight_decay` 0).
    """
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or name.startswith(UNDECAYED_PARTS) or any(part in name for part in UNDECAYED_NAMES)
        (undecayed if exempt else decayed).append(parameter)
    return [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]


def set_weight_decay(optimizer: torch.optim.Optimizer, final: float, progress: float):
    """
    The weight-decay ramp: linear from 0 to `final` over training, for the decaying group of [`parameter_groups`].

    Args:
        optimizer (`torch.optim.Optimizer`): made from [`parameter_groups`].
        final (`float`): weight decay at the end.
        progress (`float`): share of training that is done, in [0, 1].
    """
    optimizer.param_groups[0]["weight_decay"] = final * progress


def ema_decay(final: float, step: int) -> float:
    """
    Decay of the moving average after optimizer step `step` (from 1): `(1 + step) / (10 + step)` until that exceeds
    `final`, so that short runs are not held back by their random start.
    """
    return min(final, (1 + step) / (10 + step))
