"""How good generated digits are, judged by a classifier that never saw one. Needs the `eval` extra."""

import torch
from sklearn.neural_network import MLPClassifier
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

JUDGE_HIDDEN_UNITS = 100  # scikit-learn's default


class DigitJudge(nn.Module):
    """
    scikit-learn's multi-layer perceptron, trained on real digits, as a torch module that gives hidden features.

    Args:
        images (`torch.Tensor` of shape `(n, 1, 8, 8)`): real digits in [0, 1].
        labels (`torch.Tensor` of shape `(n,)`): their classes.
        seed (`int`, *optional*, defaults to 0): of the classifier's training.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, seed: int = 0):
        super().__init__()
        classifier = MLPClassifier(hidden_layer_sizes=(JUDGE_HIDDEN_UNITS,), max_iter=1000, random_state=seed)
        classifier.fit(images.flatten(1).numpy(), labels.numpy())
        self.classes = torch.as_tensor(classifier.classes_)
        self.num_features = JUDGE_HIDDEN_UNITS  # where torchmetrics looks for the width
        weights, biases = classifier.coefs_, classifier.intercepts_
        self.hidden = nn.Linear(weights[0].shape[0], weights[0].shape[1])
        self.output = nn.Linear(weights[1].shape[0], weights[1].shape[1])
        with torch.no_grad():
            for layer, weight, bias in zip((self.hidden, self.output), weights, biases, strict=True):
                layer.weight.copy_(torch.as_tensor(weight.T))
                layer.bias.copy_(torch.as_tensor(bias))
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, 1, 8, 8)` in [0, 1] to hidden features `(n, num_features)`."""
        return self.hidden(images.flatten(1)).relu()

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, 1, 8, 8)` in [0, 1] to classes `(n,)`."""
        return self.classes[self.output(self(images)).argmax(-1)]


def class_agreement(judge: DigitJudge, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that the judge reads as their label."""
    return (judge.predict(images) == labels).float().mean().item()


def frechet_distance(features: nn.Module, images: torch.Tensor, reference: torch.Tensor) -> float:
    """
    Fréchet distance between two sets of images in a feature space, as in FID (arXiv 1706.08500).

    Args:
        features (`nn.Module`): images to `(n, num_features)`; has the attribute `num_features`.
        images, reference (`torch.Tensor` of shape `(n, ...)`): at least two each.
    """
    metric = FrechetInceptionDistance(feature=features, normalize=True)
    metric.update(reference, real=True)
    metric.update(images, real=False)
    return metric.compute().item()
