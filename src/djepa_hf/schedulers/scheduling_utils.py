"""What both token schedulers share."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class TokenSchedulerOutput(BaseOutput):
    """
    Output of a token scheduler's `step`.

    Args:
        prev_sample (`torch.Tensor`, shape of the sample): the tokens, one step less noisy.
    """

    prev_sample: torch.Tensor


def check_num_steps(num_inference_steps: int, most: int | None = None):
    """Raises a `ValueError` unless there is at least one step, and no more than `most`."""
    if num_inference_steps < 1 or (most is not None and num_inference_steps > most):
        limits = "at least 1" if most is None else f"in 1..{most}"
        raise ValueError(f"The number of denoising steps must be {limits}, got {num_inference_steps}.")


def per_token(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Trailing axes for `values` (a scalar or one value per token), so that they broadcast over `tokens`."""
    return values.reshape(values.shape + (1,) * (tokens.ndim - values.ndim)) if values.ndim else values


def look_up(table: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
    """
    `table[rows]` of a table of one axis, in the shape of `rows`. Brackets around a single index would wait for the
    device to tell it.
    """
    return table.index_select(0, rows.reshape(-1)).reshape(rows.shape)
