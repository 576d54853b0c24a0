"""Options of the scripts: dataclasses that YAML files and the command line fill. Needs the `train` extra."""

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from .configuration_djepa import DJEPAConfig


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of options, with its default and what `--help` says of it."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def _model_fields() -> list[tuple[str, Any, Any]]:
    """The sizes of [`DJEPAConfig`] that data do not determine, as optional options of one type each."""
    fields = []
    for name, annotation in DJEPAConfig.__annotations__.items():
        if name in ("model_type", "sample_size", "num_channels", "latent_scaling_factor", "weights"):
            continue
        if isinstance(annotation, types.UnionType):
            members = typing.get_args(annotation)
            annotation = float if float in members else members[0]
        help = f"`DJEPAConfig.{name}`; what the preset says if not given."
        fields.append((name, annotation | None if isinstance(annotation, type) else annotation, option(None, help)))
    return fields


@dataclasses.dataclass
class PresetArguments:
    init_from: str | None = option(
        None, "Train on from these weights: a pipeline or checkpoint of ours, or an official .pth file."
    )
    preset: Literal["base", "large", "huge"] = option(
        None, "Sizes to start from, base if not given; single ones can be overridden."
    )


ModelArguments = dataclasses.make_dataclass("ModelArguments", _model_fields(), bases=(PresetArguments,))
ModelArguments.__doc__ = "Sizes of the model."


@dataclasses.dataclass
class DataArguments:
    """What to train on."""

    dataset_name: str | None = option(
        None, "'digits', a data set of the Hub, a folder that `datasets` can load, or a format with `data_files`."
    )
    dataset_config_name: str | None = option(None, "A configuration of the data set.")
    data_files: str | None = option(None, "Files of a format such as parquet or webdataset; a pattern does.")
    streaming: bool = option(False, "Read the data set while training, without downloading it first.")
    num_classes: int | None = option(None, "For streamed data whose classes are mere numbers.")
    latent_cache_dir: str | None = option(None, "Latents from examples/cache_latents.py, instead of images.")
    train_data_dir: str | None = option(None, "A folder with one sub-folder of images per class.")
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the classes.")
    resolution: list[int] = option(
        [256], "Side of the images, or height and width: they are resized and centre-cropped to it."
    )
    random_flip: bool = option(True, "Flip half of the images left to right. Off for digits and text.")
    pretrained_vae_model_name_or_path: str | None = option(
        None, "An `AutoencoderKL` (folder or id, also 'id/subfolder') to train in the latents of; pixels without it."
    )
    dataloader_num_workers: int = option(0, "Processes that decode images; 0 decodes in the main process.")

    def __post_init__(self):
        if len(self.resolution) not in (1, 2) or min(self.resolution) < 1:
            raise ValueError(f"`resolution` must be a side, or a height and a width, got {self.resolution}.")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"`dataloader_num_workers` must not be negative, got {self.dataloader_num_workers}.")

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The side of square images, or height and width."""
        return self.resolution[0] if len(set(self.resolution)) == 1 else tuple(self.resolution)


@dataclasses.dataclass
class TrainingArguments:
    """How to train. Defaults are the published recipe where it does not depend on the data."""

    output_dir: str = option("outputs/djepa", "Where the pipeline, checkpoints, previews and plots go.")
    seed: int = option(0, "Seed of everything random.")
    train_batch_size: int = option(64, "Samples per process and forward.")
    gradient_accumulation_steps: int = option(1, "Forwards per optimizer step.")
    num_train_epochs: int = option(1, "Passes over the data, unless `max_train_steps` says otherwise.")
    max_train_steps: int | None = option(None, "Optimizer steps; overrides `num_train_epochs`.")
    learning_rate: float = option(1e-4, "Peak learning rate. The recipe: 1e-4 per 256 samples of the global batch.")
    lr_scheduler: str = option("constant_with_warmup", "Any schedule of `diffusers.optimization.get_scheduler`.")
    lr_warmup_steps: int = option(100, "Optimizer steps until the peak learning rate.")
    adam_beta1: float = option(0.9, "AdamW's first beta.")
    adam_beta2: float = option(0.95, "AdamW's second beta.")
    adam_epsilon: float = option(1e-6, "AdamW's epsilon.")
    adam_weight_decay: float = option(0.02, "Weight decay at the end of training; it rises to it from 0.")
    max_grad_norm: float = option(3.0, "Gradients are clipped to this norm.")
    ema_decay: float = option(0.9999, "Decay of the moving average that is published.")
    ema_warmup: bool = option(True, "Begin with a smaller decay, so that short runs forget their random start.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option(None, "As in the accelerate configuration if not given.")
    timestep_spacing: Literal["linspace", "leading"] = option(
        "linspace", "`DDPMTokenScheduler.timestep_spacing` of the result, for the diffusion objective."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    max_skipped_steps: int = option(10, "Stop after so many steps in a row whose losses were not finite.")
    max_unreadable_images: int = option(100, "Stop once a process met more images than this that cannot be read.")
    dry_run: bool = option(False, "Show what would be done, with the first batch as a picture, and stop.")
    checkpointing_steps: int | None = option(None, "Save a checkpoint every so many steps; none if not given.")
    checkpoints_total_limit: int | None = option(None, "Keep only so many checkpoints, the newest.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint folder of this run, or 'latest'.")
    report_to: str | None = option(None, "A tracker that Accelerate knows: tensorboard, trackio, wandb, ...")
    logging_steps: int = option(10, "Log losses to the tracker every so many steps.")
    validation_steps: int | None = option(None, "Write a preview grid every so many steps; none if not given.")

    def __post_init__(self):
        at_least_one = ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps")
        at_least_one += ("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "validation_steps")
        at_least_one += ("max_skipped_steps",)
        for name in at_least_one:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1], got {self.ema_decay}.")


@dataclasses.dataclass
class SamplingArguments:
    """How to sample, in previews and scripts."""

    num_inference_steps: int | None = option(None, "Autoregressive steps; 64, or as many as there are tokens.")
    num_denoising_steps: int = option(50, "Denoising steps per token.")
    final_denoising_steps: int | None = option(None, "Of the last tokens; fewer than of the first save much time.")
    guidance_scale: float = option(3.0, "Classifier-free guidance; 1 does without.")
    guidance_schedule: Literal["linear", "constant"] = option("linear", "How guidance grows as tokens appear.")
    temperature: float = option(0.98, "Below 1: less variety, fewer mistakes.")
    solver: str | None = option(
        None, "Another than the pipeline's: ddpm, ddim, dpmsolver++, unipc; or euler, heun, midpoint."
    )
    profile: Literal["exact", "balanced", "fast"] = option("exact", "How much of all these steps is really done.")
    token_order: Literal["random", "checkerboard"] = option("random", "Which tokens come first.")
    null_refresh_interval: int = option(1, "With guidance, steps between two looks at the null class.")

    def call_options(self, num_tokens: int) -> dict[str, Any]:
        """Keyword arguments of `DJEPAPipeline.__call__` for a model of `num_tokens` tokens."""
        options = dataclasses.asdict(self)
        if self.num_inference_steps is None:
            options["num_inference_steps"] = min(64, num_tokens)
        usual = {"final_denoising_steps": None, "solver": None, "profile": "exact"}
        usual |= {"token_order": "random", "null_refresh_interval": 1}
        return {name: value for name, value in options.items() if name not in usual or value != usual[name]}


def parse_arguments(*dataclass_types: type, argv: list[str] | None = None, description: str | None = None) -> tuple:
    """
    Instances of dataclasses from `--config FILE.yaml` and the command line, which goes before the file.

    Args:
        *dataclass_types (`type`): their fields are the options. A YAML file holds a flat mapping of the same names.
        argv (`list[str]`, *optional*): the command line; that of the process if not given.
        description (`str`, *optional*): for `--help`.

    Returns:
        `tuple`: one instance per dataclass.

    Exits with a message that names the closest option if one does not exist, and the value if it has a wrong type.
    """
    parser = HfArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="A YAML file of options; the command line goes before it.")
    argv = sys.argv[1:] if argv is None else argv
    known = {field.name for kind in dataclass_types for field in dataclasses.fields(kind)}
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # knows no required options: the file may
    finder.add_argument("--config", type=Path)  # hold them
    early = finder.parse_known_args(argv)[0]
    # the file becomes the beginning of the command line: one way to check types, and later options win
    argv = [*_options_of_file(early.config, known, parser), *argv] if early.config is not None else argv
    *parsed, remaining = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    for option in remaining:
        if option.startswith("-"):
            closest = _closest(option, known | {"config"})
            parser.error(f"there is no option {option.split('=')[0]}; did you mean {closest}?")
    if remaining:
        parser.error(f"unexpected {' '.join(remaining)}")
    return tuple(part for part in parsed if dataclasses.is_dataclass(part))


def _options_of_file(path: Path, known: set[str], parser: HfArgumentParser) -> list[str]:
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read {path}: {error}")
    if not isinstance(options, dict):
        parser.error(f"{path} must be a mapping of options, got a {type(options).__name__}")
    argv = []
    for name, value in options.items():
        if name not in known:
            parser.error(f"{path} has an unknown key {name!r}; did you mean {_closest(str(name), known)}?")
        if value is False and name == "mixed_precision":
            value = "no"  # which YAML takes for a boolean
        if value is not None:
            argv += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return argv


def _closest(option: str, known: set[str]) -> str:
    name = option.lstrip("-").split("=")[0].replace("-", "_")
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
