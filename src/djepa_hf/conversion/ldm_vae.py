"""Autoencoders in the layout of latent diffusion's code, such as the authors' `kl16.ckpt`, to diffusers."""

import os
import re

import torch
from diffusers import AutoencoderKL
from transformers.utils import logging

from .files import check_state_dict, check_tensors, find_file, read_checkpoint
from .sizes import KL16_SCALING_FACTOR

logger = logging.get_logger(__name__)

# diffusers' names -> those of the LDM layout, in order of application. It counts the decoder's levels from the end.
_LDM_NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.(down|up)_blocks\.", r".\1."),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
    )
)
KL16_SIZES = {
    "latent_channels": 16,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",) * 5,
}
_IS_ATTENTION_MATRIX = re.compile(r"\.attn[._]\d\.(q|k|v|proj_out)\.weight$")


def load_ldm_vae(
    path: str | os.PathLike, scaling_factor: float = KL16_SCALING_FACTOR, sample_size: int = 256, **hub_options
) -> AutoencoderKL:
    """
    Reads an autoencoder of latent diffusion's code. The defaults are those of the KL-16 autoencoder of the published
    models; channels, levels and attention come from the shapes of the tensors.

    Args:
        path (`str` or `os.PathLike`): a file with a state dict under `model` or `state_dict`, on disk or on the Hub
            (`owner/name/kl16.ckpt` or its address).
        scaling_factor (`float`, *optional*, defaults to 0.2325): what latents are multiplied by. No file tells.
        sample_size (`int`, *optional*, defaults to 256): side of the images that it was trained on.
        **hub_options: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is none of these, or has tensors missing, left over or of another shape. All are listed.
    """
    file = find_file(path, **hub_options)
    content = read_checkpoint(file)
    weights = content.get("model", content.get("state_dict"))
    if not isinstance(weights, dict) or "encoder.conv_in.weight" not in weights:
        raise ValueError(f"{file} is not an LDM autoencoder: there is no encoder.conv_in.weight under 'model'.")
    check_state_dict(file, "model", weights)
    losses = [name for name in weights if name.startswith("loss.")]
    if losses:
        logger.info(f"{file}: leaving out {len(losses)} tensors of its training loss.")
    weights = {name: tensor for name, tensor in weights.items() if name not in losses}
    try:
        sizes = _sizes(weights)
    except (KeyError, IndexError):
        sizes = KL16_SIZES  # so that what is missing can be named
    with torch.device("meta"):
        vae = AutoencoderKL(**sizes, scaling_factor=scaling_factor, sample_size=sample_size)
    levels = len(vae.config.block_out_channels)
    names = {name: _ldm_name(name, levels) for name in vae.state_dict()}
    expected = {}
    for name, tensor in vae.state_dict().items():
        # attention is a convolution of one pixel there
        is_matrix = _IS_ATTENTION_MATRIX.search(names[name])
        expected[names[name]] = tensor[..., None, None] if is_matrix else tensor
    check_tensors(file, weights, expected)
    converted = {
        name: weights[ldm_name].reshape(vae.state_dict()[name].shape).clone() for name, ldm_name in names.items()
    }
    vae.load_state_dict(converted, assign=True)
    return vae.requires_grad_(False).eval()


def _sizes(weights: dict[str, torch.Tensor]) -> dict:
    def count(pattern: str) -> int:
        return len({match[0] for name in weights if (match := re.match(pattern, name))})

    def channels(name: str, axis: int) -> int:
        return weights[name].shape[axis]

    levels = count(r"encoder\.down\.\d+\.block")
    attention = [f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)]
    decoder_attention = [f"decoder.up.{i}.attn.0.q.weight" in weights for i in reversed(range(levels))]
    return {
        "in_channels": channels("encoder.conv_in.weight", 1),
        "out_channels": channels("decoder.conv_out.weight", 0),
        "latent_channels": channels("decoder.conv_in.weight", 1),
        "block_out_channels": tuple(channels(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)),
        "layers_per_block": count(r"encoder\.down\.0\.block\.\d+"),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in decoder_attention),
    }


def _ldm_name(name: str, levels: int) -> str:
    for pattern, replacement in _LDM_NAMES:
        name = pattern.sub(replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
