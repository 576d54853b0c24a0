"""Options that the scripts of evaluation share, and the pipeline, extractor and reference that they ask for."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from ..arguments import option
from ..loading import check_place
from ..pipeline_djepa import DJEPAPipeline
from .extractors import CLASSIFIER, INCEPTION, ClassifierExtractor, CustomExtractor, InceptionExtractor
from .protocol import image_size
from .real_images import RealImages, Reference, load_reference


@dataclass
class EvaluationArguments:
    """What to evaluate, and against what."""

    pipeline: str = option(None, "A pipeline folder, or its id on the Hub.")
    output_dir: str | None = option(None, "Where samples and results go; by default into the pipeline's folder.")
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
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.extractor not in (INCEPTION, CLASSIFIER) and ":" not in self.extractor:
            raise ValueError(
                f"`extractor` must be '{INCEPTION}', '{CLASSIFIER}' or 'module:function', got {self.extractor!r}."
            )
        if (self.extractor == CLASSIFIER) != (self.classifier_data is not None):
            raise ValueError("`classifier_data` goes with `extractor` 'classifier': pass both or neither.")

    def folder(self, name: str) -> Path:
        """Where results go: `output_dir`, or a folder of that name in the pipeline's, or in `outputs` for a Hub id."""
        if self.output_dir:
            return Path(self.output_dir)
        place = Path(self.pipeline)
        return (place if place.is_dir() else Path("outputs") / place.name) / name

    def load_pipeline(self, device: torch.device) -> DJEPAPipeline:
        """The pipeline, without its progress bar."""
        check_place(self.pipeline)
        pipe = DJEPAPipeline.from_pretrained(self.pipeline, dtype=getattr(torch, self.dtype)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def reference_images(self) -> RealImages:
        """The real images to compare with."""
        return RealImages(self.reference, self.reference_split, self.image_column, self.label_column)

    def classifier_images(self) -> RealImages:
        """Those that the classifier learns from."""
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return RealImages(self.classifier_data, self.classifier_split, **columns, needs_classes=True)

    def load_extractor(self, pipe: DJEPAPipeline) -> nn.Module:
        """
        The network whose features count, on the pipeline's device.

        Raises:
            ValueError: if it cannot be had, or a classifier's data have classes that the model does not know.
        """
        if self.extractor == INCEPTION:
            return InceptionExtractor(self.inception_weights_path).to(pipe.device)
        if self.extractor != CLASSIFIER:
            return CustomExtractor(self.extractor).to(pipe.device)
        real = self.classifier_images()
        ids = model_ids(pipe, real)
        images, labels = real.load(*image_size(pipe))
        return ClassifierExtractor(images.float() / 255, ids[labels]).to(pipe.device)

    def load_reference(self, pipe: DJEPAPipeline, extractor: nn.Module, state: PartialState) -> Reference:
        """
        The real images to compare with, in an extractor's features; without the features on all but the main process.
        """
        reference, light = None, None
        if state.is_main_process:
            real = self.reference_images()
            reference = load_reference(real, extractor, *image_size(pipe), self.batch_size, pipe.device)
            light = Reference(reference.about, reference.width)
            if reference.labels is not None:
                try:
                    reference.labels = model_ids(pipe, real)[reference.labels]
                except ValueError:
                    reference.labels = None  # of other classes than the model's, which is no harm here
        (light,) = broadcast_object_list([light])
        return reference or light


def model_ids(pipe: DJEPAPipeline, real: RealImages) -> torch.Tensor:
    """
    The model's id of each class of real images, by name, `(classes,)`.

    Raises:
        ValueError: if the model knows no class of that name; the closest are given.
    """
    return torch.tensor(pipe.get_label_ids(real.open().names))
