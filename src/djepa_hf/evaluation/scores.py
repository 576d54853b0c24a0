"""Figures of merit from features. Needs the `eval` extra."""

import torch
from torch import nn

from ..metrics import load_metric
from .generation import Generated
from .real_images import Reference

NEIGHBOURS, SPLITS = 3, 10  # of precision and recall, and of the Inception Score: as everywhere


def check_counts(num_images: int, reference: Reference, width: int, has_logits: bool, kernel_subset_size: int | None):
    """
    Raises a `ValueError`, before anything is generated, if there are fewer images than a metric needs, or the reference
    has other features.
    """
    least = 2 * SPLITS if has_logits else NEIGHBOURS + 1
    if num_images < least:
        raise ValueError(f"`num_images` must be at least {least} for all metrics, got {num_images}.")
    source = reference.about["source"]
    if reference.width != width:
        raise ValueError(
            f"The reference {source} holds statistics of {reference.width} features, this extractor has {width}: they "
            "come from different networks."
        )
    if kernel_subset_size is not None and kernel_subset_size < 2:
        raise ValueError(f"`kernel_subset_size` must be at least 2, got {kernel_subset_size}.")
    count = reference.about["images"]
    if count is None:
        return
    if count <= NEIGHBOURS:
        raise ValueError(f"The reference {source} has {count} images; {NEIGHBOURS + 1} are needed.")
    if kernel_subset_size is not None and kernel_subset_size > min(num_images, count):
        raise ValueError(
            f"`kernel_subset_size` is {kernel_subset_size}, but there are {num_images} generated and {count} real "
            f"images: generate more, or make it {min(num_images, count)} at most."
        )


def score(
    generated: Generated,
    reference: Reference,
    extractor: nn.Module,
    kernel_subset_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict:
    """
    All figures that features allow.

    Args:
        generated ([`Generated`]): what is measured.
        reference ([`Reference`]): what it is measured against.
        extractor (`nn.Module`): whose features they are.
        kernel_subset_size (`int`, *optional*): images per subset of the kernel distance; 1000 or as many as there are.
        seed (`int`): of subsets and splits.
        device (`torch.device`): where distances between all images are computed.

    Returns:
        `dict`: `frechet_distance`, and the same for fewer images, which shows its bias; `kernel_distance`, `precision`,
        `recall` where there are real images and not just statistics; `inception_score` where there are logits;
        `class_agreement`, the share of images that a classifier of the model's classes reads as the label asked for.
    """
    features, real = generated.features.numpy(), reference.features
    against = reference.distribution
    frechet = load_metric("frechet_distance")
    sizes = [len(features) // part for part in (8, 4, 2)]
    results = {
        "frechet_distance": frechet.compute(predictions=features, reference=against)["frechet_distance"],
        "frechet_distance_of_fewer_images": {
            str(size): frechet.compute(predictions=features[:size], reference=against)["frechet_distance"]
            for size in sizes
            if size >= 2
        },
    }
    if real is not None:
        size = kernel_subset_size or min(1000, len(features), len(real))
        kernel, nearest = load_metric("kernel_distance", seed), load_metric("precision_recall")
        results |= kernel.compute(predictions=features, reference=real.numpy(), subset_size=size)
        results["kernel_subset_size"] = size
        results |= nearest.compute(predictions=features, reference=real.numpy(), k=NEIGHBOURS, device=device)
    if generated.logits is not None:
        inception = load_metric("inception_score", seed)
        results |= inception.compute(predictions=generated.logits.numpy(), splits=SPLITS)
    if generated.logits is not None and extractor.classes is not None:
        results["class_agreement"] = class_agreement(generated.logits, generated.labels, extractor)
    return results


def class_agreement(logits: torch.Tensor, labels: torch.Tensor, extractor: nn.Module) -> float:
    """The share of images that a classifier reads as their label."""
    return (extractor.classes[logits.argmax(-1)] == labels).double().mean().item()
