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
"""The two models: D-JEPA as it is published and sampled from, and D-JEPA in training."""

import contextlib
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_djepa import DJEPAConfig
from .draws import TrainingDraws, draw_training
from .masking import gather_tokens, visible_places
from .networks import (
    ContextEncoder,
    DenoisingMLP,
    DJEPAAttention,
    DJEPALayer,
    FeaturePredictor,
    PredictionHead,
    TimeEmbeddingLinear,
    ZeroInitLinear,
)
from .schedulers import token_scheduler_for

logger = logging.get_logger(__name__)

# the arguments of `from_pretrained` that say where its files are
_WHERE_FILES_ARE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class DJEPAModelOutput(ModelOutput):
    """
    Output of [`DJEPAModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, N, predictor_hidden_size)`):
            Predicted feature of every token (z), the condition of the denoising MLP.
        context_features (`torch.FloatTensor` of shape `(B, num_buffer_tokens + visible, hidden_size)`):
            Output of the context encoder, buffer tokens first.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_hidden_states=True`):
            Input of the context encoder's first block and output of each block.
        attentions (`tuple[torch.FloatTensor]`, *optional*, with `output_attentions=True` and eager attention):
            Attention weights of the context encoder's blocks, `(B, heads, length, length)`; empty with other attention.
        predictor_hidden_states (`tuple[torch.FloatTensor]`, *optional*, with `output_predictor_hidden_states=True`):
            Output of each of the feature predictor's blocks.
        predictor_attentions (`tuple[torch.FloatTensor]`, *optional*, with `output_predictor_attentions=True`):
            Attention weights of the feature predictor's blocks.
    """

    last_hidden_state: torch.FloatTensor | None = None
    context_features: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    predictor_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    predictor_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DJEPAForPreTrainingOutput(ModelOutput):
    """
    Output of [`DJEPAForPreTraining`].

    Args:
        loss (`torch.FloatTensor`, scalar):
            `diffusion_loss + prediction_loss_weight * prediction_loss`.
        diffusion_loss (`torch.FloatTensor`, scalar):
            Denoising loss L_d, mean over hidden tokens and draws.
        prediction_loss (`torch.FloatTensor`, scalar):
            Feature prediction loss L_p, mean over hidden tokens; 0 where its weight is 0.
        hidden_states, attentions: as in [`DJEPAModelOutput`], of the online context encoder.
    """

    loss: torch.FloatTensor | None = None
    diffusion_loss: torch.FloatTensor | None = None
    prediction_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def check_weights(weights: str):
    """Raises a `ValueError` unless `weights` is `"ema"` or `"online"`."""
    if weights not in ("ema", "online"):
        raise ValueError(f"`weights` must be 'ema' or 'online', got {weights!r}.")


def _is_loaded(parameter: torch.Tensor) -> bool:
    """Whether `from_pretrained` found a tensor in a file; its own mark, which also keeps it from initializing it."""
    return getattr(parameter, "_is_hf_initialized", False)


class DJEPAPreTrainedModel(PreTrainedModel):
    """What both models share: initialization, and what the transformers library may do with them."""

    config_class = DJEPAConfig
    config: DJEPAConfig
    base_model_prefix = "djepa"
    main_input_name = "sample"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DJEPALayer", "DenoiserLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)  # ones and zeros for norms; the rest is the paper's
        if isinstance(module, ZeroInitLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and not isinstance(module, TimeEmbeddingLinear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding | TimeEmbeddingLinear):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, ContextEncoder):
            init.zeros_(module.buffer_tokens)
            init.normal_(module.position_embeddings, std=0.02)
        elif isinstance(module, FeaturePredictor):
            init.normal_(module.mask_token, std=0.02)
            init.normal_(module.position_embeddings, std=0.02)

    def get_input_embeddings(self) -> nn.Embedding:
        """The class table; its last row is the null class."""
        return self.base_model.encoder.class_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.base_model.encoder.class_embeddings = value


class DJEPAModel(DJEPAPreTrainedModel):
    """
    Context encoder, feature predictor and denoising MLP (paper, sections 3.1 to 3.3): all that sampling needs, and
    what is published.

    Args:
        config ([`DJEPAConfig`]): sizes and objective.
    """

    _can_record_outputs = {
        "hidden_states": OutputRecorder(DJEPALayer, index=0, layer_name="encoder"),
        "attentions": OutputRecorder(DJEPAAttention, index=1, layer_name="encoder"),
        "predictor_hidden_states": OutputRecorder(DJEPALayer, index=0, layer_name="predictor"),
        "predictor_attentions": OutputRecorder(DJEPAAttention, index=1, layer_name="predictor"),
    }

    def __init__(self, config: DJEPAConfig):
        super().__init__(config)
        self.encoder = ContextEncoder(config)
        self.predictor = FeaturePredictor(config)
        self.denoiser = DenoisingMLP(config)
        self.added_classes: dict[str, list[str]] = {}  # by the adapter that brought them
        self.post_init()

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """
        Cuts samples into tokens, row-major over the grid; inside a token the order is (channel, row, column).

        Args:
            sample (`torch.Tensor` of shape `(B, num_channels, *sample_size)`).

        Returns:
            `torch.Tensor` of shape `(B, N, C)`.

        Raises:
            ValueError: if the sample has another shape than the configuration's.
        """
        shape = (self.config.num_channels, *self.config.sample_shape)
        if tuple(sample.shape[1:]) != shape:
            raise ValueError(
                f"`sample` must have shape (batch, {', '.join(map(str, shape))}), got {tuple(sample.shape)}."
            )
        rank = len(self.config.grid_size)
        split = [n for pair in zip(self.config.grid_size, self.config.patch_shape, strict=True) for n in pair]
        sample = sample.reshape(sample.shape[0], self.config.num_channels, *split)
        grid_axes, patch_axes = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
        return sample.permute(0, *grid_axes, 1, *patch_axes).reshape(sample.shape[0], self.config.num_tokens, -1)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        The inverse of [`~DJEPAModel.patchify`].

        Args:
            tokens (`torch.Tensor` of shape `(B, N, C)`).

        Returns:
            `torch.Tensor` of shape `(B, num_channels, *sample_size)`.
        """
        rank = len(self.config.grid_size)
        self._check_tokens(tokens)
        tokens = tokens.reshape(
            tokens.shape[0], *self.config.grid_size, self.config.num_channels, *self.config.patch_shape
        )
        axes = [axis for i in range(rank) for axis in (1 + i, 2 + rank + i)]
        return tokens.permute(0, 1 + rank, *axes).reshape(
            tokens.shape[0], self.config.num_channels, *self.config.sample_shape
        )

    @apply_forward_hook
    def encode(
        self,
        tokens: torch.Tensor,
        class_labels: torch.LongTensor | None = None,
        mask: torch.BoolTensor | None = None,
        visible: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Context features φ of the visible tokens.

        Args:
            tokens (`torch.Tensor` of shape `(B, N, C)`): all tokens; what hidden places hold does not matter.
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*): class ids; `num_labels` is the null class,
                which stands for no label.
            mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True where a token is hidden, equally many per
                row. Without it and without `visible` all tokens are visible.
            visible (`torch.LongTensor` of shape `(B, visible)`, *optional*): instead of `mask`, the places of the
                visible tokens in any order. Spares reading the mask back from an accelerator.

        Returns:
            `torch.Tensor` of shape `(B, num_buffer_tokens + visible, hidden_size)`, buffer first, then the visible
            tokens in the order of their places in the mask or in `visible`.

        Raises:
            ValueError: if a shape does not fit or the rows of `mask` hide different numbers of tokens.
        """
        self._check_tokens(tokens)
        visible = self._visible_places(mask, visible, tokens.shape[0])
        tokens = tokens.to(self.encoder.input_projection.weight.dtype)
        if class_labels is None:
            class_labels = torch.full((len(tokens),), self.config.num_labels, device=tokens.device)
        return self.encoder(tokens, class_labels, visible, **kwargs)

    @apply_forward_hook
    def predict(
        self,
        context_features: torch.Tensor,
        mask: torch.BoolTensor | None = None,
        visible: torch.LongTensor | None = None,
        wanted: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Predicted features z = γ(φ) of all tokens, or of those that are wanted.

        Args:
            context_features (`torch.Tensor` of shape `(B, num_buffer_tokens + visible, hidden_size)`):
                what [`~DJEPAModel.encode`] returned for the same `mask` or `visible`.
            mask, visible: as in [`~DJEPAModel.encode`].
            wanted (`torch.LongTensor` of shape `(B, wanted)`, *optional*): places whose features are asked for. Spares
                most of the last block for the others.

        Returns:
            `torch.Tensor` of shape `(B, N, predictor_hidden_size)`, or `(B, wanted, predictor_hidden_size)` in the
            order of `wanted`.

        Raises:
            ValueError: if the mask and the features do not fit.
        """
        visible = self._visible_places(mask, visible, context_features.shape[0])
        num_visible = self.config.num_tokens if visible is None else visible.shape[1]
        if context_features.shape[1] != self.config.num_buffer_tokens + num_visible:
            raise ValueError(
                f"`context_features` must hold {self.config.num_buffer_tokens} buffer and {num_visible} visible "
                f"tokens, got {context_features.shape[1]} in all."
            )
        return self.predictor(context_features, visible, wanted, **kwargs)

    @apply_forward_hook
    def denoise(self, noisy_tokens: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """
        What the denoising MLP ε_θ makes of noisy tokens, each by itself.

        Args:
            noisy_tokens (`torch.Tensor` of shape `(M, C)`): flat tokens.
            timesteps (`torch.Tensor` of shape `(M,)`): 0..999 for the diffusion objective (0 is nearly clean), [0, 1]
                for flow matching (0 is noise).
            conditioning (`torch.Tensor` of shape `(M, predictor_hidden_size)`): their features from
                [`~DJEPAModel.predict`]. With fewer rows, `M / d` of them, the `d` equal parts of `noisy_tokens` are
                draws of the same tokens and share the features.

        Returns:
            `torch.Tensor`: noise and raw variance `(M, 2C)` for the diffusion objective, velocity `(M, C)` for flow
            matching.

        Raises:
            ValueError: if the numbers of rows do not fit.
        """
        dtype = self.denoiser.input_projection.weight.dtype
        draws, rest = divmod(len(noisy_tokens), len(conditioning))
        if rest:
            raise ValueError(
                f"`conditioning` must have as many rows as `noisy_tokens` or a divisor of them ({len(noisy_tokens)}), "
                f"got {len(conditioning)}."
            )
        condition = self.denoiser.condition_projection(conditioning.to(dtype)).repeat(draws, 1)
        return self.denoiser(noisy_tokens.to(dtype), self.denoiser.time_embedding(timesteps) + condition)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.LongTensor | None = None,
        mask: torch.BoolTensor | None = None,
        visible: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DJEPAModelOutput:
        """
        Encodes the visible tokens of samples and predicts the features of all.

        Args:
            sample (`torch.Tensor` of shape `(B, num_channels, *sample_size)`): latents, or images in [-1, 1].
            class_labels, mask, visible: as in [`~DJEPAModel.encode`].
        """
        tokens = self.patchify(sample)
        context_features = self.encode(tokens, class_labels, mask, visible, **kwargs)
        features = self.predict(context_features, mask, visible, **kwargs)
        return DJEPAModelOutput(last_hidden_state=features, context_features=context_features)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`].

        A checkpoint of [`DJEPAForPreTraining`] holds two copies of this model. The EMA copy, which is the one to sample
        from, is taken, and the log says so.
        """
        saved = {}
        if pretrained_model_name_or_path is not None:
            where = {name: kwargs[name] for name in _WHERE_FILES_ARE if name in kwargs}
            with contextlib.suppress(OSError):  # no configuration there: the caller passes one, or loading complains
                saved, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **where)
        if "DJEPAForPreTraining" not in (saved.get("architectures") or []):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        logger.warning(
            f"{pretrained_model_name_or_path} is a training checkpoint: taking its EMA weights (`target`), not the "
            "online ones (`djepa`)."
        )
        training = DJEPAForPreTraining.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        training, *info = training if isinstance(training, tuple) else (training,)
        model = training.export("ema")
        return (model, *info) if info else model

    def check_new_classes(self, names: list[str]):
        """Raises a `ValueError` if one of the names is that of a class already."""
        known = set(self.config.id2label.values())
        for i, name in enumerate(names):
            if name in known or name in names[:i]:
                raise ValueError(f"There is a class {name!r} already: new classes need new names.")

    def add_classes(self, names: list[str], rows: torch.Tensor | None = None, adapter_name: str = "default"):
        """
        Adds classes, as an adapter brings them. They come behind those that there are, whose embeddings stay as they
        are; the null class keeps its place behind all.

        Args:
            names (`list[str]`): of the classes.
            rows (`torch.Tensor` of shape `(classes, hidden_size)`, *optional*): their embeddings; that of the null
                class, which stands for no class in particular, if not given.
            adapter_name (`str`): what they belong to.

        Raises:
            ValueError: if a name is that of a class already, or the adapter has brought classes.
        """
        self.check_new_classes(names)
        if adapter_name in self.added_classes:
            raise ValueError(f"The adapter {adapter_name!r} has brought classes already.")
        table = self.get_input_embeddings()
        rows = table.weight[-1:].expand(len(names), -1) if rows is None else rows
        rows = rows.detach().to(table.weight.device, table.weight.dtype, copy=True).contiguous()
        table.added[adapter_name] = nn.Parameter(rows, requires_grad=False)
        self.added_classes[adapter_name] = list(names)
        self._name_classes(self._own_names() + [name for added in self.added_classes.values() for name in added])

    def remove_classes(self, adapter_name: str):
        """Takes away the classes that an adapter has brought, if it has. Those of later adapters move up."""
        if self.added_classes.get(adapter_name):
            own = self._own_names()
            del self.added_classes[adapter_name], self.get_input_embeddings().added[adapter_name]
            self._name_classes(own + [name for added in self.added_classes.values() for name in added])

    def base_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights without the adapters that are attached, under the names that they had before."""
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.state_dict().items()
            if ".lora_" not in name and ".added." not in name
        }

    def save_pretrained(self, save_directory, *, variant=None, max_shard_size="50GB", **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`]. Where adapters are attached, the model is written without
        them, and not, as in transformers, an adapter without the model.
        """
        kwargs |= {"variant": variant, "max_shard_size": max_shard_size}  # diffusers looks for them in the signature
        if not getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, **kwargs)
        names = list(self.config.id2label.values())
        self._hf_peft_config_loaded = False
        self._name_classes(self._own_names())
        try:
            super().save_pretrained(save_directory, **{"state_dict": self.base_state_dict(), **kwargs})
        finally:
            self._hf_peft_config_loaded = True
            self._name_classes(names)

    def _own_names(self) -> list[str]:
        return list(self.config.id2label.values())[: len(self.get_input_embeddings().weight) - 1]

    def _name_classes(self, names: list[str]):
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: i for i, name in enumerate(names)}

    def _check_tokens(self, tokens: torch.Tensor):
        shape = (self.config.num_tokens, self.config.token_size)
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != shape:
            raise ValueError(f"`tokens` must have shape (batch, {shape[0]}, {shape[1]}), got {tuple(tokens.shape)}.")

    def _visible_places(
        self, mask: torch.BoolTensor | None, visible: torch.LongTensor | None, batch_size: int
    ) -> torch.LongTensor | None:
        if visible is not None or mask is None:
            return visible
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch_size, self.config.num_tokens):
            raise ValueError(
                f"`mask` must be boolean of shape ({batch_size}, {self.config.num_tokens}), got {mask.dtype} of shape "
                f"{tuple(mask.shape)}."
            )
        return visible_places(mask)


class DJEPAForPreTraining(DJEPAPreTrainedModel):
    """
    D-JEPA in training: the online model `djepa`, its moving average `target` and the `prediction_head` (paper, section
    3).

    `target` is frozen and always in evaluation mode. Its encoder gives the targets of the prediction loss, and its
    weights are the ones to sample from and to publish. A model loaded from a published [`DJEPAModel`] starts with
    `target` equal to `djepa`.

    Args:
        config ([`DJEPAConfig`]): sizes and objective.
    """

    _keys_to_ignore_on_load_missing = [r"^target\."]

    def __init__(self, config: DJEPAConfig):
        super().__init__(config)
        self.djepa = DJEPAModel(config)
        self.target = DJEPAModel(config)
        self.prediction_head = PredictionHead(config) if config.prediction_loss_weight > 0 else None
        self.token_scheduler = token_scheduler_for(config.objective)
        self.target.requires_grad_(False)
        self.target.eval()
        self.post_init()

    def initialize_weights(self):
        super().initialize_weights()
        # Runs after construction and after loading: what no file gave the target, it takes from the online model
        # (`init.copy_` leaves loaded tensors alone).
        pairs = list(zip(self.target.parameters(), self.djepa.parameters(), strict=True))
        if any(_is_loaded(online) and not _is_loaded(target) for target, online in pairs):
            logger.warning("There were no EMA weights, or not all: `target` starts as a copy of the online weights.")
        for target, online in pairs:
            init.copy_(target, online)
        self.target.requires_grad_(False)  # loading replaces missing parameters by new ones, which would be trainable

    def train(self, mode: bool = True):
        super().train(mode)
        self.target.eval()  # targets know no dropout
        return self

    @torch.no_grad()
    def update_target(self, decay: float):
        """
        One step of the moving average: `target = decay * target + (1 - decay) * djepa`.

        Args:
            decay (`float`): in [0, 1]; 0 copies the online model.

        Raises:
            ValueError: if `decay` is out of its range.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` must lie in [0, 1], got {decay}.")
        torch._foreach_lerp_(list(self.target.parameters()), list(self.djepa.parameters()), 1 - decay)

    def export(self, weights: str = "ema") -> DJEPAModel:
        """
        The model to sample from and to publish. It shares its weights with this one, and its `config.weights` says
        which they are.

        Args:
            weights (`"ema"` or `"online"`, defaults to `"ema"`): `target` or `djepa`.

        Raises:
            ValueError: if `weights` is neither.
        """
        check_weights(weights)
        config = copy.deepcopy(self.config)
        config.weights = weights
        with torch.device("meta"):
            model = DJEPAModel(config)
        source = self.target if weights == "ema" else self.djepa
        model.load_state_dict(source.state_dict(), assign=True)
        return model.eval()

    @can_return_tuple
    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.LongTensor | None = None,
        mask: torch.BoolTensor | None = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        draws: TrainingDraws | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DJEPAForPreTrainingOutput:
        """
        The training losses of a batch. Both are means over hidden tokens; visible tokens cost nothing.

        Args:
            sample (`torch.Tensor` of shape `(B, num_channels, *sample_size)`): latents, or images in [-1, 1].
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*): class ids; none means the null class.
            mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True where a token is hidden, equally many and at
                least one per row. Drawn if not given.
            timesteps (`torch.Tensor` of shape `(B, N)`, *optional*): noise level of every token.
            noise (`torch.Tensor` of shape `(B, N, C)`, *optional*): noise of every token. If either is given, each
                token is noised once; otherwise `diffusion_batch_mul` times, independently.
            draws ([`TrainingDraws`], *optional*): instead of the three above, all that is random; see
                [`draw_training`].

        Raises:
            ValueError: if a shape does not fit.
        """
        tokens = self.djepa.patchify(sample)
        if draws is None:
            draws = self._draw(tokens, mask, timesteps, noise)
        context_labels = class_labels
        if self.training and class_labels is not None:
            context_labels = class_labels.masked_fill(draws.dropped_labels, self.config.num_labels)
        outputs = self.djepa(sample, context_labels, visible=draws.visible, return_dict=True, **kwargs)
        features = gather_tokens(outputs.last_hidden_state, draws.hidden)  # (B, hidden, P)

        diffusion_loss = self._diffusion_loss(gather_tokens(tokens, draws.hidden), features, draws)
        if self.prediction_head is None:
            prediction_loss = torch.zeros_like(diffusion_loss)
        else:
            prediction_loss = self._prediction_loss(tokens, class_labels, features, draws.hidden)
        return DJEPAForPreTrainingOutput(
            loss=diffusion_loss + self.config.prediction_loss_weight * prediction_loss,
            diffusion_loss=diffusion_loss,
            prediction_loss=prediction_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _draw(
        self,
        tokens: torch.Tensor,
        mask: torch.BoolTensor | None,
        timesteps: torch.Tensor | None,
        noise: torch.Tensor | None,
    ) -> TrainingDraws:
        """Fresh draws, but for what is given."""
        batch_size, num_tokens, token_size = tokens.shape
        order = num_masked = None
        if mask is not None:
            visible, hidden = self.djepa._visible_places(mask, None, batch_size), visible_places(~mask)
            order, num_masked = torch.cat([hidden, visible], dim=1), hidden.shape[1]
            if num_masked == 0:
                raise ValueError("`mask` must hide at least one token per row, got none.")
        draws = draw_training(
            self.config,
            self.token_scheduler,
            batch_size,
            tokens.device,
            order=order,
            num_masked=num_masked,
            num_draws=1 if timesteps is not None or noise is not None else None,
        )
        if timesteps is not None:
            self._check_shape("timesteps", timesteps, (batch_size, num_tokens))
            draws.timesteps = timesteps.gather(1, draws.hidden)[None]
        if noise is not None:
            self._check_shape("noise", noise, (batch_size, num_tokens, token_size))
            draws.noise = gather_tokens(noise, draws.hidden).float()[None]
        return draws

    def _diffusion_loss(self, clean: torch.Tensor, features: torch.Tensor, draws: TrainingDraws) -> torch.Tensor:
        timesteps, noise = draws.timesteps.flatten(), draws.noise.flatten(0, 2)
        clean = clean.flatten(0, 1).float().repeat(len(draws.noise), 1)  # (draws * B * hidden, C)
        noisy = self.token_scheduler.add_noise(clean, noise, timesteps)
        output = self.djepa.denoise(noisy, timesteps, features.flatten(0, 1))
        # in float32 also under autocast: the bound's exponentials do not survive half precision
        return self.token_scheduler.token_loss(output.float(), clean, noise, timesteps).mean()

    def _prediction_loss(
        self,
        tokens: torch.Tensor,
        class_labels: torch.LongTensor | None,
        features: torch.Tensor,
        hidden: torch.LongTensor,
    ) -> torch.Tensor:
        with torch.no_grad():
            target_features = self.target.encode(tokens, class_labels)[:, self.config.num_buffer_tokens :]
        target_features = gather_tokens(target_features, hidden).float()
        predicted = self.prediction_head(features).float()
        return F.smooth_l1_loss(predicted, target_features, beta=self.config.prediction_loss_beta)

    def _check_shape(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")


__all__ = ["DJEPAForPreTraining", "DJEPAModel", "DJEPAPreTrainedModel"]
