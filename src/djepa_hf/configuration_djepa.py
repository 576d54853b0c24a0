# Copyright 2026 The djepa_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Sizes, presets and validation of a D-JEPA model."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .imagenet_classes import IMAGENET_CLASSES
from .options import check_options

# Paper, Table 1: what sets the presets apart. The predictor has the encoder's sizes in all of them.
PRESETS = {
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "denoiser_hidden_size": 1024,
        "denoiser_num_hidden_layers": 6,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "denoiser_hidden_size": 1280,
        "denoiser_num_hidden_layers": 8,
    },
    "huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "denoiser_hidden_size": 1536,
        "denoiser_num_hidden_layers": 12,
    },
}


@strict
class DJEPAConfig(PreTrainedConfig):
    r"""
    Configuration of [`DJEPAModel`] and [`DJEPAForPreTraining`]. The defaults are the base preset for 256x256 ImageNet
    in the latent space of a KL-16 autoencoder (D-JEPA, arXiv 2410.03755, Table 1).

    Args:
        sample_size (`int` or `tuple[int, ...]`, *optional*, defaults to 16):
            Size of a sample along each axis of its grid: `(height, width)` for images, `(frames, height, width)` for
            video, `(length,)` for audio. An `int` is the side of a square.
        patch_size (`int` or `tuple[int, ...]`, *optional*, defaults to 1):
            Size of a token along each axis; an `int` holds for all axes. Must divide `sample_size`.
        num_channels (`int`, *optional*, defaults to 16):
            Channels of a sample: those of the autoencoder's latents, or of the image itself.
        num_labels (`int`, *optional*, defaults to 1000):
            Number of classes. Class id `num_labels` is the null class of classifier-free guidance. Follows `id2label`
            where that is given. With neither given, the classes are ImageNet's and have its names.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the context encoder.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Blocks of the context encoder.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Heads of the context encoder. Must divide `hidden_size`.
        predictor_hidden_size (`int`, *optional*, defaults to `hidden_size`):
            Width of the feature predictor.
        predictor_num_hidden_layers (`int`, *optional*, defaults to `num_hidden_layers`):
            Blocks of the feature predictor.
        predictor_num_attention_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Heads of the feature predictor. Must divide `predictor_hidden_size`.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of a block's MLP relative to the block's.
        qk_norm (`bool`, *optional*, defaults to `True`):
            RMSNorm on queries and keys, over the head dimension.
        num_buffer_tokens (`int`, *optional*, defaults to 64):
            Buffer tokens, which carry the class, in front of the visible tokens.
        denoiser_hidden_size (`int`, *optional*, defaults to 1024):
            Width of the denoising MLP.
        denoiser_num_hidden_layers (`int`, *optional*, defaults to 6):
            Residual blocks of the denoising MLP.
        objective (`"diffusion"` or `"flow_matching"`, *optional*, defaults to `"diffusion"`):
            How tokens are denoised. `"diffusion"` predicts noise and variance (`2 * token_size` outputs),
            `"flow_matching"` a velocity (`token_size` outputs).
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout after the attention's and the MLP's projections.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout of attention weights.
        label_dropout_prob (`float`, *optional*, defaults to 0.1):
            Chance that training replaces a sample's class by the null class.
        mask_ratio_min (`float`, *optional*, defaults to 0.7):
            Smallest share of hidden tokens in training. The largest is 1.
        mask_ratio_mean (`float`, *optional*, defaults to 1.0):
            Mean of the normal distribution that is truncated to `[mask_ratio_min, 1]`.
        mask_ratio_std (`float`, *optional*, defaults to 0.25):
            Its standard deviation.
        diffusion_batch_mul (`int`, *optional*, defaults to 4):
            Independent draws of timestep and noise per hidden token and training step.
        prediction_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the prediction loss. With 0 there is neither a prediction head nor a target forward.
        prediction_loss_beta (`float`, *optional*, defaults to 2.0):
            Where the smooth-L1 prediction loss turns from quadratic to linear.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of all LayerNorms and RMSNorms.
        latent_scaling_factor (`float`, *optional*):
            What the autoencoder's latents were multiplied by in training; a pipeline refuses a VAE with another
            `scaling_factor`. Not set for pixels, or where it is unknown.
        weights (`"ema"` or `"online"`, *optional*):
            Which copy of the trained network a published model holds: the moving average, which is the one to sample
            from, or the weights that the optimizer worked on. Not set where it is unknown.

    Raises:
        ValueError: if sizes do not fit each other or a value is out of its range. The message names the value.
        StrictDataclassFieldValidationError: if a value has a wrong type.

    Example:

    ```python
    >>> from djepa_hf import DJEPAConfig, DJEPAModel

    >>> config = DJEPAConfig.from_preset("base")
    >>> config.num_tokens, config.token_size
    (256, 16)
    >>> digits = DJEPAConfig(sample_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=128)
    >>> digits.grid_size, digits.token_size
    ((4, 4), 4)
    ```"""

    model_type = "djepa"

    sample_size: int | list[int] | tuple[int, ...] = 16
    patch_size: int | list[int] | tuple[int, ...] = 1
    num_channels: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    predictor_hidden_size: int | None = None
    predictor_num_hidden_layers: int | None = None
    predictor_num_attention_heads: int | None = None
    mlp_ratio: float | int = 4.0
    qk_norm: bool = True
    num_buffer_tokens: int = 64
    denoiser_hidden_size: int = 1024
    denoiser_num_hidden_layers: int = 6
    objective: Literal["diffusion", "flow_matching"] = "diffusion"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    label_dropout_prob: float | int = 0.1
    mask_ratio_min: float | int = 0.7
    mask_ratio_mean: float | int = 1.0
    mask_ratio_std: float | int = 0.25
    diffusion_batch_mul: int = 4
    prediction_loss_weight: float | int = 1.0
    prediction_loss_beta: float | int = 2.0
    layer_norm_eps: float = 1e-6
    latent_scaling_factor: float | None = None
    weights: Literal["ema", "online"] | None = None

    def __post_init__(self, **kwargs):
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label = dict(enumerate(IMAGENET_CLASSES))
        # JSON knows no tuples: both spellings become one, so that a reloaded config equals the saved one.
        if isinstance(self.sample_size, list):
            self.sample_size = tuple(self.sample_size)
        if isinstance(self.patch_size, list):
            self.patch_size = tuple(self.patch_size)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, f"predictor_{name}") is None:
                setattr(self, f"predictor_{name}", getattr(self, name))
        super().__post_init__(**kwargs)
        if self.label2id is None:
            self.label2id = {name: i for i, name in self.id2label.items()}
        self.validate_sizes()

    @classmethod
    def option_names(cls) -> set[str]:
        """The arguments that a configuration takes."""
        return {*cls.__dataclass_fields__, "num_labels", "attn_implementation"}

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "DJEPAConfig":
        """
        The configuration of one of the paper's models.

        Args:
            preset (`str`): `"base"`, `"large"` or `"huge"`.
            **overrides: any other argument of [`DJEPAConfig`], or another value for one that the preset sets.

        Raises:
            ValueError: if there is no such preset, or an option does not exist (the closest is named).
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
        check_options(overrides, cls.option_names())
        return cls(**{**PRESETS[preset], **overrides})

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Size of a sample along each axis of its grid, without channels."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Size of a token along each axis of the grid."""
        return (self.patch_size,) * len(self.sample_shape) if isinstance(self.patch_size, int) else self.patch_size

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Number of tokens along each axis."""
        return tuple(side // patch for side, patch in zip(self.sample_shape, self.patch_shape, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens per sample (N)."""
        return math.prod(self.grid_size)

    @property
    def token_size(self) -> int:
        """Numbers per token (C)."""
        return self.num_channels * math.prod(self.patch_shape)

    def validate_sizes(self):
        """Checks that hold between several values, or that a type cannot express."""
        positive = (
            "num_channels",
            "hidden_size",
            "num_attention_heads",
            "predictor_hidden_size",
            "predictor_num_attention_heads",
            "num_buffer_tokens",
            "denoiser_hidden_size",
            "diffusion_batch_mul",
            "mlp_ratio",
            "mask_ratio_std",
            "prediction_loss_beta",
            "layer_norm_eps",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("num_hidden_layers", "predictor_num_hidden_layers", "denoiser_num_hidden_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.prediction_loss_weight < 0:
            raise ValueError(f"`prediction_loss_weight` must not be negative, got {self.prediction_loss_weight}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "label_dropout_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.mask_ratio_min <= 1:
            raise ValueError(f"`mask_ratio_min` must lie in (0, 1], got {self.mask_ratio_min}.")
        if self.latent_scaling_factor is not None and self.latent_scaling_factor <= 0:
            raise ValueError(f"`latent_scaling_factor` must be positive, got {self.latent_scaling_factor}.")
        if self.num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {self.num_labels}.")
        if set(self.id2label) != set(range(self.num_labels)):
            raise ValueError(f"The keys of `id2label` must be 0..{self.num_labels - 1}, got {sorted(self.id2label)}.")
        for prefix in ("", "predictor_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"`{prefix}hidden_size` ({width}) must be divisible by `{prefix}num_attention_heads` ({heads})."
                )
        if not self.sample_shape or min(self.sample_shape) < 1 or min(self.patch_shape, default=0) < 1:
            raise ValueError(
                f"`sample_size` and `patch_size` must be positive along every axis, got {self.sample_size} and "
                f"{self.patch_size}."
            )
        if len(self.patch_shape) != len(self.sample_shape):
            raise ValueError(
                f"`patch_size` {self.patch_size} must have as many axes as `sample_size` {self.sample_size}."
            )
        if any(side % patch for side, patch in zip(self.sample_shape, self.patch_shape, strict=True)):
            raise ValueError(
                f"`sample_size` {self.sample_size} must be divisible by `patch_size` {self.patch_size} on every axis."
            )


__all__ = ["DJEPAConfig"]
