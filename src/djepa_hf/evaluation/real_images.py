"""Real images to compare with: data sets, folders, and the `.npz` files of ADM. Needs the `eval` and `train` extras."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..data import ImageToSample, load_training_data, open_image
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
    """

    source: str
    split: str = "test"
    image_column: str = "image"
    label_column: str = "label"

    def batches(
        self, size: int | tuple[int, int], channels: int, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, list[int] | None]]:
        """
        Images `(n, channels, height, width)`, uint8, and their classes where there are any.

        Args:
            size (`int` or `tuple[int, int]`): that images are resized and cropped to, as for training.
            channels (`int`): 1 for greyscale, 3 for colour.
            batch_size (`int`): images at a time.

        Raises:
            ValueError: if there are no images, or those of a file have another size.
        """
        if self.source.endswith(".npz"):
            yield from _samples_of_npz(self.source, size, channels, batch_size)
            return
        to_sample, folder = ImageToSample(size, channels), Path(self.source)
        if folder.is_dir() and (paths := sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)):
            rows = [({"path": str(path), "bytes": None}, None) for path in paths]
        else:
            is_folder = folder.is_dir() and not any(folder.glob("*.parquet"))
            columns = (self.image_column, self.label_column)
            data = load_training_data(
                None if is_folder else self.source, self.source if is_folder else None, *columns, split=self.split
            )
            rows = _Rows(data)
        for start in range(0, len(rows), batch_size):
            part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            samples = torch.stack([to_sample(open_image(image)) for image, _ in part])
            labels = [label for _, label in part]
            yield ((samples + 1) * 127.5).round().to(torch.uint8), None if labels[0] is None else labels


class _Rows:
    """Undecoded images and classes of a data set, one by one."""

    def __init__(self, data):
        import datasets

        self.data = data.cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[dict, int]:
        row = self.data[index]
        return row["image"], row["label"]


@dataclass
class Reference:
    """
    What is known of real images in an extractor's features.

    Args:
        about (`dict`): where they come from, how many there are, and a hash.
        features (`torch.Tensor` of shape `(n, width)`, *optional*): where there are images.
        logits (`torch.Tensor` of shape `(n, classes)`, *optional*): where the extractor gives them.
        labels (`torch.Tensor` of shape `(n,)`, *optional*): where the images have classes.
        statistics (`dict`, *optional*): `mu` and `sigma` of more images than are at hand, for the Fréchet distance.
    """

    about: dict
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    statistics: dict[str, np.ndarray] = field(default_factory=dict)


@torch.no_grad()
def extract(
    batches: Iterator[tuple[torch.Tensor, list[int] | None]], extractor: nn.Module, device: torch.device, title: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Features, logits and classes of images, with a progress bar."""
    features, logits, labels = [], [], []
    for images, classes in tqdm(batches, desc=title, unit=" batches", leave=False):
        output = extractor(images.to(device).float() / 255)
        features.append(output[0].float().cpu())
        logits += [] if output[1] is None else [output[1].float().cpu()]
        labels += classes or []
    return torch.cat(features), torch.cat(logits) if logits else None, torch.tensor(labels) if labels else None


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
    about, statistics = {"source": real.source, "split": real.split}, {}
    if real.source.endswith(".npz"):
        about = {"source": real.source, "sha256": hashlib.sha256(Path(real.source).read_bytes()).hexdigest()[:16]}
        with _npz(real.source) as file:
            has_samples = "arr_0" in file
            if "mu" in file and (extractor.name == INCEPTION or not has_samples):
                statistics = {name: file[name] for name in ("mu", "sigma")}
                _check_statistics(statistics, real.source)
        if not has_samples:
            return Reference({**about, "images": None}, statistics=statistics)
    batches = real.batches(size, channels, batch_size)
    features, logits, labels = extract(batches, extractor, device, f"real images, {real.source}")
    digest = hashlib.sha256(features.numpy().tobytes()).hexdigest()[:16]
    about |= {"images": len(features), "sha256_of_features": digest}
    return Reference(about, features, logits, labels, statistics)


def _npz(path: str):
    try:
        file = np.load(path)
    except (OSError, ValueError) as error:
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
    with _npz(path) as file:
        images = file["arr_0"]
    height, width = (size, size) if isinstance(size, int) else size
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: `arr_0` must hold levels from 0 to 255 (uint8), got {images.dtype}.")
    if images.ndim != 4 or images.shape[1:3] != (height, width) or images.shape[3] not in (1, 3):
        raise ValueError(
            f"{path}: `arr_0` must have shape (n, {height}, {width}, 1 or 3), like the generated images, got "
            f"{images.shape}."
        )
    for start in range(0, len(images), batch_size):
        part = torch.from_numpy(images[start : start + batch_size]).movedim(-1, 1)
        if part.shape[1] > channels:
            raise ValueError(f"{path} holds colour images, the generated ones are grey.")
        yield part.expand(-1, channels, -1, -1), None


def save_npz(folder: Path, count: int, path: Path):
    """
    Writes pictures `000000.png`, `000001.png`, ... of a folder as ADM's sample file does, one at a time.

    Args:
        folder (`Path`): of the pictures.
        count (`int`): how many.
        path (`Path`): the `.npz` file, whose `arr_0` is uint8, `(count, height, width, 3)`.
    """
    import zipfile

    with Image.open(folder / "000000.png") as first:
        shape = (count, first.height, first.width, 3)
    unfinished = path.with_suffix(".unfinished")
    with (
        zipfile.ZipFile(unfinished, "w", allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for i in range(count):
            with Image.open(folder / f"{i:06d}.png") as picture:
                out.write(np.asarray(picture.convert("RGB")).tobytes())
    unfinished.replace(path)
