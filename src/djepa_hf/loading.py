"""Models from wherever they are: a pipeline, a model or a training checkpoint of ours, or one of the authors' files."""

import os
from pathlib import Path
from typing import Any

from .configuration_djepa import DJEPAConfig
from .conversion import load_official_checkpoint
from .modeling_djepa import DJEPAForPreTraining, DJEPAModel

OFFICIAL_SUFFIXES = (".pth", ".pt", ".ckpt")

# what may change between two trainings of the same weights
_RECIPE = {
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "label_dropout_prob",
    "mask_ratio_min",
    "mask_ratio_mean",
    "mask_ratio_std",
    "diffusion_batch_mul",
    "prediction_loss_weight",
    "prediction_loss_beta",
}


def load_model(name_or_path: str | os.PathLike) -> DJEPAModel | DJEPAForPreTraining:
    """
    A model as it was saved.

    Args:
        name_or_path (`str` or `os.PathLike`): the folder of a pipeline, a model or a training checkpoint, or the id of
            a pipeline on the Hub.
    """
    where = _where(name_or_path)
    config = DJEPAConfig.from_pretrained(name_or_path, **where)
    is_training = "DJEPAForPreTraining" in (config.architectures or [])
    return (DJEPAForPreTraining if is_training else DJEPAModel).from_pretrained(name_or_path, **where)


def load_for_training(name_or_path: str | os.PathLike, options: dict[str, Any]) -> DJEPAForPreTraining:
    """
    A model to train on from.

    Args:
        name_or_path (`str` or `os.PathLike`): what [`load_model`] takes, or an official training file.
        options (`dict`): arguments of [`DJEPAConfig`]. Dropout, masking and loss may differ from the saved ones, class
            names too; sizes must not.

    Raises:
        ValueError: if sizes differ; the message names them. As [`load_official_checkpoint`] besides.
    """
    if str(name_or_path).endswith(OFFICIAL_SUFFIXES):
        return load_official_checkpoint(name_or_path, config=options)
    where = _where(name_or_path)
    config = DJEPAConfig.from_pretrained(name_or_path, **where)
    wanted = DJEPAConfig(**{**config.to_diff_dict(), "weights": None, **options})
    compared = [*(name for name in options if name not in _RECIPE | {"id2label"}), "num_labels"]
    if config.latent_scaling_factor is None and "latent_scaling_factor" in compared:
        compared.remove("latent_scaling_factor")  # unknown so far
    differing = [name for name in compared if getattr(wanted, name) != getattr(config, name)]
    if differing:
        lists = "; ".join(f"{name} is {getattr(config, name)}, not {getattr(wanted, name)}" for name in differing)
        raise ValueError(f"The model in {name_or_path} does not fit: {lists}.")
    return DJEPAForPreTraining.from_pretrained(name_or_path, config=wanted, **where)


def _where(name_or_path: str | os.PathLike) -> dict[str, str]:
    """Pipelines keep the model in a folder of its own."""
    is_model = (Path(name_or_path) / "config.json").is_file()
    return {} if is_model else {"subfolder": "transformer"}
