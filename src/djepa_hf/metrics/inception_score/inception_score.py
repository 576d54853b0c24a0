"""Inception Score (arXiv 1606.03498) from the logits of any classifier, by torchmetrics."""

import warnings

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.image.inception import InceptionScore as TorchInceptionScore

_DESCRIPTION = """
exp(E[KL(p(class | image) || p(class))]): high where a classifier is sure of every image and sees all classes equally
often. Mean and standard deviation over splits of the images. It knows no real images.
"""
_INPUTS = """
Args:
    predictions: logits of a classifier for generated images, (n, classes).
    splits: parts of the images, 10 if not given; n must be as many at least.
Returns:
    inception_score (float), inception_score_std (float)
"""


class InceptionScore(evaluate.Metric):
    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )
        info.format = "numpy"  # set here, because evaluate's check knows single numbers alone
        return info

    def _compute(self, predictions, splits=10):
        logits = torch.from_numpy(np.asarray(predictions)).double()
        if len(logits) < 2 * splits:
            raise ValueError(
                f"The Inception Score of {splits} splits needs at least {2 * splits} images; `predictions` has "
                f"{len(logits)}."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it keeps all logits in memory
            metric = TorchInceptionScore(torch.nn.Identity(), splits, sync_on_compute=False)
        # torchmetrics takes the logarithm of mean probabilities, which must not be zero
        metric.update(logits.log_softmax(-1).clamp(min=-600))
        with torch.random.fork_rng(devices=[]):  # evaluate seeds NumPy alone
            torch.manual_seed(self.seed)
            mean, std = metric.compute()
        return {"inception_score": mean.item(), "inception_score_std": std.item()}
