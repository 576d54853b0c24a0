"""The authors' training files: read into our models, and written from them."""

import copy
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_djepa import DJEPAConfig
from ..modeling_djepa import DJEPAForPreTraining, DJEPAModel, check_weights
from .files import check_state_dict, check_tensors, find_file, read_checkpoint, written_whole
from .names import from_official, official_name, to_official
from .sizes import KL16_CHANNELS, KL16_SCALING_FACTOR, contradictions, infer_config, preset_name

logger = logging.get_logger(__name__)

_PARTS = {"online": "model", "ema": "model_ema"}  # our words for the copies, and their keys in a file
_HEAD = "jepaloss."
_NO_MAR = (
    "This is a checkpoint of MAR, not of D-JEPA. MAR is another network: it has position embeddings for its buffer "
    "tokens and a further one in front of the denoising MLP, and no prediction head. Use it with MAR's own code."
)


def load_official_checkpoint(
    path: str | os.PathLike, config: DJEPAConfig | dict[str, Any] | None = None, **hub_options
) -> DJEPAForPreTraining:
    """
    Reads a training file of the authors' code, to train on from it.

    The online weights (`model`) end up in `.djepa`, the moving average (`model_ema`) in `.target`.

    Args:
        path (`str` or `os.PathLike`): a `.pth` file with the keys `model` and `model_ema`, on disk or on the Hub
            (`owner/name/file.pth` or its address).
        config ([`DJEPAConfig`] or `dict`, *optional*): the model's configuration, or single arguments of it that the
            file does not tell. Without it, sizes come from the shapes of the tensors and the options in the file.
        **hub_options: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such checkpoint, holds anything but tensors, plain containers and an
            `argparse.Namespace`, contradicts `config`, or has tensors missing, left over or of another shape. They are
            all listed.
    """
    check_config(config)
    file = find_file(path, **hub_options)
    checkpoint = read_checkpoint(file)
    online, ema = _part(checkpoint, "online", file), _part(checkpoint, "ema", file)
    config = _config_of(file, online, checkpoint.get("args"), config)
    config.weights = None  # it is both copies
    has_head = any(name.startswith(_HEAD) for name in online)
    if not has_head and config.prediction_loss_weight > 0:
        logger.warning(f"{file} was trained without the prediction loss: `prediction_loss_weight` is set to 0.")
        config.prediction_loss_weight = 0.0
    if config.prediction_loss_weight == 0:
        online = _without_head(online)
    with torch.device("meta"):
        model = DJEPAForPreTraining(config)
    expected = to_official(model.djepa.state_dict()), to_official(model.target.state_dict())
    if model.prediction_head is not None:
        expected[0].update(to_official(_under("prediction_head", model.prediction_head)))
    ema = _without_head(ema)  # targets need the encoder's average, samples the rest's
    check_tensors(file, online, expected[0], "model")
    check_tensors(file, ema, expected[1], "model_ema")

    def source(name: str) -> torch.Tensor:
        if name.startswith("target."):
            return from_official(name.removeprefix("target."), ema)
        return from_official(name.removeprefix("djepa."), online)

    # copies, not maps of the file: whoever trains on must not depend on it
    model.load_state_dict(
        {name: source(name).clone() for name in logging.tqdm(model.state_dict(), desc="Reading weights")}, assign=True
    )
    model.djepa.requires_grad_(True)
    model.target.requires_grad_(False)
    logger.info(f"{file}: online weights are in `.djepa`, EMA weights in `.target`.")
    return model.eval()


def load_official_model(
    path: str | os.PathLike,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    config: DJEPAConfig | dict[str, Any] | None = None,
    vae_channels: int | None = None,
    check: Callable[[DJEPAModel], Any] | None = None,
    **hub_options,
) -> DJEPAModel:
    """
    Reads one copy of the network from a training file of the authors' code, to sample from; nothing else is read.

    Args:
        path (`str` or `os.PathLike`): as in [`load_official_checkpoint`]; the other copy may be missing.
        weights (`"ema"` or `"online"`, defaults to `"ema"`): which copy. The choice is kept in `config.weights`.
        dtype (`torch.dtype`, *optional*): of the model; as stored if not given.
        config ([`DJEPAConfig`] or `dict`, *optional*): as in [`load_official_checkpoint`].
        vae_channels (`int`, *optional*): those of the autoencoder's latents, where neither file nor `config` say.
        check (`Callable`, *optional*): called with the model before its weights are read, to raise what is wrong.
        **hub_options: as in [`load_official_checkpoint`].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as [`load_official_checkpoint`], if `weights` is neither, or if values overflow in `dtype`.
    """
    check_weights(weights)
    check_config(config)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` must be a torch.dtype such as torch.bfloat16, got {dtype!r}.")
    file = find_file(path, **hub_options)
    checkpoint = read_checkpoint(file)
    official = _part(checkpoint, weights, file)
    config = _config_of(file, official, checkpoint.get("args"), config, vae_channels)
    config.weights = weights
    official = _without_head(official)
    with torch.device("meta"):
        model = DJEPAModel(config)
    check_tensors(file, official, to_official(model.state_dict()), _PARTS[weights])
    if check is not None:
        check(model)
    logger.warning(f"Taking the {'EMA' if weights == 'ema' else 'online'} weights of {file}.")
    loaded = {name: from_official(name, official) for name in model.state_dict()}
    model.load_state_dict(dict(_converted(loaded, dtype, file)), assign=True)
    return model.requires_grad_(True).eval()


def check_config(config: DJEPAConfig | dict[str, Any] | None):
    """Raises a `ValueError` unless `config` is a configuration, or arguments of one."""
    if config is not None and not isinstance(config, DJEPAConfig | dict):
        raise ValueError(f"`config` must be a DJEPAConfig or a dict of its arguments, got {config!r}.")


def save_official_checkpoint(model: DJEPAForPreTraining | DJEPAModel, path: str | os.PathLike):
    """
    Writes weights in the layout of the authors' training files, without an optimizer's state.

    Reading the file back gives the same bits, and the same configuration. The file has both copies of the network:
    those of a [`DJEPAForPreTraining`], or twice the same of a published [`DJEPAModel`], which has no prediction head.
    Of the prediction head there is no moving average here, so that both copies hold the online one.

    Args:
        model ([`DJEPAForPreTraining`] or [`DJEPAModel`]): square images only; the layout knows no others.
        path (`str` or `os.PathLike`): of the new file.

    Raises:
        ValueError: if the grid is not a square, or `path` exists already or cannot be written.
    """
    config = model.config
    if len(config.sample_shape) != 2 or len({*config.sample_shape}) > 1 or len({*config.patch_shape}) > 1:
        raise ValueError(
            f"The official layout knows square images only; this model has `sample_size` {config.sample_size} and "
            f"`patch_size` {config.patch_size}."
        )
    training = isinstance(model, DJEPAForPreTraining)
    copies = (model.djepa, model.target) if training else (model, model)
    online, ema = (dict(network.state_dict()) for network in copies)
    if training and model.prediction_head is not None:
        head = _under("prediction_head", model.prediction_head)
        online, ema = online | head, ema | head
    stride = 16 if config.num_channels == KL16_CHANNELS else 1
    args = Namespace(
        model=f"djepa_{preset_name(config) or 'custom'}",
        img_size=config.sample_shape[0] * stride,
        vae_stride=stride,
        vae_embed_dim=config.num_channels,
        patch_size=config.patch_shape[0],
        qk_norm=config.qk_norm,
        buffer_size=config.num_buffer_tokens,
        class_num=config.num_labels,
        label_drop_prob=config.label_dropout_prob,
        diffloss="flow" if config.objective == "flow_matching" else "gauss",
        djepa_hf={name: value for name, value in config.to_dict().items() if name in DJEPAConfig.__dataclass_fields__},
    )
    content = {"model": _whole(to_official(online)), "model_ema": _whole(to_official(ema)), "args": args}
    with written_whole(path) as unfinished:
        torch.save(content, unfinished)


def _part(checkpoint: dict, weights: str, file: Path) -> dict[str, torch.Tensor]:
    """One copy of the network, its names without the prefix that compiled training leaves."""
    part = checkpoint.get(_PARTS[weights])
    if not isinstance(part, dict):
        other = [name for name, key in _PARTS.items() if isinstance(checkpoint.get(key), dict)]
        hint = (
            f'it has {other[0]} weights: weights="{other[0]}"' if other else f"its entries are {list(checkpoint)[:5]}"
        )
        if other and "encoder.conv_in.weight" in checkpoint[_PARTS[other[0]]]:
            raise ValueError(f"{file} is an autoencoder, not D-JEPA: read it with `load_ldm_vae`.")
        raise ValueError(f"{file} is not an official D-JEPA checkpoint with {_PARTS[weights]!r} in it; {hint}.")
    check_state_dict(file, _PARTS[weights], part)
    part = {name.removeprefix("_orig_mod."): tensor for name, tensor in part.items()}
    named = str(getattr(checkpoint.get("args"), "model", ""))
    if "diffusion_pos_embed_learned" in part or named.startswith("mar_"):
        raise ValueError(f"{file}: {_NO_MAR}")
    return part


def _config_of(
    file: Path,
    official: dict[str, torch.Tensor],
    args: Namespace | None,
    config: DJEPAConfig | dict[str, Any] | None,
    vae_channels: int | None = None,
) -> DJEPAConfig:
    problems = contradictions(config, official) if config is not None else []
    if problems:
        reason = f"{file} does not fit `config`: {'; '.join(problems)}."
        if not isinstance(config, DJEPAConfig):
            raise ValueError(reason)
        with torch.device("meta"):
            expected = to_official(DJEPAModel(config).state_dict())
        check_tensors(file, _without_head(official), expected, reason=reason)
    if isinstance(config, DJEPAConfig):
        config = copy.deepcopy(config)
    else:
        config = infer_config(file, official, args, config, vae_channels)
    is_ours = hasattr(args, "djepa_hf")  # then the factor is known, or known to be unknown
    if config.latent_scaling_factor is None and config.num_channels == KL16_CHANNELS and not is_ours:
        config.latent_scaling_factor = KL16_SCALING_FACTOR
    preset = preset_name(config)
    logger.info(f"{file}: {f'the {preset} preset' if preset else 'sizes of no preset'}, read from the file.")
    return config


def _converted(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, file: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies in another type. They are copies in any case: a model must not depend on the file any longer."""
    overflown = []
    for name, tensor in logging.tqdm(tensors.items(), desc="Reading weights"):
        converted = tensor.to(dtype or tensor.dtype, copy=True)
        if converted.dtype == torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
            overflown.append(f"{official_name(name)} (up to {tensor.abs().max():.3g})")
        yield name, converted
    if overflown:
        raise ValueError(
            f"{file} has values beyond float16's range ({torch.finfo(torch.float16).max:.0f}) in "
            f"{', '.join(overflown)}. Use torch.bfloat16 or torch.float32."
        )


def _without_head(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in official.items() if not name.startswith(_HEAD)}


def _under(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def _whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, and without slices: `torch.save` would write all that they are a part of."""
    return {
        name: tensor.cpu() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.cpu().clone()
        for name, tensor in tensors.items()
    }
