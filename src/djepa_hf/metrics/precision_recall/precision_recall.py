"""Precision and recall of generated samples (arXiv 1904.06991): how much lies within the other set."""

import datasets
import evaluate
import numpy as np
import torch

_DESCRIPTION = """
A set of features covers a point if the point is no further from one of its members than that member's k-th nearest
neighbour in the set. Precision: the share of generated images that real ones cover. Recall: the share of real images
that generated ones cover.
"""
_INPUTS = """
Args:
    predictions: features of generated images, (n, d), more than k.
    reference: features of real images, (m, d), more than k.
    k: neighbours, 3 if not given, as in the paper.
    batch_size: rows of distances at a time, 2048 if not given.
    device: where to compute, the CPU if not given.
Returns:
    precision (float), recall (float)
"""


class PrecisionRecall(evaluate.Metric):
    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )
        info.format = "numpy"  # set here, because evaluate's check knows single numbers alone
        return info

    def _compute(self, predictions, reference, k=3, batch_size=2048, device="cpu"):
        sets = {"predictions": np.asarray(predictions), "reference": np.asarray(reference)}
        for name, features in sets.items():
            if len(features) <= k:
                raise ValueError(
                    f"Precision and recall with k = {k} need over {k} images; `{name}` has {len(features)}."
                )
        fake, real = (torch.as_tensor(features).float().to(device) for features in sets.values())
        if fake.shape[1] != real.shape[1]:
            raise ValueError(
                f"`predictions` have {fake.shape[1]} features, `reference` has {real.shape[1]}: they come from "
                "different networks."
            )
        centre = real.mean(0)  # small numbers: distances by products of large ones are not exact
        fake, real = fake - centre, real - centre
        radii = {"fake": radii_of(fake, k, batch_size), "real": radii_of(real, k, batch_size)}
        return {
            "precision": share_covered(fake, real, radii["real"], batch_size),
            "recall": share_covered(real, fake, radii["fake"], batch_size),
        }


def distances(rows: torch.Tensor, features: torch.Tensor, of_all: int) -> torch.Tensor:
    """
    Euclidean distances, (rows, features). By differences where `of_all` rows take seconds only: equal points, of which
    real data have some, are at distance 0 then, and not nearly so, as they are by products.
    """
    is_small = of_all * features.numel() <= 1e10
    mode = "donot_use_mm_for_euclid_dist" if is_small else "use_mm_for_euclid_dist"
    return torch.cdist(rows, features, compute_mode=mode)


def radii_of(features: torch.Tensor, k: int, batch_size: int) -> torch.Tensor:
    """Distance of each point to its k-th neighbour, itself left out, (n,)."""
    radii = []
    for start in range(0, len(features), batch_size):
        rows = features[start : start + batch_size]
        between = distances(rows, features, len(features))
        own = torch.arange(len(rows), device=features.device)
        between[own, start + own] = torch.inf
        radii.append(between.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def share_covered(points: torch.Tensor, features: torch.Tensor, radii: torch.Tensor, batch_size: int) -> float:
    """Share of points within the radius of one of the features, each with its own radius."""
    covered = [(distances(rows, features, len(points)) <= radii).any(dim=1) for rows in points.split(batch_size)]
    return torch.cat(covered).sum().item() / len(points)
