"""Data sets: the digits, folders, columns, and the way from a picture to a tensor."""

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_vae
from PIL import Image

from djepa_hf.data import (
    ImageToSample,
    center_crop,
    load_digits,
    load_image_folder,
    load_training_data,
    num_image_channels,
)
from djepa_hf.latents import decode_samples, encode_images


def picture(width: int = 12, height: int = 10, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture(seed=i).save(tmp_path / name / f"{i}.png")
    (tmp_path / ".hidden").touch()
    return tmp_path


def test_digits_are_split_without_overlap():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1347, 450)
    assert train.features["label"].names == [str(i) for i in range(10)]
    assert np.bincount(train["label"]).min() > 125  # stratified
    assert train[0]["image"].size == (8, 8)
    assert train[0]["image"].mode == "L"
    levels = {value for image in test["image"] for value in np.asarray(image).ravel().tolist()}
    assert levels == {round(i * 255 / 16) for i in range(17)}
    whole = sum(np.asarray(image, dtype=np.int64).sum() for split in (train, test) for image in split["image"])
    from sklearn.datasets import load_digits as original

    assert whole == np.round(original().images * 255 / 16).sum()
    with pytest.raises(ValueError, match="`split` must be 'train' or 'test', got 'all'"):
        load_digits("all")


def test_a_folder_becomes_a_data_set(folder):
    data = load_image_folder(folder)
    assert data.features["label"].names == ["cat", "dog"]
    assert data["label"] == [0, 0, 1, 1]
    assert np.array_equal(np.asarray(data[3]["image"]), np.asarray(picture(seed=1)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "notes.txt").touch(), r"notes.txt lies beside the class folders"),
        (lambda root: picture().save(root / "loose.png"), r"loose.png lies beside the class folders"),
        (lambda root: (root / "dog" / "labels.csv").touch(), r"dog/labels.csv is not an image"),
        (lambda root: (root / "dog" / "scan.pdf").write_bytes(b"%PDF"), r"dog/scan.pdf is not an image"),
        (lambda root: (root / "dog" / "broken.jpg").write_bytes(b"no jpeg"), r"dog/broken.jpg is not an image"),
        (lambda root: (root / "dog" / "more").mkdir(), r"dog/more is not an image"),
        (lambda root: (root / "eel").mkdir(), r"eel is empty: every class needs images"),
    ],
)
def test_mixed_folders_are_refused_by_name(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_image_folder(folder)


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty: it must hold one sub-folder of images per class"):
        load_image_folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        load_image_folder(tmp_path / "nowhere")


def save_parquet(path, labels, feature):
    features = datasets.Features({"picture": datasets.Image(), "kind": feature, "other": datasets.Value("int64")})
    columns = {"picture": [picture()] * len(labels), "kind": labels, "other": list(range(len(labels)))}
    path.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path / "train.parquet")
    return str(path)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (["a", None], datasets.Value("string"), "has rows without a class"),
        ([-1, 1], datasets.ClassLabel(names=["a", "b"]), "has rows of class -1, unlabelled"),
    ],
)
def test_rows_without_a_class_are_refused(tmp_path, labels, feature, message):
    name = save_parquet(tmp_path / "data", labels, feature)
    with pytest.raises(ValueError, match=message):
        load_training_data(name, image_column="picture", label_column="kind")


@pytest.mark.parametrize(
    ("labels", "feature", "names", "ids"),
    [
        ([1, 0, 1], datasets.ClassLabel(names=["a", "b"]), ["a", "b"], [1, 0, 1]),
        (["b", "a", "b"], datasets.Value("string"), ["a", "b"], [1, 0, 1]),
        ([11, 0, 2], datasets.Value("int64"), [str(i) for i in range(12)], [11, 0, 2]),
    ],
)
def test_columns_by_any_name_and_classes_of_any_kind(tmp_path, labels, feature, names, ids):
    name = save_parquet(tmp_path / "data", labels, feature)
    data = load_training_data(name, image_column="picture", label_column="kind")
    assert data.column_names == ["image", "label"]
    assert data.features["label"].names == names
    assert data["label"] == ids


def test_wrong_columns_are_refused(tmp_path):
    name = save_parquet(tmp_path / "data", [1, 2], datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"no column 'image' \(`image_column`\); it has picture, kind, other"):
        load_training_data(name)
    with pytest.raises(ValueError, match=r"no column 'kinds' \(`label_column`\).* Did you mean 'kind'"):
        load_training_data(name, image_column="picture", label_column="kinds")
    with pytest.raises(ValueError, match=r"Column 'kind' of .* not images"):
        load_training_data(name, image_column="kind", label_column="other")
    name = save_parquet(tmp_path / "lists", [[0], [1]], datasets.List(datasets.Value("int64")))
    with pytest.raises(ValueError, match=r"Column 'kind' of .* not classes"):
        load_training_data(name, image_column="picture", label_column="kind")
    name = save_parquet(tmp_path / "floats", [0.5, 1.5], datasets.Value("float32"))
    with pytest.raises(ValueError, match=r"Column 'kind' of .* not classes"):
        load_training_data(name, image_column="picture", label_column="kind")
    name = save_parquet(tmp_path / "negative", [-1, 1], datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"negative class ids \(-1\)"):
        load_training_data(name, image_column="picture", label_column="kind")


def test_one_coloured_picture_makes_a_data_set_coloured(folder):
    assert num_image_channels(load_image_folder(folder)) == 3
    for path in folder.glob("*/*.png"):
        picture(mode="L").save(path)
    assert num_image_channels(load_image_folder(folder)) == 1
    picture().save(folder / "dog" / "1.png")
    assert num_image_channels(load_image_folder(folder)) == 3


def test_exactly_one_source(folder):
    with pytest.raises(ValueError, match="either `dataset_name` or `train_data_dir`, got neither"):
        load_training_data()
    with pytest.raises(ValueError, match="got both"):
        load_training_data("digits", folder)


@pytest.mark.parametrize("size", [(64, 48), (8, 8), (5, 20), (33, 17)])
def test_crop_is_centred_and_keeps_proportions(size):
    ramp = np.linspace(0, 255, size[0])[None, :].repeat(size[1], 0).astype(np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(ramp), 8), dtype=np.float64)
    assert cropped.shape == (8, 8)
    assert cropped.mean() == pytest.approx(127.5, abs=255 / 8 / 2)  # centred, to half a pixel
    step = 255 / size[0] * min(size) / 8  # a square of the short side, shrunk to 8 pixels
    assert np.diff(cropped.mean(0)).mean() == pytest.approx(step, rel=0.2, abs=1)


@pytest.mark.parametrize("target", [(20, 10), (8, 16), (40, 64), (50, 60)])
def test_the_crop_need_not_be_square(target):
    rows = np.arange(40, dtype=np.uint8)[:, None].repeat(64, 1)
    sample = ImageToSample(target, 1)(Image.fromarray(rows))
    assert sample.shape == (1, *target)
    assert (sample[0].diff(dim=1) == 0).all(), "rows stay rows"
    assert sample.mean().item() == pytest.approx(19.5 / 127.5 - 1, abs=1 / 127), "the centre stays the centre"


def test_exact_size_is_left_alone_and_scaled_to_minus_one_one():
    image = picture(8, 8)
    expected = torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(ImageToSample(8, 3)(image), expected)
    assert torch.equal(ImageToSample(8, 3)(image, flip=True), expected.flip(-1))
    assert ImageToSample(8, 1)(image).shape == (1, 8, 8)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    sample = ImageToSample(8, 1)(Image.fromarray(ramp))
    expected = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    torch.testing.assert_close(sample, expected, atol=1 / 127, rtol=0)


@torch.no_grad()
def test_latents_are_scaled_and_shifted_there_and_back():
    vae, images = tiny_vae(), torch.rand(2, 3, 8, 8) * 2 - 1
    latents = encode_images(images, vae, torch.Generator().manual_seed(0))
    drawn = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, (drawn - 0.1) * 0.5)
    torch.testing.assert_close(decode_samples(latents, vae), vae.decode(drawn).sample, atol=1e-5, rtol=1e-4)
    assert encode_images(images, None) is images
    assert decode_samples(images, None) is images
