"""Data sets to train on: the built-in digits, a folder of images, or a data set of the Hub. Needs the `train` extra."""

import contextlib
import difflib
import io
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .latents import height_and_width

GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
DIGITS = "digits"
HELD_OUT_DIGITS = 0.25  # of scikit-learn's 1,797; no model of ours trains on them


def load_digits(split: str) -> datasets.Dataset:
    """
    scikit-learn's handwritten digits: 8x8 greyscale, ten classes, 1,797 images.

    Args:
        split (`str`): `"train"`, or `"test"` for the quarter that is held out. The split is stratified and fixed.

    Returns:
        [`~datasets.Dataset`] with the columns `image` (levels 0 to 16 spread over 0 to 255) and `label` (`ClassLabel`).

    Raises:
        ValueError: if there is no such split.
    """
    from sklearn.datasets import load_digits as load_arrays
    from sklearn.model_selection import train_test_split

    arrays = load_arrays()
    parts = train_test_split(
        arrays.images, arrays.target, test_size=HELD_OUT_DIGITS, stratify=arrays.target, random_state=0
    )
    splits = {"train": parts[0::2], "test": parts[1::2]}
    if split not in splits:
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    images, labels = splits[split]
    pictures = [Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)) for image in images]
    names = [str(name) for name in arrays.target_names]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=_features(names))


def load_image_folder(folder: str | Path) -> datasets.Dataset:
    """
    A folder with one sub-folder of images per class, named like the class.

    Args:
        folder (`str` or `Path`): hidden files in it are ignored.

    Returns:
        [`~datasets.Dataset`] with the columns `image` (decoded on access) and `label` (`ClassLabel`, names sorted).

    Raises:
        ValueError: if there are no class folders, a class folder has no images, or anything else lies in between. The
            offending path is named.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    classes = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} is empty: it must hold one sub-folder of images per class.")
    paths, labels = [], []
    for label, class_folder in enumerate(classes):
        if not class_folder.is_dir():
            raise ValueError(f"{class_folder} lies beside the class folders: move it into one, or away.")
        files = sorted(path for path in class_folder.iterdir() if not path.name.startswith("."))
        if not files:
            raise ValueError(f"{class_folder} is empty: every class needs images.")
        for path in files:
            try:
                with Image.open(path):  # reads the header alone
                    pass
            except (UnidentifiedImageError, IsADirectoryError) as error:
                raise ValueError(f"{path} is not an image: class folders must hold nothing else.") from error
            paths.append(str(path))
            labels.append(label)
    features = _features([path.name for path in classes])
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def load_training_data(
    dataset_name: str | None = None,
    train_data_dir: str | Path | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    dataset_config_name: str | None = None,
    data_files: str | list[str] | None = None,
    streaming: bool = False,
    num_classes: int | None = None,
    split: str = "train",
) -> datasets.Dataset | datasets.IterableDataset:
    """
    The data set to train on, with the columns `image` and `label` (a `ClassLabel`), whatever they were called.

    Args:
        dataset_name (`str`, *optional*): `"digits"`; a data set of the Hub (or a local folder that `datasets` can
            load); or a format that `datasets` reads, such as `"parquet"` or `"webdataset"`, with `data_files`.
        train_data_dir (`str`, *optional*): a folder of images instead, see [`load_image_folder`].
        image_column, label_column (`str`): where the images and classes of a Hub data set are; without the second there
            are no classes.
        dataset_config_name (`str`, *optional*): a configuration of the data set.
        data_files (`str` or list of them, *optional*): the files of a format; patterns such as `shards/*.tar` do.
        streaming (`bool`, defaults to `False`): whether to read the data while training, without downloading all.
        num_classes (`int`, *optional*): for streamed data whose classes are mere numbers.
        split (`str`, defaults to `"train"`): of a data set.

    Raises:
        ValueError: if not exactly one source is given, a column does not exist, or holds no images or classes.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"Pass either `dataset_name` or `train_data_dir`, got {'neither' if dataset_name is None else 'both'}."
        )
    if train_data_dir is not None or dataset_name == DIGITS:
        if streaming:
            raise ValueError(f"`streaming` is for data sets of the Hub and files, not for {dataset_name or 'folders'}.")
        return load_digits(split) if train_data_dir is None else load_image_folder(train_data_dir)
    if "/" not in dataset_name and difflib.get_close_matches(dataset_name, [DIGITS], cutoff=0.75):
        raise ValueError(f"There is no data set {dataset_name!r}; did you mean {DIGITS!r}?")
    data = datasets.load_dataset(
        dataset_name, dataset_config_name, data_files=data_files, split=split, streaming=streaming
    )
    if data.features is None:
        data = data._resolve_features()
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in data.column_names:
            closest = difflib.get_close_matches(column, data.column_names, n=1, cutoff=0.0)
            raise ValueError(
                f"{dataset_name} has no column {column!r} (`{option}`); it has {', '.join(data.column_names)}. "
                f"Did you mean {closest[0]!r}?"
            )
    if not isinstance(data.features[image_column], datasets.Image):
        raise ValueError(f"Column {image_column!r} of {dataset_name} holds {data.features[image_column]}, not images.")
    if label_column is None:
        return data.select_columns([image_column]).rename_columns({image_column: "image"})
    data = data.select_columns([image_column, label_column])
    names = {image_column: "image", label_column: "label"}
    if renamed := {old: new for old, new in names.items() if old != new}:
        data = data.rename_columns(renamed)
    if not streaming:
        return _with_class_labels(data, dataset_name, label_column)
    feature = data.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return data
    is_number = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    if num_classes is None or not is_number:
        raise ValueError(
            f"Column {label_column!r} of {dataset_name} holds {feature}: streamed classes must be `ClassLabel`s, or "
            "numbers with `num_classes` given."
        )
    return data.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(num_classes)]))


@dataclass(frozen=True)
class ImageToSample:
    """
    Pictures to float tensors in [-1, 1], `(channels, height, width)`.

    Resizes and crops as ADM does (arXiv 2105.05233, `center_crop_arr`): halve with a box filter while the picture is at
    least twice as large as the target, then bicubic until it just covers the target, then crop the centre.

    Args:
        resolution (`int` or `tuple[int, int]`): side of the square, or height and width.
        channels (`int`): 1 for greyscale, 3 for colour.
    """

    resolution: int | tuple[int, int]
    channels: int

    def __call__(self, image: Image.Image, flip: bool = False) -> torch.Tensor:
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to white
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = center_crop(image.convert({1: "L", 3: "RGB"}[self.channels]), self.resolution)
        if flip:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))
        return pixels.reshape(image.height, image.width, self.channels).permute(2, 0, 1) / 127.5 - 1


def center_crop(image: Image.Image, resolution: int | tuple[int, int]) -> Image.Image:
    """The centre of a picture in the size of [`ImageToSample`], resized as ADM does."""
    height, width = height_and_width(resolution)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def num_image_channels(data: datasets.Dataset | datasets.IterableDataset, most: int = 100) -> int:
    """1 if all pictures of a data set are grey, 3 otherwise; looks at `most` of them, of a stream the first."""
    data = data.cast_column("image", datasets.Image(decode=False))
    if isinstance(data, datasets.IterableDataset):
        rows = data.take(most)
    else:
        rows = (data[i] for i in range(0, len(data), -(-len(data) // most)))
    modes = set()
    for row in rows:
        with contextlib.suppress(Exception):  # one that cannot be read says nothing here, and is reported in training
            modes.add(open_image(row["image"]).mode)
    return 1 if modes and modes <= set(GREY_MODES) else 3


def open_image(image: dict) -> Image.Image:
    """The picture of an undecoded `datasets.Image`: bytes, or a path."""
    picture = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
    picture.load()
    return picture


def _features(names: list[str]) -> datasets.Features:
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})


def _with_class_labels(data: datasets.Dataset, name: str, column: str) -> datasets.Dataset:
    feature = data.features["label"]
    dtype = feature.dtype if isinstance(feature, datasets.Value | datasets.ClassLabel) else ""
    if not dtype.endswith("string") and not dtype.startswith(("int", "uint")):
        raise ValueError(f"Column {column!r} of {name} holds {feature}, not classes.")
    classes = data.unique("label")
    if None in classes:
        raise ValueError(f"Column {column!r} of {name} has rows without a class: remove them.")
    if dtype.endswith("string"):
        return data.class_encode_column("label")
    if isinstance(feature, datasets.ClassLabel):
        if min(classes) < 0:
            raise ValueError(f"Column {column!r} of {name} has rows of class {min(classes)}, unlabelled: remove them.")
        return data
    if min(classes) < 0:
        raise ValueError(f"Column {column!r} of {name} holds negative class ids ({min(classes)}).")
    return data.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(max(classes) + 1)]))
