"""Real images to compare with: data sets, folders, and the `.npz` files of ADM. Needs the `eval` extra."""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..data import DIGITS, ImageToSample, load_training_data, open_image
from ..latents import height_and_width
from .extractors import INCEPTION

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class RealImages:
    """
    Where real images come from.

    Args:
        source (`str`): `"digits"`, a data set of the Hub, a folder of images or of class folders, or an ADM-style
            `.npz` file of samples (`arr_0`, uint8, `(n, height, width, 3)`), statistics (`mu` and `sigma`), or both.
        split (`str`): of a data set.
        image_column, label_column (`str`): of a data set.
        needs_classes (`bool`, defaults to `False`): whether classes must be known, or may be.
    """

    source: str
    split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    needs_classes: bool = False

    @property
    def has_splits(self) -> bool:
        """Whether the split says anything."""
        return not self.source.endswith(".npz") and (self.source == DIGITS or not _is_image_folder(Path(self.source)))

    def check(self):
        """Raises a `ValueError`, before any work, if there is nothing to read."""
        _npz(self.source).close() if self.source.endswith(".npz") else self.open()

    def open(self) -> "OpenImages":
        """
        The images, undecoded.

        Raises:
            ValueError: if there are none, or they have no classes but need to.
        """
        folder = Path(self.source)
        if folder.is_dir() and (paths := sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)):
            if self.needs_classes:
                raise ValueError(f"{self.source} has no classes: put the images into one folder per class.")
            return OpenImages([{"path": str(path), "bytes": None} for path in paths])
        is_folder = _is_image_folder(folder)
        where = (None, self.source) if is_folder else (self.source, None)
        try:
            data = load_training_data(*where, self.image_column, self.label_column, split=self.split)
        except ValueError:
            if is_folder or self.needs_classes:
                raise
            data = load_training_data(*where, self.image_column, None, split=self.split)
        images = data.cast_column("image", datasets.Image(decode=False))
        if "label" not in data.column_names:
            return OpenImages(images["image"])
        return OpenImages(images["image"], data["label"], data.features["label"].names)

    def batches(
        self, size: int | tuple[int, int], channels: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """
        Images `(n, channels, height, width)`, uint8, and their classes where they are known.

        Args:
            size (`int` or `tuple[int, int]`): that images are resized and cropped to, as for training.
            channels (`int`): 1 for greyscale, 3 for colour.
            batch_size (`int`): images at a time.

        Raises:
            ValueError: as [`RealImages.open`]; or if the images of an `.npz` file have another size.
        """
        if self.source.endswith(".npz"):
            yield from _samples_of_npz(self.source, size, channels, batch_size)
            return
        images, to_sample = self.open(), ImageToSample(size, channels)
        for start in range(0, len(images.pictures), batch_size):
            rows = range(start, min(start + batch_size, len(images.pictures)))
            samples = torch.stack([to_sample(open_image(images.pictures[i])) for i in rows])
            labels = None if images.labels is None else torch.tensor([images.labels[i] for i in rows])
            yield ((samples + 1) * 127.5).round().to(torch.uint8), labels

    def load(
        self, size: int | tuple[int, int], channels: int, batch_size: int = 256
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        All images at once and their classes, for a source that `needs_classes`; as [`RealImages.batches`] gives them.
        """
        images, labels = zip(*self.batches(size, channels, batch_size), strict=True)
        return torch.cat(images), torch.cat(labels)


@dataclass
class OpenImages:
    """
    Undecoded images of a source.

    Args:
        pictures (sequence of `dict`): bytes or paths.
        labels (sequence of `int`, *optional*): classes.
        names (`list[str]`, *optional*): of the classes.
    """

    pictures: list[dict]
    labels: list[int] | None = None
    names: list[str] | None = None


@dataclass
class Reference:
    """
    What is known of real images in an extractor's features.

    Args:
        about (`dict`): where they come from, how many there are, and a hash.
        width (`int`): how many features there are.
        features (`torch.Tensor` of shape `(n, width)`, *optional*): where there are images, on the main process.
        logits (`torch.Tensor` of shape `(n, classes)`, *optional*): where the extractor gives them.
        labels (`torch.Tensor` of shape `(n,)`, *optional*): where the classes are known.
        statistics (`dict`, *optional*): `mu` and `sigma` of more images than are at hand, for the Fréchet distance.
    """

    about: dict
    width: int
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def distribution(self) -> dict[str, np.ndarray] | np.ndarray:
        """What the Fréchet distance is measured to: the statistics where there are such, the features otherwise."""
        return self.statistics or self.features.numpy()


@dataclass
class Extracted:
    """
    Features, logits and classes of images.

    Args:
        features (`torch.Tensor` of shape `(n, width)`), logits (`(n, classes)` or none), labels (`(n,)` or none).
        sha256 (`str`): a hash of the images.
    """

    features: torch.Tensor
    logits: torch.Tensor | None
    labels: torch.Tensor | None
    sha256: str


@torch.no_grad()
def extract(
    batches: Iterator[tuple[torch.Tensor, torch.Tensor | None]],
    extractor: nn.Module,
    device: torch.device | str,
    title: str,
) -> Extracted:
    """
    Features of images, with a progress bar.

    Raises:
        ValueError: if there are no images, features are not finite, or all are the same.
    """
    features, logits, labels, digest = [], [], [], hashlib.sha256()
    for images, classes in tqdm(batches, desc=title, unit=" batches", leave=False):
        digest.update(images.contiguous().numpy().tobytes())
        output = extractor(images.to(device).float() / 255)
        features.append(output[0].float().cpu())
        logits += [] if output[1] is None else [output[1].float().cpu()]
        labels += [] if classes is None else [classes]
    if not features:
        raise ValueError(f"There are no images: {title}.")
    together = torch.cat(features)
    if not together.isfinite().all():
        raise ValueError(f"Features are not finite: {title}.")
    if len(together) > 1 and bool((together == together[0]).all()):
        raise ValueError(f"All images have the same features: {title}.")
    return Extracted(
        together,
        torch.cat(logits) if logits else None,
        torch.cat(labels) if labels else None,
        digest.hexdigest()[:16],
    )


def load_reference(
    real: RealImages,
    extractor: nn.Module,
    size: int | tuple[int, int],
    channels: int,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Reference:
    """
    Features, or statistics of features, of real images.

    Args:
        real ([`RealImages`]): the images.
        extractor (`nn.Module`): see `extractors`.
        size, channels, batch_size: as in [`RealImages.batches`].
        device (`torch.device`): of the extractor.

    Raises:
        ValueError: if the images do not fit, or statistics are of another network's features.
    """
    about, statistics = {"source": real.source, "split": real.split if real.has_splits else None}, {}
    if real.source.endswith(".npz"):
        with _npz(real.source) as file:
            has_samples = "arr_0" in file
            if "mu" in file and (extractor.name == INCEPTION or not has_samples):
                statistics = {name: file[name] for name in ("mu", "sigma")}
                _check_statistics(statistics, real.source)
        with open(real.source, "rb") as file:
            about["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if not has_samples:
            return Reference({**about, "images": None}, len(statistics["mu"]), statistics=statistics)
    title = f"real images, {real.source}"
    found = extract(real.batches(size, channels, batch_size), extractor, device, title)
    about = {"sha256": found.sha256, **about, "images": len(found.features)}
    width = len(statistics["mu"]) if statistics else found.features.shape[1]
    return Reference(about, width, found.features, found.logits, found.labels, statistics)


def save_npz(folder: Path, count: int, path: Path):
    """
    Writes pictures `000000.png`, `000001.png`, ... of a folder as ADM's sample file does, one at a time.

    Args:
        folder (`Path`): of the pictures.
        count (`int`): how many.
        path (`Path`): the `.npz` file, whose `arr_0` is uint8, `(count, height, width, 3)`.
    """
    with Image.open(folder / "000000.png") as first:
        shape = (count, first.height, first.width, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    unfinished = path.with_suffix(".unfinished")
    with zipfile.ZipFile(unfinished, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for i in range(count):
            with Image.open(folder / f"{i:06d}.png") as picture:
                out.write(np.asarray(picture.convert("RGB")).tobytes())
    unfinished.replace(path)


def _is_image_folder(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.rglob("*.parquet"))


def _npz(path: str):
    try:
        file = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}.") from error
    if "arr_0" not in file and not {"mu", "sigma"} <= set(file):
        raise ValueError(f"{path} must hold samples (`arr_0`) or statistics (`mu`, `sigma`), got {', '.join(file)}.")
    return file


def _check_statistics(statistics: dict[str, np.ndarray], path: str):
    mu, sigma = statistics["mu"], statistics["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: `mu` must be (d,) and `sigma` (d, d), got {mu.shape} and {sigma.shape}.")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: `mu` and `sigma` must be finite.")


def _samples_of_npz(
    path: str, size: int | tuple[int, int], channels: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, None]]:
    """Batch by batch: a file of ADM's has gigabytes."""
    _npz(path).close()
    height, width = height_and_width(size)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        if dtype != np.uint8 or is_fortran:
            raise ValueError(f"{path}: `arr_0` must hold levels from 0 to 255 (uint8), got {dtype}.")
        if len(shape) != 4 or shape[1:3] != (height, width) or shape[3] not in (1, 3):
            raise ValueError(
                f"{path}: `arr_0` must have shape (n, {height}, {width}, 1 or 3), like the generated images, got "
                f"{shape}."
            )
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            levels = np.frombuffer(file.read(count * height * width * shape[3]), np.uint8)
            images = torch.from_numpy(levels.reshape(count, *shape[1:]).copy()).movedim(-1, 1)
            if images.shape[1] > channels:
                if not torch.equal(images, images[:, :1].expand_as(images)):
                    raise ValueError(f"{path} holds colour images, the generated ones are grey.")
                images = images[:, :channels]
            yield images.expand(-1, channels, -1, -1), None
