"""The authors' training files (`djepa_base.pth` and the like) to djepa_hf models."""

import argparse
import copy
import os
import pickle
import re

import torch
from transformers.utils import logging

from .configuration_djepa import PRESETS, DJEPAConfig
from .modeling_djepa import DJEPAForPreTraining, DJEPAModel

logger = logging.get_logger(__name__)

# Official name -> ours, in order of application; `encoder` and `decoder` are the context encoder and feature predictor.
_RENAMES = (
    (r"^z_proj\.", "encoder.input_projection."),
    (r"^z_proj_ln\.", "encoder.input_norm."),
    (r"^buffer$", "encoder.buffer_tokens"),
    (r"^encoder_pos_embed_learned$", "encoder.position_embeddings"),
    (r"^encoder_norm\.", "encoder.norm."),
    (r"^encoder_blocks\.", "encoder.layers."),
    (r"^decoder_embed\.", "predictor.input_projection."),
    (r"^mask_token$", "predictor.mask_token"),
    (r"^decoder_pos_embed_learned$", "predictor.position_embeddings"),
    (r"^decoder_norm\.", "predictor.norm."),
    (r"^decoder_blocks\.", "predictor.layers."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.fc", ".fc"),
    (r"^diffloss\.net\.", "denoiser."),
    (r"^denoiser\.time_embed\.mlp\.0\.", "denoiser.time_embedding.fc1."),
    (r"^denoiser\.time_embed\.mlp\.2\.", "denoiser.time_embedding.fc2."),
    (r"^denoiser\.cond_embed\.", "denoiser.condition_projection."),
    (r"^denoiser\.input_proj\.", "denoiser.input_projection."),
    (r"^denoiser\.res_blocks\.", "denoiser.layers."),
    (r"\.in_ln\.", ".norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"^denoiser\.final_layer\.linear\.", "denoiser.output_projection."),
    (r"^denoiser\.final_layer\.", "denoiser."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"^jepaloss\.net\.", "prediction_head."),
)


def load_official_checkpoint(path: str | os.PathLike, config: DJEPAConfig | None = None) -> DJEPAForPreTraining:
    """
    Reads a training file of the authors' code.

    The online weights (`model`) end up in `.djepa`, the moving average (`model_ema`) in `.target`. The file is read
    without running code from it: of all classes a pickle may name, only `argparse.Namespace` is let in.

    Args:
        path (`str` or `os.PathLike`): a `.pth` file with the keys `model` and `model_ema`.
        config ([`DJEPAConfig`], *optional*): the model's sizes. Without it the file must name a preset
            (`args.model`: `djepa_base`, `djepa_large` or `djepa_huge`).

    Raises:
        ValueError: if the file is no such checkpoint, names no preset, or its tensors do not fit the configuration.
            Tensors that are missing, left over or of another shape are listed.
    """
    checkpoint = _read_pickle(path)
    for key in ("model", "model_ema"):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise ValueError(f"{path} is not an official D-JEPA checkpoint: it has no entry {key!r}.")
    config = _preset_of(checkpoint, path) if config is None else copy.deepcopy(config)
    online, ema = (_rename(checkpoint[key]) for key in ("model", "model_ema"))
    head = {name: tensor for name, tensor in online.items() if name.startswith("prediction_head.")}
    if not head and config.prediction_loss_weight > 0:
        logger.warning(f"{path} was trained without the prediction loss: `prediction_loss_weight` is set to 0.")
        config.prediction_loss_weight = 0.0
    weights = {f"djepa.{name}": tensor for name, tensor in online.items() if name not in head}
    # the average of the prediction head has no use: targets need the encoder, samples the rest
    weights |= {f"target.{name}": tensor for name, tensor in ema.items() if not name.startswith("prediction_head.")}
    weights |= head

    with torch.device("meta"):
        model = DJEPAForPreTraining(config)
    _check_tensors(weights, model.state_dict(), path)
    model.load_state_dict(weights, assign=True)
    model.djepa.requires_grad_(True)
    model.target.requires_grad_(False)
    logger.info(f"{path}: online weights are in `.djepa`, EMA weights in `.target`.")
    return model.eval()


def check_weights(weights: str):
    """Raises a `ValueError` unless `weights` is `"ema"` or `"online"`."""
    if weights not in ("ema", "online"):
        raise ValueError(f"`weights` must be 'ema' or 'online', got {weights!r}.")


def select_weights(model: DJEPAForPreTraining, weights: str) -> DJEPAModel:
    """
    The copy to sample from, named in the log.

    Args:
        model ([`DJEPAForPreTraining`]): a training model.
        weights (`str`): `"ema"` or `"online"`.

    Raises:
        ValueError: if `weights` is neither.
    """
    check_weights(weights)
    logger.warning(f"Taking the {'EMA' if weights == 'ema' else 'online'} weights.")
    return (model.target if weights == "ema" else model.djepa).requires_grad_(True)


def _read_pickle(path: str | os.PathLike) -> dict:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no checkpoint that can be read safely: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a complete PyTorch file of the zip format: {str(error).splitlines()[0]}"
        ) from error


def _preset_of(checkpoint: dict, path: str | os.PathLike) -> DJEPAConfig:
    name = getattr(checkpoint.get("args"), "model", None)
    preset = str(name).removeprefix("djepa_")
    if preset not in PRESETS:
        raise ValueError(f"{path} names no known preset (args.model is {name!r}): pass `config`.")
    config = DJEPAConfig.from_preset(preset)
    output = _strip(checkpoint["model"]).get("diffloss.net.final_layer.linear.weight")
    if output is not None and output.shape[0] == config.token_size:
        return DJEPAConfig.from_preset(preset, objective="flow_matching")
    return config


def _strip(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}


def _rename(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in _strip(state_dict).items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    # one table for classes and null class, the null class last
    if "class_emb.weight" in renamed and "fake_latent" in renamed:
        table = torch.cat([renamed.pop("class_emb.weight"), renamed.pop("fake_latent")])
        renamed["encoder.class_embeddings.weight"] = table
    return renamed


def _check_tensors(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: str | os.PathLike):
    problems = [f"missing {name}" for name in expected if name not in ours]
    problems += [f"unexpected {name}" for name in ours if name not in expected]
    problems += [
        f"{name} is {tuple(ours[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in ours and ours[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit the configuration: {'; '.join(problems)}.")
