"""Kernel distance of two sets of features, as in KID (arXiv 1801.01401), by torchmetrics."""

import warnings

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.image.kid import KernelInceptionDistance

_DESCRIPTION = """
Squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, mean and standard deviation over random subsets. With
features of the Inception network it is KID. It is not biased by the number of samples.
"""
_INPUTS = """
Args:
    predictions: features of generated images, (n, d).
    reference: features of real images, (m, d).
    subsets: how many subsets are drawn, 100 if not given.
    subset_size: images in each, 1000 if not given; n and m must be as many at least.
Returns:
    kernel_distance (float), kernel_distance_std (float)
"""


class KernelDistance(evaluate.Metric):
    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )
        info.format = "numpy"  # set here, because evaluate's check knows single numbers alone
        return info

    def _compute(self, predictions, reference, subsets=100, subset_size=1000):
        sets = {"predictions": np.asarray(predictions), "reference": np.asarray(reference)}
        for name, features in sets.items():
            if len(features) < subset_size:
                raise ValueError(
                    f"The kernel distance draws subsets of {subset_size} images, but `{name}` has {len(features)}: "
                    "pass more, or a smaller `subset_size`."
                )
        predictions, reference = (torch.as_tensor(features).double() for features in sets.values())
        if predictions.shape[1] != reference.shape[1]:
            raise ValueError(
                f"`predictions` have {predictions.shape[1]} features, `reference` has {reference.shape[1]}: they come "
                "from different networks."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps all features in memory
            metric = KernelInceptionDistance(torch.nn.Identity(), subsets, subset_size, sync_on_compute=False)
        metric.update(reference, real=True)
        metric.update(predictions, real=False)
        with torch.random.fork_rng(devices=[]):  # evaluate seeds NumPy alone
            torch.manual_seed(self.seed)
            mean, std = metric.compute()
        return {"kernel_distance": mean.item(), "kernel_distance_std": std.item()}
