"""Names of tensors: ours, and those of the authors' code."""

import re

import torch

# Ours -> official, in order of application. The official encoder and decoder are φ and γ.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^encoder\.input_projection\.", "z_proj."),
        (r"^encoder\.input_norm\.", "z_proj_ln."),
        (r"^encoder\.buffer_tokens$", "buffer"),
        (r"^predictor\.mask_token$", "mask_token"),
        (r"^predictor\.input_projection\.", "decoder_embed."),
        (r"^(encoder|predictor)\.position_embeddings$", r"\1_pos_embed_learned"),
        (r"^(encoder|predictor)\.norm\.", r"\1_norm."),
        (r"^(encoder|predictor)\.layers\.(\d+)\.attention\.", r"\1_blocks.\2.attn."),
        (r"^(encoder|predictor)\.layers\.(\d+)\.fc", r"\1_blocks.\2.mlp.fc"),
        (r"^(encoder|predictor)\.layers\.", r"\1_blocks."),
        (r"^predictor_", "decoder_"),
        (r"^denoiser\.time_embedding\.fc1\.", "diffloss.net.time_embed.mlp.0."),
        (r"^denoiser\.time_embedding\.fc2\.", "diffloss.net.time_embed.mlp.2."),
        (r"^denoiser\.condition_projection\.", "diffloss.net.cond_embed."),
        (r"^denoiser\.input_projection\.", "diffloss.net.input_proj."),
        (r"^denoiser\.layers\.(\d+)\.norm\.", r"diffloss.net.res_blocks.\1.in_ln."),
        (r"^denoiser\.layers\.(\d+)\.fc1\.", r"diffloss.net.res_blocks.\1.mlp.0."),
        (r"^denoiser\.layers\.(\d+)\.fc2\.", r"diffloss.net.res_blocks.\1.mlp.2."),
        (r"^denoiser\.layers\.(\d+)\.modulation\.", r"diffloss.net.res_blocks.\1.adaLN_modulation.1."),
        (r"^denoiser\.output_projection\.", "diffloss.net.final_layer.linear."),
        (r"^denoiser\.modulation\.", "diffloss.net.final_layer.adaLN_modulation.1."),
        (r"^prediction_head\.", "jepaloss.net."),
    )
)
# we keep classes and null class in one table, the null class last
_TABLE, _CLASSES, _NULL_CLASS = "encoder.class_embeddings.weight", "class_emb.weight", "fake_latent"


def to_official(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors under their official names.

    Args:
        state_dict (`dict[str, torch.Tensor]`): of a [`DJEPAModel`], and of a `prediction_head` under that prefix.
    """
    official = {}
    for name, tensor in state_dict.items():
        if name == _TABLE:
            official |= {_CLASSES: tensor[:-1], _NULL_CLASS: tensor[-1:]}
        else:
            official[official_name(name)] = tensor
    return official


def from_official(name: str, official: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    One of our tensors.

    Args:
        name (`str`): ours.
        official (`dict[str, torch.Tensor]`): all tensors under their official names.
    """
    if name == _TABLE:
        return torch.cat([official[_CLASSES], official[_NULL_CLASS]])
    return official[official_name(name)]


def official_name(name: str) -> str:
    """What the authors call one of our tensors."""
    if name == _TABLE:
        return _CLASSES
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
