"""The networks, each on one screen: block, context encoder φ, feature predictor γ, denoising MLP ε_θ, head u_θ."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_djepa import DJEPAConfig
from .masking import gather_tokens, scatter_tokens


class ZeroInitLinear(nn.Linear):
    """A linear layer that starts at zero, so that the block around it starts as the identity."""


class TimeEmbeddingLinear(nn.Linear):
    """A linear layer of the time embedding, which starts at N(0, 0.02)."""


def eager_attention_forward(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """Attention written out, for whoever wants to see its weights: `(B, heads, L, d)` to `(B, L, heads, d)`."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of queries or keys, computed in float32 and returned in the precision that attention runs in."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalized = F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normalized.to(hidden_states.dtype)


class DJEPAAttention(nn.Module):
    """Multi-head self-attention over all tokens given, with optional RMSNorm on queries and keys."""

    def __init__(self, config: DJEPAConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = HeadRMSNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = HeadRMSNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, places: torch.LongTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`places` `(B, n)`: where attention is wanted from, `(B, n, D)`; everywhere if not given."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if places is not None:
            query = gather_tokens(query, places)
        query, key, value = (  # (B, heads, L, head_dim) each
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            self.q_norm(query),
            self.k_norm(key),
            value,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.proj(output.flatten(2)), weights


class DJEPALayer(GradientCheckpointingLayer):
    """Pre-norm transformer block: `x + attn(LN(x))`, `x + mlp(LN(x))`."""

    def __init__(self, config: DJEPAConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = DJEPAAttention(config, hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * config.mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * config.mlp_ratio), hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, places: torch.LongTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`places` `(B, n)`: of the tokens whose output is wanted, `(B, n, D)`; of all if not given."""
        attention_output, _ = self.attention(self.norm1(hidden_states), places, **kwargs)
        if places is not None:
            hidden_states = gather_tokens(hidden_states, places)
        hidden_states = hidden_states + self.dropout(attention_output)
        mlp_output = self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(hidden_states)))))
        return hidden_states + self.dropout(mlp_output)


class ClassEmbeddings(nn.Embedding):
    """
    The class table: a row for each class, the null class last. Adapters bring rows of their own, `(classes, D)` each in
    `added`, which stand between the model's classes and the null class.
    """

    def __init__(self, num_labels: int, width: int):
        super().__init__(num_labels + 1, width)
        self.added = nn.ParameterDict()

    def forward(self, class_labels: torch.LongTensor) -> torch.Tensor:
        if len(self.added) == 0:
            return super().forward(class_labels)
        classes, null_class = self.weight.tensor_split([-1])
        return F.embedding(class_labels, torch.cat([classes, *self.added.values(), null_class]))


class ContextEncoder(nn.Module):
    """φ: features of the visible tokens, behind buffer tokens that carry the class."""

    def __init__(self, config: DJEPAConfig):
        super().__init__()
        width = config.hidden_size
        self.input_projection = nn.Linear(config.token_size, width)
        self.class_embeddings = ClassEmbeddings(config.num_labels, width)
        self.buffer_tokens = nn.Parameter(torch.zeros(1, config.num_buffer_tokens, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.input_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            DJEPALayer(config, width, config.num_attention_heads) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        class_labels: torch.LongTensor,
        visible: torch.LongTensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        batch_size = tokens.shape[0]
        positions = self.position_embeddings.expand(batch_size, -1, -1)
        if visible is not None:  # hidden tokens are dropped: nothing of them can reach the features
            tokens, positions = gather_tokens(tokens, visible), gather_tokens(positions, visible)
        embeddings = self.input_projection(tokens) + positions  # (B, visible, D)
        buffer = self.buffer_tokens + self.class_embeddings(class_labels).unsqueeze(1)  # (B, R, D)
        hidden_states = self.input_norm(torch.cat([buffer, embeddings], dim=1))  # (B, R + visible, D)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.norm(hidden_states)


class FeaturePredictor(nn.Module):
    """γ: a feature for every token, from the context features and a mask token in every hidden place."""

    def __init__(self, config: DJEPAConfig):
        super().__init__()
        width = config.predictor_hidden_size
        self.num_buffer_tokens = config.num_buffer_tokens
        self.input_projection = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.layers = nn.ModuleList(
            DJEPALayer(config, width, config.predictor_num_attention_heads)
            for _ in range(config.predictor_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        context_features: torch.Tensor,
        visible: torch.LongTensor | None,
        wanted: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        features = self.input_projection(context_features)
        buffer, tokens = features.tensor_split([self.num_buffer_tokens], dim=1)
        if visible is not None:
            num_tokens = self.position_embeddings.shape[1]
            hidden = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], num_tokens, -1)
            tokens = scatter_tokens(hidden, visible, tokens)  # (B, N, P)
        # the buffer gets no position
        hidden_states = torch.cat([buffer, tokens + self.position_embeddings], dim=1)
        *layers, last = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, **kwargs)
        if wanted is None:
            return self.norm(last(hidden_states, **kwargs)[:, self.num_buffer_tokens :])
        # the last block's other outputs would be thrown away
        return self.norm(last(hidden_states, self.num_buffer_tokens + wanted, **kwargs))


class TimeEmbedding(nn.Module):
    """A timestep's sinusoids (256 wide, cosines first, longest period 10000) through a small MLP."""

    num_frequencies = 128
    max_period = 10000.0

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = TimeEmbeddingLinear(2 * self.num_frequencies, hidden_size)
        self.fc2 = TimeEmbeddingLinear(hidden_size, hidden_size)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        # float32 whatever the weights: bfloat16 cannot tell timestep 997 from 1000
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(steps * (-math.log(self.max_period) / self.num_frequencies))
        angles = timesteps.to(torch.float32).unsqueeze(-1) * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(F.silu(self.fc1(sinusoids.to(self.fc1.weight.dtype))))


class DenoiserLayer(GradientCheckpointingLayer):
    """Residual MLP block under adaptive layer norm (adaLN)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.modulation = ZeroInitLinear(hidden_size, 3 * hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, condition: torch.Tensor | None, modulation: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`modulation` is what the layer of that name makes of the condition, where the caller has it already."""
        modulation = self.modulation(condition) if modulation is None else modulation
        shift, scale, gate = modulation.chunk(3, dim=-1)
        modulated = self.norm(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * self.fc2(F.silu(self.fc1(modulated)))


class DenoisingMLP(nn.Module):
    """ε_θ: denoises each token by itself, given its noise level and its predicted feature."""

    def __init__(self, config: DJEPAConfig):
        super().__init__()
        width = config.denoiser_hidden_size
        output_size = config.token_size * (2 if config.objective == "diffusion" else 1)
        self.time_embedding = TimeEmbedding(width)
        self.condition_projection = nn.Linear(config.predictor_hidden_size, width)
        self.input_projection = nn.Linear(config.token_size, width)
        self.layers = nn.ModuleList(
            DenoiserLayer(width, config.layer_norm_eps) for _ in range(config.denoiser_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps, elementwise_affine=False)
        self.modulation = ZeroInitLinear(width, 2 * width)
        self.output_projection = ZeroInitLinear(width, output_size)

    def modulate(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        What a condition `(..., W)` does to each layer `(..., 3W)` and to the output `(..., 2W)`: three fifths of the
        network's work. None of it depends on the noisy tokens, so that samplers do it for several timesteps at once.
        """
        condition = F.silu(condition)
        return *(layer.modulation(condition) for layer in self.layers), self.modulation(condition)

    def forward(
        self,
        noisy_tokens: torch.Tensor,
        condition: torch.Tensor | None,
        modulations: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            noisy_tokens (`torch.Tensor` of shape `(M, C)`): flat tokens.
            condition (`torch.Tensor` of shape `(M, W)`): `time_embedding(timesteps) +
                condition_projection(conditioning)`. Samplers add up the two themselves, because the first is the same
                for all tokens and the second for all timesteps.
            modulations (`tuple[torch.Tensor]`, *optional*): instead of the condition, what [`~DenoisingMLP.modulate`]
                makes of it.
        """
        hidden_states = self.input_projection(noisy_tokens)  # (M, W)
        if modulations is None:
            condition = F.silu(condition)
            modulations = [None] * len(self.layers) + [self.modulation(condition)]
        for layer, modulation in zip(self.layers, modulations, strict=False):
            hidden_states = layer(hidden_states, condition, modulation)
        shift, scale = modulations[-1].chunk(2, dim=-1)
        return self.output_projection(self.norm(hidden_states) * (1 + scale) + shift)


class PredictionHead(nn.Module):
    """u_θ: from predicted features to the target encoder's."""

    def __init__(self, config: DJEPAConfig):
        super().__init__()
        width = 4 * config.predictor_hidden_size
        self.fc1 = nn.Linear(config.predictor_hidden_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(hidden_states))))
