"""Networks whose features images are compared in. Needs the `eval` extra."""

import importlib
import pickle

import torch
from sklearn.neural_network import MLPClassifier
from torch import nn

from ..latent_cache import weight_hash

INCEPTION, CLASSIFIER = "inception", "classifier"
HIDDEN_UNITS = 100  # of the classifier; scikit-learn's default


class InceptionExtractor(nn.Module):
    """
    The Inception network that FID and Inception Score are usually measured with, in torch-fidelity's port, which
    torchmetrics uses, too: 2048 features and 1008 logits. Its weights are downloaded when it is made.

    Args:
        weights_path (`str`, *optional*): a file of its weights, where there is no network.

    Raises:
        ValueError: if torch-fidelity is missing, or the weights can be had nowhere.
    """

    name = INCEPTION
    classes = None  # its logits are of other classes than a model's

    def __init__(self, weights_path: str | None = None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise ValueError("The Inception network needs torch-fidelity: pip install 'djepa_hf[eval]'.") from error
        try:
            if weights_path is not None:
                torch.load(weights_path, weights_only=True)  # torch-fidelity would run whatever is in it
            features = ["2048", "logits_unbiased"]
            network = FeatureExtractorInceptionV3("inception-v3-compat", features, weights_path)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{weights_path} holds more than weights, and could run code: it is not read.") from error
        except OSError as error:  # of urllib, without a network; or of the file
            raise ValueError(
                f"The weights of the Inception network cannot be had ({error}). Pass their file with "
                "`inception_weights_path`, or another `extractor`."
            ) from error
        self.network = network
        self.eval()  # older versions leave it in training mode

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `(n, 1 or 3, height, width)` in [0, 1] to features `(n, 2048)` and logits `(n, 1008)`."""
        images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return self.network(images)


class ClassifierExtractor(nn.Module):
    """
    scikit-learn's multi-layer perceptron, trained on real images, as a torch module: hidden features and logits.

    Args:
        images (`torch.Tensor` of shape `(n, channels, height, width)`): real ones in [0, 1].
        labels (`torch.Tensor` of shape `(n,)`): their classes.
        seed (`int`, *optional*, defaults to 0): of the classifier's training.
    """

    name = CLASSIFIER

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, seed: int = 0):
        super().__init__()
        classifier = MLPClassifier(hidden_layer_sizes=(HIDDEN_UNITS,), max_iter=1000, random_state=seed)
        classifier.fit(images.flatten(1).numpy(), labels.numpy())
        self.classes = torch.as_tensor(classifier.classes_)
        weights, biases = classifier.coefs_, classifier.intercepts_
        self.hidden = nn.Linear(weights[0].shape[0], weights[0].shape[1])
        self.output = nn.Linear(weights[1].shape[0], weights[1].shape[1])
        with torch.no_grad():
            for layer, weight, bias in zip((self.hidden, self.output), weights, biases, strict=True):
                layer.weight.copy_(torch.as_tensor(weight.T))
                layer.bias.copy_(torch.as_tensor(bias))
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `(n, channels, height, width)` in [0, 1] to features `(n, 100)` and logits `(n, classes)`."""
        features = self.hidden(images.flatten(1)).relu()
        return features, self.output(features)


class CustomExtractor(nn.Module):
    """
    Any network, named `module:attribute`, where the attribute is called without arguments and returns an `nn.Module`.

    It takes images `(n, channels, height, width)` in [0, 1] and returns features `(n, width)`, or features and logits.

    Args:
        name (`str`): such as `my_package.networks:dino_small`.

    Raises:
        ValueError: if there is no such thing.
    """

    classes = None

    def __init__(self, name: str):
        super().__init__()
        module, _, attribute = name.partition(":")
        try:
            self.network = getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"`extractor` {name!r} cannot be loaded: {error}.") from error
        if not isinstance(self.network, nn.Module):
            raise ValueError(f"`extractor` {name!r} must make an nn.Module, got a {type(self.network).__name__}.")
        self.name = name
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images `(n, channels, height, width)` in [0, 1] to features `(n, width)` and logits, if there are any."""
        output = self.network(images)
        features, logits = output if isinstance(output, tuple) else (output, None)
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"`extractor` {self.name!r} must return features of shape ({len(images)}, width), got "
                f"{tuple(features.shape)}."
            )
        return features, logits


def fingerprint(extractor: nn.Module) -> str:
    """The name of an extractor and of its weights."""
    return f"{extractor.name} ({weight_hash(extractor)})"
