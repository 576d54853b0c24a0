"""Which image goes where: nothing twice, nothing left out, whatever the number of processes and workers."""

import io
import json
import multiprocessing
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from djepa_hf.batches import StreamingImages, StreamSampler, TrainingImages, batch_loader
from djepa_hf.data import ImageToSample, load_training_data

NUM = 37  # divides by nothing


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    """datasets waits five seconds at the end of every shuffled epoch of a stream."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def png(value: int, size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def images(num=NUM, damaged=()) -> datasets.Dataset:
    """Grey squares, each as bright as its place."""
    content = [{"bytes": b"no image" if i in damaged else png(5 * i), "path": f"{i}.png"} for i in range(num)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": content, "label": [i % 2 for i in range(num)]}, features)


def brightness(batch) -> list[int]:
    return ((batch["sample"].mean((1, 2, 3)) + 1) * 127.5 / 5).round().int().tolist()


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_an_epoch_has_every_image_once(world, workers):
    data, batch = TrainingImages(images(), ImageToSample(8, 1), flip=True), 4
    loaders = [batch_loader(data, batch, workers, rank, world, seed=1) for rank in range(world)]
    seen = []
    while len(seen) < 3 * NUM:
        for loader in loaders:
            got = next(loader)
            assert got["id"].tolist() == brightness(got), "the pictures are those of the ids"
            assert [i % 2 for i in got["id"].tolist()] == got["class_labels"].tolist()
            seen += got["id"].tolist()
    epochs = [seen[i * NUM : (i + 1) * NUM] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM))
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_do_not_depend_on_the_number_of_processes_and_start_anywhere():
    def stream(batch, world, first=0, count=12):
        iterators = [iter(StreamSampler(NUM, batch, rank, world, seed=3, first_batch=first)) for rank in range(world)]
        return [place for _ in range(count) for one in iterators for place in next(one)]

    assert stream(8, 1) == stream(4, 2) == stream(2, 4)
    assert stream(4, 2)[8 * 7 :] == stream(4, 2, first=7, count=5)


def test_flips_belong_to_epoch_and_image():
    ramp = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    content = [{"bytes": file.getvalue(), "path": None}] * 400
    data = datasets.Dataset.from_dict({"image": content, "label": [0] * 400}, features)

    def flips(epoch, seed=0, flip=True):
        samples = TrainingImages(data, ImageToSample(8, 1), flip, seed)
        return [bool(samples[epoch, i]["sample"][0, 0, 0] > samples[epoch, i]["sample"][0, 0, -1]) for i in range(400)]

    assert 150 < sum(flips(0)) < 250
    assert flips(0) == flips(0)
    assert flips(0) != flips(1)
    assert flips(0) != flips(0, seed=1)
    assert not any(flips(0, flip=False))


def test_unreadable_images_are_passed_over_and_named():
    data = TrainingImages(images(damaged=(3, 4, NUM - 1)), ImageToSample(8, 1), flip=False)
    assert (data[0, 3]["id"], data[0, NUM - 1]["id"]) == (5, 0)
    assert [name.split(":")[0] for name in data[0, 3]["unreadable"]] == ["3.png", "4.png"]
    batch = next(batch_loader(data, NUM))
    assert sorted(name.split(":")[0] for name in batch["unreadable"]) == ["3.png", "36.png", "4.png", "4.png"]
    with pytest.raises(ValueError, match=r"Not one of 2 images can be read; the first: 0\.png"):
        TrainingImages(images(2, damaged=(0, 1)), ImageToSample(8, 1), flip=False)[0, 0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    data = images(damaged=(11,)).add_column("id", list(range(NUM)))
    for i in range(4):
        data.shard(4, i).to_parquet(folder / f"{i}.parquet")
    return str(folder / "*.parquet")


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 1)])
def test_a_streamed_epoch_has_every_image_once(shards, world, workers):
    data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=True)
    seen, unreadable = Counter(), []
    for rank in range(world):
        stream = StreamingImages(data, ImageToSample(8, 1), True, 0, rank, world, shuffle_buffer=5, endless=False)
        for batch in batch_loader(stream, 3, workers):
            assert batch["id"].tolist() == brightness(batch)
            seen.update(batch["id"].tolist())
            unreadable += batch["unreadable"]
    assert seen == Counter(i for i in range(NUM) if i != 11)
    assert [name.split(":")[0] for name in unreadable] == ["11.png"]


def test_a_stream_of_which_nothing_can_be_read_is_an_error(tmp_path):
    images(4, damaged=range(4)).to_parquet(tmp_path / "bad.parquet")
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "bad.parquet"), split="train", streaming=True)
    with pytest.raises(ValueError, match="Not one image of a stream can be read; the first: "):
        next(batch_loader(StreamingImages(data, ImageToSample(8, 1), True), 2))


@pytest.mark.parametrize(("num_shards", "workers"), [(4, 0), (4, 3), (2, 3)])
def test_a_stream_goes_on_and_can_be_joined_later(shards, num_shards, workers):
    decoded = []

    class Decode(ImageToSample):
        def __call__(self, image, flip=False):
            decoded.append(1)
            return super().__call__(image, flip)

    def batches(place=None):
        files = shards.replace("*", f"[0-{num_shards - 1}]")
        data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        stream = StreamingImages(data, Decode(8, 1), True, 0, shuffle_buffer=5)
        return batch_loader(stream, 4, workers, place=place)

    def first(loader, count):
        got = [next(loader) for _ in range(count)]
        return [(batch["id"].tolist(), batch["sample"].flatten().tolist()) for batch in got]

    whole = batches()
    for given in (1, 20):
        expected = first(whole, given)
        place = json.loads(json.dumps(whole.place))
        expected += first(whole, 8)
        decoded.clear()
        assert first(batches(place), 8) == expected[given:]
        assert workers or len(decoded) <= 36, "what was given before is not decoded again, but for the last batch"
    if workers == 0:
        ids = [i for batch, _ in first(batches(), 18) for i in batch]
        assert sorted(ids[:36]) == sorted(ids[36:])
        assert ids[:36] != ids[36:]


def test_workers_stop_when_catching_up_fails_or_they_are_busy(shards, monkeypatch):
    class Stuck(ImageToSample):
        def __call__(self, image, flip=False):
            if get_worker_info().id == 1:
                time.sleep(600)
            return super().__call__(image, flip)

    data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=True)
    with batch_loader(StreamingImages(data, Stuck(8, 1), True), 2, 2) as batches:
        next(batches)
        workers = batches.batches._workers
    assert not any(worker.is_alive() or worker.exitcode is None for worker in join(workers))

    class Unreadable(ImageToSample):
        def __call__(self, image, flip=False):
            raise OSError("no")

    place = {"given": 1, "around": {"0": [[0, 0], [0, 2]]}}
    with pytest.raises(ValueError, match="Not one image of a stream can be read"):
        batch_loader(StreamingImages(data, Unreadable(8, 1), True), 2, 2, place=place)
    assert not any(worker.is_alive() for worker in join(multiprocessing.active_children()))


def join(workers):
    for worker in workers:
        worker.join(10)
    return workers


def test_a_stream_is_joined_at_the_end_of_its_epoch(shards):
    def batches(place=None):
        data = datasets.load_dataset("parquet", data_files=shards, split="train", streaming=True)
        return batch_loader(StreamingImages(data, ImageToSample(8, 1), True, 0, shuffle_buffer=5), 4, place=place)

    whole = batches()
    for _ in range(9):  # all 36 images that can be read
        next(whole)
    assert next(batches(whole.place))["id"].tolist() == next(whole)["id"].tolist()


def test_streams_and_formats_are_loaded_by_option(shards, tmp_path):
    data = load_training_data("parquet", data_files=shards, streaming=True)
    assert data.features["label"].names == ["a", "b"]
    assert set(next(iter(data))) == {"image", "label"}
    assert len(load_training_data("parquet", data_files=shards)) == NUM
    numbers = images().cast_column("label", datasets.Value("int64"))
    numbers.to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="streamed classes must be `ClassLabel`s, or numbers with `num_classes`"):
        load_training_data("parquet", data_files=str(tmp_path / "numbers.parquet"), streaming=True)
    data = load_training_data("parquet", data_files=str(tmp_path / "numbers.parquet"), streaming=True, num_classes=2)
    assert data.features["label"].names == ["0", "1"]
    with pytest.raises(ValueError, match="`streaming` is for data sets of the Hub and files, not for digits"):
        load_training_data("digits", streaming=True)


def test_webdataset_shards(tmp_path):
    import tarfile

    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(3):
                for suffix, content in (("png", png(10 * i)), ("cls", str(i).encode())):
                    info = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    options = {"image_column": "png", "label_column": "cls", "data_files": str(tmp_path / "*.tar")}
    data = load_training_data("webdataset", **options)
    assert len(data) == 6
    assert data.features["label"].names == ["0", "1", "2"]
    stream = load_training_data("webdataset", **options, streaming=True, num_classes=3)
    assert sorted(row["label"] for row in stream) == [0, 0, 1, 1, 2, 2]
    samples = TrainingImages(data, ImageToSample(8, 1), flip=False)
    assert torch.equal(samples[0, 0]["sample"], torch.full((1, 8, 8), -1.0))
