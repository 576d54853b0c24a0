"""Figures of merit from features. Needs the `eval` extra."""

import torch
from torch import nn

from ..metrics import load_metric
from .generation import Generated
from .real_images import Reference


def check_counts(num_images: int, reference: Reference, width: int, kernel_subset_size: int | None):
    """
    Raises a `ValueError`, before anything is generated, if there are fewer images than a metric needs, or the reference
    has other features.
    """
    if num_images < 4:
        raise ValueError(
            f"`num_images` must be at least 4 (precision and recall look at 3 neighbours), got {num_images}."
        )
    found = len(reference.statistics["mu"]) if reference.statistics else reference.features.shape[1]
    if found != width:
        raise ValueError(
            f"The reference {reference.about['source']} holds statistics of {found} features, this extractor has "
            f"{width}: they come from different networks."
        )
    if reference.features is None:
        return
    if len(reference.features) < 4:
        raise ValueError(
            f"The reference {reference.about['source']} has {len(reference.features)} images; 4 are needed."
        )
    most = min(num_images, len(reference.features))
    if kernel_subset_size is not None and kernel_subset_size > most:
        raise ValueError(
            f"`kernel_subset_size` is {kernel_subset_size}, but there are {num_images} generated and "
            f"{len(reference.features)} real images: generate more, or make it {most} at most."
        )


def score(
    generated: Generated,
    reference: Reference,
    extractor: nn.Module,
    kernel_subset_size: int | None = None,
    seed: int = 0,
) -> dict:
    """
    All figures that features allow.

    Args:
        generated ([`Generated`]): what is measured.
        reference ([`Reference`]): what it is measured against.
        extractor (`nn.Module`): whose features they are.
        kernel_subset_size (`int`, *optional*): images per subset of the kernel distance; 1000 or as many as there are.
        seed (`int`): of subsets and splits.

    Returns:
        `dict`: `frechet_distance`, and the same for fewer images, which shows its bias; `kernel_distance`, `precision`,
        `recall` where there are real images and not just statistics; `inception_score` where there are logits;
        `class_agreement`, the share of images that a classifier of the model's classes reads as the label asked for.
    """
    features, real = generated.features.numpy(), reference.features
    against = reference.statistics or real.numpy()
    frechet = load_metric("frechet_distance")
    sizes = [size for size in (len(features) // 8, len(features) // 4, len(features) // 2) if size >= 2]
    results = {
        "frechet_distance": frechet.compute(predictions=features, reference=against)["frechet_distance"],
        "frechet_distance_of_fewer_images": {
            str(size): frechet.compute(predictions=features[:size], reference=against)["frechet_distance"]
            for size in sizes
        },
    }
    if real is not None:
        size = kernel_subset_size or min(1000, len(features), len(real))
        options = {"reference": real.numpy(), "subset_size": size}
        results |= load_metric("kernel_distance", seed).compute(predictions=features, **options)
        results["kernel_subset_size"] = size
        results |= load_metric("precision_recall").compute(predictions=features, reference=real.numpy())
    if generated.logits is not None and len(features) >= 20:
        results |= load_metric("inception_score", seed).compute(predictions=generated.logits.numpy())
    if generated.logits is not None and extractor.classes is not None:
        results["class_agreement"] = class_agreement(generated.logits, generated.labels, extractor)
    return results


def class_agreement(logits: torch.Tensor, labels: torch.Tensor, extractor: nn.Module) -> float:
    """The share of images that a classifier reads as their label."""
    return (extractor.classes[logits.argmax(-1)] == labels).double().mean().item()
