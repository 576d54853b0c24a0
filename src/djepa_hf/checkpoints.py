"""Checkpoints of a training run: written whole or not at all, checked before they are used, thinned out."""

import copy
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from .configuration_djepa import DJEPAConfig

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written. What was there before is untouched."""


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, config: DJEPAConfig, limit: int | None = None
) -> Path:
    """
    Writes `output_dir/checkpoint-STEP`: everything that `accelerator.prepare` and `register_for_checkpointing` saw, and
    the state of all random number generators.

    `DJEPAForPreTraining.from_pretrained` reads the folder, too, unless FSDP or DeepSpeed wrote it. It gets
    its name only once it is complete, on the disk and has a manifest of checksums; then older checkpoints beyond
    `limit` are removed.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the run; all processes must call this.
        output_dir (`Path`): of the run.
        step (`int`): optimizer steps done.
        config ([`DJEPAConfig`]): of the model, a [`DJEPAForPreTraining`].
        limit (`int`, *optional*): checkpoints to keep, this one included.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full. The message names the last good
            one.
    """
    folder = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f"unfinished-{folder.name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(unfinished)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            config = copy.deepcopy(config)
            config.architectures = ["DJEPAForPreTraining"]
            config.save_pretrained(unfinished)
            _write_manifest(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            _flush(output_dir)
            for _, old in _checkpoints(output_dir)[: -limit if limit else 0]:
                if old != folder:
                    shutil.rmtree(old)
    except Exception as error:  # every library has its own for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        last = _checkpoints(output_dir)
        kept = f"The last good checkpoint is {last[-1][1]}." if last else "There is no earlier one."
        raise CheckpointError(f"Could not write {folder}: {error} {kept}") from error
    accelerator.wait_for_everyone()
    return folder


def set_aside_later(output_dir: Path, step: int):
    """
    Renames checkpoints of a run beyond the step that it goes back to: 'latest' must not lead into a future that was
    given up.

    Args:
        output_dir (`Path`): of the run.
        step (`int`): where it goes on.
    """
    for later, folder in _checkpoints(output_dir):
        if later > step:
            aside = output_dir / f"abandoned-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            logger.warning(f"Going on from step {step}: {folder} is now {aside.name}.")


def find_checkpoint(accelerator: Accelerator, output_dir: Path, name: str) -> tuple[Path, int] | None:
    """
    The folder and the optimizer step of a checkpoint that is sound; nothing for `"latest"` where there is none yet.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the run; the main process looks, all get the answer.
        output_dir (`Path`): of the run.
        name (`str`): `"latest"`, which passes over damaged ones with a warning; a folder name such as
            `checkpoint-500`; or a path.

    Raises:
        ValueError: if there is no such checkpoint, or the one asked for is damaged.
    """
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _find(output_dir, name)
        except (OSError, ValueError) as error:  # which all processes must hear of
            answer[1] = str(error)
    found, problem = broadcast_object_list(answer)
    if problem is not None:
        raise ValueError(problem)
    return found


def check_same_model(config: DJEPAConfig, folder: Path):
    """Raises a `ValueError` that names how the model differs from the one in a checkpoint."""
    saved, current = DJEPAConfig.from_pretrained(folder).to_dict(), config.to_dict()
    differing = [name for name in DJEPAConfig.__annotations__ if saved.get(name) != current.get(name)]
    if differing:
        lists = "; ".join(f"{name} is {saved.get(name)}, not {current.get(name)}" for name in differing)
        raise ValueError(f"The checkpoint {folder} holds another model: {lists}.")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; nothing, if all its files are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"its {MANIFEST} is missing or unreadable"
    for name, entry in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    with ThreadPoolExecutor() as pool:
        for name, checksum in zip(manifest, pool.map(_checksum, (folder / name for name in manifest)), strict=True):
            if checksum != manifest[name]["sha256"]:
                return f"{name} has another checksum than when it was written"
    return None


def _find(output_dir: Path, name: str) -> tuple[Path, int] | None:
    if name == "latest":
        if not _checkpoints(output_dir):
            logger.warning(f"{output_dir} holds no checkpoint yet: starting from the beginning.")
            return None
        for step, folder in reversed(_checkpoints(output_dir)):
            problem = damage(folder)
            if problem is None:
                return folder, step
            logger.warning(f"{folder} is damaged ({problem}): going back to the one before.")
        raise ValueError(f"`resume_from_checkpoint` is 'latest', but {output_dir} holds no sound checkpoint.")
    for folder in (output_dir / name, Path(name)):
        if folder.is_dir() and (match := _NAME.fullmatch(folder.name)):
            if problem := damage(folder):
                raise ValueError(f"`resume_from_checkpoint`: {folder} is damaged: {problem}.")
            return folder, int(match[1])
    raise ValueError(
        f"`resume_from_checkpoint`: there is no checkpoint {name!r}, neither in {output_dir} nor as a path."
    )


def _checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints and their steps, oldest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _write_manifest(folder: Path):
    """Sizes and checksums of all files, once they are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        list(pool.map(_flush, paths))
        checksums = list(pool.map(_checksum, paths))
    manifest = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, checksums, strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)


def _flush(path: Path):
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
