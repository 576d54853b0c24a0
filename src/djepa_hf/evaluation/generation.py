"""Samples of a pipeline and their features, on all processes, from where an earlier run was killed."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..seeds import seed_of

KEPT_PICTURES = 100  # for a look, where not all are kept


@dataclass
class Generated:
    """
    Features of generated images, in order.

    Args:
        features (`torch.Tensor` of shape `(n, width)`), logits (`(n, classes)` or none), labels (`(n,)`).
        images_per_second (`float`): of all processes together, without features and files.
        num_constant (`int`): images of one colour.
    """

    features: torch.Tensor
    logits: torch.Tensor | None
    labels: torch.Tensor
    images_per_second: float
    num_constant: int


def label_of(i: int, num_labels: int, labels: str, seed: int) -> int:
    """The class of image `i`: in turn (`"balanced"`), or drawn (`"random"`)."""
    return i % num_labels if labels == "balanced" else seed_of("label", seed, i) % num_labels


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    extractor: nn.Module,
    state: PartialState,
    folder: Path,
    num_images: int,
    batch_size: int,
    options: dict,
    labels: str = "balanced",
    seed: int = 0,
    save_images: bool = False,
    title: str = "generating",
) -> Generated | None:
    """
    Generates images and keeps their features. Image `i` depends on `seed` and `i` alone; batches are always the same
    ones, so that as many processes as one likes give the same images, bit for bit on one kind of machine.

    Args:
        pipe ([`DJEPAPipeline`]): with its progress bar off.
        extractor (`nn.Module`): see `extractors`; on the pipeline's device.
        state ([`~accelerate.PartialState`]): the processes.
        folder (`Path`): features go to `batches/`, one file each, which an interrupted run finds again; pictures to
            `images/`.
        num_images, batch_size (`int`): how many, and how many at a time.
        options (`dict`): arguments of the pipeline's call.
        labels (`"balanced"` or `"random"`): see [`label_of`].
        seed (`int`): of noise, orders and random labels.
        save_images (`bool`): whether to keep all pictures, and not just the first hundred.
        title (`str`): of the progress bar.

    Returns:
        [`Generated`] on the main process, nothing on the others.

    Raises:
        ValueError: if an image is not finite, or all are the same.
    """
    parts = folder / "batches"
    parts.mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    starts = range(0, num_images, batch_size)
    mine = [(j, start) for j, start in enumerate(starts) if j % state.num_processes == state.process_index]
    num_pictures = num_images if save_images else min(num_images, KEPT_PICTURES)
    left = [(j, start) for j, start in mine if not _is_done(folder, j, start, batch_size, num_pictures)]
    count = sum(min(batch_size, num_images - start) for _, start in mine)
    done = count - sum(min(batch_size, num_images - start) for _, start in left)
    is_shown = state.is_main_process and left
    with tqdm(total=count, initial=done, desc=title, unit=" images", disable=not is_shown) as progress:
        for j, start in left:
            ids = range(start, min(start + batch_size, num_images))
            classes = [label_of(i, pipe.transformer.config.num_labels, labels, seed) for i in ids]
            generators = [torch.Generator().manual_seed(seed_of("image", seed, i)) for i in ids]
            started = time.perf_counter()
            images = pipe(classes, generator=generators, output_type="pt", **options).images.float().cpu()
            seconds = time.perf_counter() - started
            finite = images.flatten(1).isfinite().all(1)
            if not finite.all():
                i = ids[int(finite.logical_not().nonzero()[0])]
                raise ValueError(f"Image {i} is not finite: the weights are damaged, or half precision was too coarse.")
            levels = (images * 255).round().to(torch.uint8)  # what a picture file would hold
            _keep_pictures(levels, ids, folder / "images", num_pictures)
            features, logits = extractor(levels.to(pipe.device).float() / 255)
            tensors = {"features": features.float().cpu(), "labels": torch.tensor(classes)}
            if logits is not None:
                tensors["logits"] = logits.float().cpu()
            is_constant = (levels.flatten(1) == levels.flatten(1)[:, :1]).all(1)
            if not features.isfinite().all():
                raise ValueError(f"The features of images {ids[0]} to {ids[-1]} are not finite.")
            # of all processes together, which share the work: another start may have other ones
            about = {"seconds": repr(seconds / state.num_processes), "constant": str(int(is_constant.sum()))}
            unfinished = parts / f"{j:06d}.unfinished"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, about)
            os.replace(unfinished, _path(parts, j))
            progress.update(len(ids))
    state.wait_for_everyone()
    return _collect(parts, len(starts)) if state.is_main_process else None


def _path(parts: Path, j: int) -> Path:
    return parts / f"{j:06d}.safetensors"


def _is_done(folder: Path, j: int, start: int, batch_size: int, num_pictures: int) -> bool:
    """Whether a batch's features and all its pictures that are to be kept are there."""
    pictures = range(start, min(start + batch_size, num_pictures))
    is_kept = all((folder / "images" / f"{i:06d}.png").is_file() for i in pictures)
    return is_kept and _path(folder / "batches", j).is_file()


def _keep_pictures(levels: torch.Tensor, ids: range, folder: Path, most: int):
    for i, image in zip(ids, levels, strict=True):
        if i < most:
            pixels = image[0] if len(image) == 1 else image.movedim(0, -1)
            Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(folder / f"{i:06d}.png")


def _collect(parts: Path, count: int) -> Generated:
    columns: dict[str, list[torch.Tensor]] = {}
    seconds, constant = 0.0, 0
    for j in range(count):
        with safe_open(_path(parts, j), "pt") as file:
            seconds += float(file.metadata()["seconds"])
            constant += int(file.metadata()["constant"])
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                columns.setdefault(name, []).append(file.get_tensor(name))
    tensors = {name: torch.cat(column) for name, column in columns.items()}
    features = tensors["features"]
    if len(features) > 1 and bool((features == features[0]).all()):
        raise ValueError(f"All {len(features)} images have the same features: the model draws one picture only.")
    return Generated(features, tensors.get("logits"), tensors["labels"], len(features) / seconds, constant)
