"""Checkpoints of a training run: written whole or not at all, found again, and thinned out."""

import copy
import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator

from .configuration_djepa import DJEPAConfig

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, config: DJEPAConfig, limit: int | None = None
) -> Path:
    """
    Writes `output_dir/checkpoint-STEP`: everything that `accelerator.prepare` and `register_for_checkpointing` saw, and
    the state of all random number generators.

    `DJEPAForPreTraining.from_pretrained` reads the folder, too. It gets its name only once it is complete; then older
    checkpoints beyond `limit` are removed.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the run; all processes must call this.
        output_dir (`Path`): of the run.
        step (`int`): optimizer steps done.
        config ([`DJEPAConfig`]): of the model, a [`DJEPAForPreTraining`].
        limit (`int`, *optional*): checkpoints to keep, this one included.
    """
    folder = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f"unfinished-{folder.name}"
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config = copy.deepcopy(config)
        config.architectures = ["DJEPAForPreTraining"]
        config.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        for _, old in _checkpoints(output_dir)[: -limit if limit else 0]:
            if old != folder:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def find_checkpoint(output_dir: Path, name: str) -> tuple[Path, int]:
    """
    The folder and the optimizer step of a checkpoint.

    Args:
        output_dir (`Path`): of the run.
        name (`str`): `"latest"`, a folder name such as `checkpoint-500`, or a path.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if name == "latest":
        found = _checkpoints(output_dir)
        if not found:
            raise ValueError(f"`resume_from_checkpoint` is 'latest', but {output_dir} holds no checkpoint.")
        return found[-1][1], found[-1][0]
    for folder in (output_dir / name, Path(name)):
        if folder.is_dir() and (match := _NAME.fullmatch(folder.name)):
            return folder, int(match[1])
    raise ValueError(
        f"`resume_from_checkpoint`: there is no checkpoint {name!r}, neither in {output_dir} nor as a path."
    )


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints and their steps, oldest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)
