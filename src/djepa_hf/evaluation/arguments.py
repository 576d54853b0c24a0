"""Options that the scripts of evaluation share, and the extractor and reference that they ask for."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..arguments import option
from ..pipeline_djepa import DJEPAPipeline
from .extractors import CLASSIFIER, INCEPTION, ClassifierExtractor, CustomExtractor, InceptionExtractor
from .protocol import image_size
from .real_images import RealImages, Reference, load_reference


@dataclass
class EvaluationArguments:
    """What to evaluate, and against what."""

    pipeline: str = option(None, "A pipeline folder, or its id on the Hub.")
    output_dir: str | None = option(None, "Where samples and results go; `evaluation` in the pipeline's folder.")
    reference: str | None = option(
        None, "Real images: 'digits', a data set, a folder, or an .npz file of samples or of `mu` and `sigma`."
    )
    reference_split: str = option("test", "Of a data set.")
    image_column: str = option("image", "Column of the images.")
    label_column: str = option("label", "Column of the classes.")
    extractor: str = option(
        INCEPTION, "Whose features: 'inception', 'classifier' (trained on `classifier_data`), or any 'module:function'."
    )
    inception_weights_path: str | None = option(None, "A file of Inception's weights, where there is no network.")
    classifier_data: str | None = option(None, "Real images of the classes to train a classifier on, as `reference`.")
    classifier_split: str = option("train", "Of that data set.")
    num_images: int = option(50_000, "Images to generate.")
    batch_size: int = option(64, "Images at a time.")
    seed: int = option(0, "Seed of everything random.")
    dtype: str = option("float32", "Of the weights: float32, bfloat16 or float16.")

    def __post_init__(self):
        if self.pipeline is None or self.reference is None:
            raise ValueError(f"`{'pipeline' if self.pipeline is None else 'reference'}` is missing.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}.")
        if (self.extractor == CLASSIFIER) != (self.classifier_data is not None):
            raise ValueError("`classifier_data` goes with `extractor` 'classifier': pass both or neither.")

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.output_dir) if self.output_dir else Path(self.pipeline) / "evaluation"

    def load_pipeline(self, device: torch.device) -> DJEPAPipeline:
        """The pipeline, without its progress bar."""
        pipe = DJEPAPipeline.from_pretrained(self.pipeline, dtype=getattr(torch, self.dtype)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load_extractor(self, pipe: DJEPAPipeline) -> nn.Module:
        """The network whose features count, on the pipeline's device."""
        if self.extractor == INCEPTION:
            return InceptionExtractor(self.inception_weights_path).to(pipe.device)
        if self.extractor != CLASSIFIER:
            return CustomExtractor(self.extractor).to(pipe.device)
        images, labels = self.classifier_images(pipe)
        return ClassifierExtractor(images.float() / 255, labels).to(pipe.device)

    def classifier_images(self, pipe: DJEPAPipeline) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Images that the classifier is trained on, uint8, and their classes.

        Raises:
            ValueError: if they have none.
        """
        real = RealImages(self.classifier_data, self.classifier_split, self.image_column, self.label_column)
        batches = list(real.batches(*image_size(pipe), self.batch_size))
        if batches[0][1] is None:
            raise ValueError(f"`classifier_data` {self.classifier_data} has no classes.")
        return torch.cat([images for images, _ in batches]), torch.tensor([i for _, part in batches for i in part])

    def load_reference(self, pipe: DJEPAPipeline, extractor: nn.Module) -> Reference:
        """The real images to compare with, in an extractor's features."""
        real = RealImages(self.reference, self.reference_split, self.image_column, self.label_column)
        return load_reference(real, extractor, *image_size(pipe), self.batch_size, pipe.device)
