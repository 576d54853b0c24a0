"""Models from wherever they are: a pipeline, a model or a training checkpoint of ours, or one of the authors' files."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from .configuration_djepa import DJEPAConfig
from .conversion import load_ldm_vae, load_official_checkpoint
from .modeling_djepa import DJEPAForPreTraining, DJEPAModel
from .options import check_options

OFFICIAL_SUFFIXES = (".pth", ".pt", ".ckpt")

# what may change between two trainings of the same weights
_FREE_TO_CHANGE = {
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "label_dropout_prob",
    "mask_ratio_min",
    "mask_ratio_mean",
    "mask_ratio_std",
    "diffusion_batch_mul",
    "prediction_loss_weight",
    "prediction_loss_beta",
    "id2label",
}


def load_model(name_or_path: str | os.PathLike) -> DJEPAModel | DJEPAForPreTraining:
    """
    A model as it was saved.

    Args:
        name_or_path (`str` or `os.PathLike`): the folder of a pipeline, a model or a training checkpoint, or the id of
            a pipeline on the Hub.

    Raises:
        FileNotFoundError: if there is no such folder, and it cannot be an id.
    """
    where = _where(name_or_path)
    config = DJEPAConfig.from_pretrained(name_or_path, **where)
    is_training = "DJEPAForPreTraining" in (config.architectures or [])
    return (DJEPAForPreTraining if is_training else DJEPAModel).from_pretrained(name_or_path, **where)


def load_for_training(name_or_path: str | os.PathLike, options: dict[str, Any]) -> DJEPAForPreTraining:
    """
    A model to train on from, in float32.

    Args:
        name_or_path (`str` or `os.PathLike`): what [`load_model`] takes, or an official training file.
        options (`dict`): arguments of [`DJEPAConfig`]. Dropout, masking and loss may differ from the saved ones, class
            names too; sizes must not.

    Raises:
        FileNotFoundError: if there is nothing to load.
        ValueError: if an option does not exist or a size differs; the message names it. As [`load_official_checkpoint`]
            besides.
    """
    check_options(options, DJEPAConfig.option_names())
    if str(name_or_path).endswith(OFFICIAL_SUFFIXES):
        factor = options.get("latent_scaling_factor")
        model = load_official_checkpoint(
            name_or_path, config={name: value for name, value in options.items() if name != "latent_scaling_factor"}
        )
        known = model.config.latent_scaling_factor
        if None not in (factor, known) and factor != known:
            raise ValueError(f"{name_or_path} was trained on latents times {known}; this VAE's factor is {factor}.")
        model.config.latent_scaling_factor = factor
        return model.float()
    where = _where(name_or_path)
    config = DJEPAConfig.from_pretrained(name_or_path, **where)
    saved = {**config.to_diff_dict(), "weights": None}
    if "id2label" in options:
        saved.pop("label2id", None)
    wanted = DJEPAConfig(**{**saved, **options})
    compared = [*(name for name in options if name not in _FREE_TO_CHANGE), "num_labels"]
    if config.latent_scaling_factor is None and "latent_scaling_factor" in compared:
        compared.remove("latent_scaling_factor")  # unknown so far
    differing = [name for name in compared if getattr(wanted, name) != getattr(config, name)]
    if differing:
        lists = "; ".join(f"{name} is {getattr(config, name)}, not {getattr(wanted, name)}" for name in differing)
        raise ValueError(f"The model in {name_or_path} does not fit: {lists}.")
    return DJEPAForPreTraining.from_pretrained(name_or_path, config=wanted, dtype=torch.float32, **where)


def load_vae(name_or_path: str, scaling_factor: float | None = None) -> AutoencoderKL:
    """
    An autoencoder, frozen.

    Args:
        name_or_path (`str`): a folder, an id on the Hub (`owner/name` or `owner/name/subfolder`), or a file in the
            authors' layout such as `kl16.ckpt`.
        scaling_factor (`float`, *optional*): instead of the one that comes with it.

    Raises:
        ValueError: if `scaling_factor` is not positive.
    """
    if scaling_factor is not None and not scaling_factor > 0:
        raise ValueError(f"The scaling factor of a VAE must be positive, got {scaling_factor}.")
    factor = {} if scaling_factor is None else {"scaling_factor": scaling_factor}
    if name_or_path.endswith(OFFICIAL_SUFFIXES):
        return load_ldm_vae(name_or_path, **factor)
    subfolder = None
    if not Path(name_or_path).is_dir() and name_or_path.count("/") > 1:
        owner, name, subfolder = name_or_path.split("/", 2)
        name_or_path = f"{owner}/{name}"
    return AutoencoderKL.from_pretrained(name_or_path, subfolder=subfolder, **factor).requires_grad_(False).eval()


def check_place(name_or_path: str | os.PathLike):
    """
    Raises a `FileNotFoundError` for what can be neither a folder nor an id on the Hub, before anybody asks the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`): a folder, or `owner/name`; in an existing folder it must be one, too.
    """
    path = Path(name_or_path)
    if not path.is_dir() and (str(name_or_path).count("/") != 1 or path.parent.is_dir()):
        raise FileNotFoundError(f"There is no folder {name_or_path}.")


def _where(name_or_path: str | os.PathLike) -> dict[str, str]:
    """Pipelines keep the model in a folder of its own."""
    path, could_be_id = Path(name_or_path), str(name_or_path).count("/") == 1
    if path.is_file() or not (path.is_dir() or could_be_id):
        raise FileNotFoundError(f"{name_or_path} is not a folder of djepa_hf.")
    return {} if (path / "config.json").is_file() else {"subfolder": "transformer"}
