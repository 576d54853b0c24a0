"""Fréchet distance of two sets of features, as in FID (arXiv 1706.08500), by torchmetrics."""

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

_DESCRIPTION = """
Distance of the Gaussians with the mean and covariance of two sets of features:
|mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)). With features of the Inception network it is FID.
It is biased: with fewer samples it is larger. Compare numbers of equally many samples only.
"""
_INPUTS = """
Args:
    predictions: features of generated images, (n, d), at least two.
    reference: features of real images, (m, d), at least two; or a dictionary of their statistics, `mu` (d,) and `sigma`
        (d, d), the covariance with m - 1 in the denominator.
Returns:
    frechet_distance (float)
"""


class FrechetDistance(evaluate.Metric):
    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )
        info.format = "numpy"  # set here, because evaluate's check knows single numbers alone
        return info

    def _compute(self, predictions, reference):
        predictions = torch.from_numpy(np.asarray(predictions)).double()
        width = predictions.shape[1]
        metric = FrechetInceptionDistance(_Features(width), sync_on_compute=False)
        if isinstance(reference, dict):
            mu, sigma = (torch.as_tensor(np.asarray(reference[name])).double() for name in ("mu", "sigma"))
            _check_width(width, len(mu))
            # the sums that two samples with these statistics would have left
            metric.real_features_num_samples += 2
            metric.real_features_sum += 2 * mu
            metric.real_features_cov_sum += sigma + 2 * torch.outer(mu, mu)
        else:
            reference = torch.as_tensor(np.asarray(reference)).double()
            _check_width(width, reference.shape[1])
            _check_count("reference", len(reference))
            metric.update(reference, real=True)
        _check_count("predictions", len(predictions))
        metric.update(predictions, real=False)
        return {"frechet_distance": max(0.0, metric.compute().item())}  # rounding may leave it just below


class _Features(torch.nn.Identity):
    """Stands where torchmetrics expects a network: what comes in are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def _check_count(name: str, count: int):
    if count < 2:
        raise ValueError(f"The Fréchet distance needs at least 2 images; `{name}` has {count}.")


def _check_width(predictions: int, reference: int):
    if predictions != reference:
        raise ValueError(
            f"`predictions` have {predictions} features, `reference` has {reference}: they come from different "
            "networks."
        )
