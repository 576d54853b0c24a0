"""A model's sizes, from the shapes of its tensors and from what the file says of itself."""

import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from ..configuration_djepa import PRESETS, DJEPAConfig
from ..imagenet_classes import IMAGENET_CLASSES
from ..options import check_options

KL16_CHANNELS, KL16_SCALING_FACTOR = 16, 0.2325  # the autoencoder of the published models

# what the authors' training options say that the weights do not
_TRAINING_OPTIONS = {
    "label_drop_prob": "label_dropout_prob",
    "attn_dropout": "attention_probs_dropout_prob",
    "proj_dropout": "hidden_dropout_prob",
    "mask_ratio_min": "mask_ratio_min",
    "diffusion_batch_mul": "diffusion_batch_mul",
}

# what makes a model one of the presets
_SIZES = (
    *PRESETS["base"],
    "predictor_hidden_size",
    "predictor_num_hidden_layers",
    "predictor_num_attention_heads",
    "mlp_ratio",
    "num_buffer_tokens",
    "sample_size",
    "patch_size",
    "num_channels",
    "num_labels",
)


def sizes_of_tensors(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """
    All that the shapes tell, as arguments of [`DJEPAConfig`], and `num_tokens`, `token_size` and `mlp_width`.

    Args:
        weights (`dict[str, torch.Tensor]`): under their official names; some may be missing.
    """
    sizes = {}

    def tell(size: str, tensor: str, axis: int):
        if tensor in weights and weights[tensor].ndim > axis:
            sizes[size] = weights[tensor].shape[axis]

    tell("hidden_size", "z_proj.weight", 0)
    tell("token_size", "z_proj.weight", 1)
    tell("num_labels", "class_emb.weight", 0)
    tell("num_buffer_tokens", "buffer", 1)
    tell("num_tokens", "encoder_pos_embed_learned", 1)
    tell("predictor_hidden_size", "decoder_embed.weight", 0)
    tell("denoiser_hidden_size", "diffloss.net.input_proj.weight", 0)
    for size, blocks in (
        ("num_hidden_layers", "encoder_blocks"),
        ("predictor_num_hidden_layers", "decoder_blocks"),
        ("denoiser_num_hidden_layers", "diffloss.net.res_blocks"),
    ):
        numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))]
        sizes[size] = max(numbers, default=-1) + 1
    sizes["qk_norm"] = any(".attn.q_norm." in name for name in weights)
    for prefix, blocks in (("", "encoder_blocks"), ("predictor_", "decoder_blocks")):
        width, head = sizes.get(f"{prefix}hidden_size"), weights.get(f"{blocks}.0.attn.q_norm.weight")
        if width and head is not None:
            sizes[f"{prefix}num_attention_heads"] = width // len(head)
    tell("mlp_width", "encoder_blocks.0.mlp.fc1.weight", 0)
    output = weights.get("diffloss.net.final_layer.linear.weight")
    if output is not None and "token_size" in sizes:
        sizes["objective"] = "diffusion" if len(output) == 2 * sizes["token_size"] else "flow_matching"
    return sizes


def infer_config(
    path: Path,
    weights: dict[str, torch.Tensor],
    args: Namespace | None = None,
    known: dict[str, Any] | None = None,
    vae_channels: int | None = None,
) -> DJEPAConfig:
    """
    The configuration of a model in an official file. Shapes come first, then `known`, then what the file's options say,
    then the preset that these name or whose sizes these are.

    Args:
        path (`Path`): of the file, for messages.
        weights (`dict[str, torch.Tensor]`): under their official names.
        args (`argparse.Namespace`, *optional*): the options that the file was trained with.
        known (`dict`, *optional*): arguments of [`DJEPAConfig`].
        vae_channels (`int`, *optional*): those of the autoencoder's latents, where neither `known` nor `args` say.

    Raises:
        ValueError: if `known` has an argument that does not exist, or a size is still open; the message names it.
    """
    known = dict(known or {})
    check_options(known, DJEPAConfig.option_names())
    args = vars(args) if isinstance(args, Namespace) else args if isinstance(args, dict) else {}
    args = {name: value for name, value in args.items() if value is not None}
    shapes = sizes_of_tensors(weights)
    num_tokens, token_size, mlp_width = (shapes.pop(name, None) for name in ("num_tokens", "token_size", "mlp_width"))
    options = {"id2label": known["id2label"]} if "id2label" in known else {}
    options |= {ours: args[theirs] for theirs, ours in _TRAINING_OPTIONS.items() if theirs in args}
    options |= dict(args.get("djepa_hf", {}))  # what `save_official_checkpoint` left there
    options |= known | shapes
    preset = _preset_of(str(args.get("model", "")), options)
    options = PRESETS.get(preset, {}) | options
    if mlp_width and int(options["hidden_size"] * options.get("mlp_ratio", 4.0)) != mlp_width:
        # half a neuron more, so that rounding down gives this width again
        whole = mlp_width % options["hidden_size"] == 0
        options["mlp_ratio"] = (mlp_width + (0 if whole else 0.5)) / options["hidden_size"]
    if "id2label" in options or options.get("num_labels") == len(IMAGENET_CLASSES):
        options.pop("num_labels", None)  # names given, or ImageNet's

    # the grid of tokens is square unless told otherwise; the shapes know only how many tokens, and how large they are
    if "patch_size" not in options and "num_channels" not in options:
        if token_size == args.get("patch_size", 0) ** 2 * args.get("vae_embed_dim", 0):
            options["patch_size"] = args["patch_size"]
        elif vae_channels is not None:
            options["num_channels"] = vae_channels
        elif preset:
            options["patch_size"] = 1
    if token_size and "patch_size" not in options and "num_channels" in options:
        options["patch_size"] = math.isqrt(token_size // options["num_channels"])
        if options["patch_size"] ** 2 * options["num_channels"] != token_size:
            raise ValueError(
                f"A token of {path} has {token_size} numbers, which {options['num_channels']} channels cannot make."
            )
    if token_size and "num_channels" not in options and isinstance(options.get("patch_size"), int):
        options["num_channels"] = token_size // options["patch_size"] ** 2
    if num_tokens and "sample_size" not in options and isinstance(options.get("patch_size"), int):
        side = math.isqrt(num_tokens)
        if side**2 == num_tokens:
            options["sample_size"] = side * options["patch_size"]
    needed = ["hidden_size", "num_attention_heads", "patch_size", "num_channels", "sample_size"]
    if open_sizes := [name for name in needed if name not in options]:
        raise ValueError(
            f"The tensors of {path} do not tell {', '.join(f'`{name}`' for name in open_sizes)}: pass `config` with "
            f"it, such as config={{{open_sizes[0]!r}: ...}}."
        )
    config = DJEPAConfig(**options)
    for name, found in (("num_tokens", num_tokens), ("token_size", token_size)):
        if found is not None and getattr(config, name) != found:
            raise ValueError(
                f"{path} has {name} {found}; `sample_size` {config.sample_size}, `patch_size` {config.patch_size} and "
                f"`num_channels` {config.num_channels} make it {getattr(config, name)}."
            )
    return config


def contradictions(config: DJEPAConfig | dict[str, Any], weights: dict[str, torch.Tensor]) -> list[str]:
    """Where a configuration says something else than the shapes of the tensors, in words."""
    given = dict(config) if isinstance(config, dict) else {**vars(config), "num_labels": config.num_labels}
    if isinstance(config, DJEPAConfig):
        width = int(config.hidden_size * config.mlp_ratio)
        given |= {"num_tokens": config.num_tokens, "token_size": config.token_size, "mlp_width": width}
    elif "id2label" in config:
        given["num_labels"] = len(config["id2label"])
    sizes = sizes_of_tensors(weights)
    return [
        f"{name} is {size} in the file, {given[name]} in `config`"
        for name, size in sizes.items()
        if given.get(name, size) != size
    ]


def preset_name(config: DJEPAConfig) -> str | None:
    """The preset whose sizes a configuration has, all of them, if there is one."""
    for name in PRESETS:
        preset = DJEPAConfig.from_preset(name)
        if all(getattr(config, size) == getattr(preset, size) for size in _SIZES):
            return name
    return None


def _preset_of(model: str, sizes: dict[str, Any]) -> str | None:
    if model.removeprefix("djepa_") in PRESETS:
        return model.removeprefix("djepa_")
    for name, preset in PRESETS.items():
        # heads leave no trace in the weights without qk-norm
        if all(sizes.get(size, "any" if "heads" in size else None) in (value, "any") for size, value in preset.items()):
            return name
    return None
