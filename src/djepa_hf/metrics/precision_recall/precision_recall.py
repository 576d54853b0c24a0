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

    def _compute(self, predictions, reference, k=3, batch_size=2048):
        sets = {"predictions": np.asarray(predictions), "reference": np.asarray(reference)}
        for name, features in sets.items():
            if len(features) <= k:
                raise ValueError(
                    f"Precision and recall with k = {k} need over {k} images; `{name}` has {len(features)}."
                )
        fake, real = (torch.as_tensor(features).float() for features in sets.values())
        if fake.shape[1] != real.shape[1]:
            raise ValueError(
                f"`predictions` have {fake.shape[1]} features, `reference` has {real.shape[1]}: they come from "
                "different networks."
            )
        radii = {"fake": radii_of(fake, k, batch_size), "real": radii_of(real, k, batch_size)}
        return {
            "precision": share_covered(fake, real, radii["real"], batch_size),
            "recall": share_covered(real, fake, radii["fake"], batch_size),
        }


def distances(rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    # by differences, not by the product, which is not exact enough to find a point at distance 0 from itself
    return torch.cdist(rows, features, compute_mode="donot_use_mm_for_euclid_dist")


def radii_of(features: torch.Tensor, k: int, batch_size: int) -> torch.Tensor:
    """Distance of each point to its k-th neighbour, itself left out, (n,)."""
    return torch.cat([distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(batch_size)])


def share_covered(points: torch.Tensor, features: torch.Tensor, radii: torch.Tensor, batch_size: int) -> float:
    covered = [(distances(rows, features) <= radii).any(dim=1) for rows in points.split(batch_size)]
    return torch.cat(covered).double().mean().item()
