"""Which image goes into which batch, decoded in worker processes: the same whatever the number of processes.

Training data on disk are one endless stream: a permutation of all images, then another one. Batches are cut from it,
and every process takes its share of each. So no image is left out or seen twice in an epoch, a batch does not depend on
how many processes share it, and any place in the stream can be gone to at once.

Data that are streamed from elsewhere are read in shards, which processes and workers divide between them. One that has
fewer images than another is through its epoch earlier, and their batches depend on how many there are. A stream that is
gone on with passes over what its epoch has already given, without decoding it.
"""

import copy
import signal
from collections.abc import Callable, Iterator

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from .data import open_image
from .seeds import seed_of


class StreamSampler(Sampler):
    """
    Batches of one process, without end: lists of (epoch, index).

    Args:
        num_samples (`int`): images in the data.
        batch_size (`int`): images per process and batch.
        rank, num_processes (`int`): this process among all that share the stream.
        seed (`int`): of the permutations.
        first_batch (`int`, defaults to 0): where to begin.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        seed: int = 0,
        first_batch: int = 0,
    ):
        self.num_samples, self.batch_size, self.seed, self.first_batch = num_samples, batch_size, seed, first_batch
        self.rank, self.num_processes = rank, num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled, order = None, None
        place = (self.first_batch * self.num_processes + self.rank) * self.batch_size
        while True:
            batch = []
            for position in range(place, place + self.batch_size):
                epoch, offset = divmod(position, self.num_samples)
                if epoch != shuffled:
                    generator = torch.Generator().manual_seed(seed_of("epoch", self.seed, epoch))
                    shuffled, order = epoch, torch.randperm(self.num_samples, generator=generator)
                batch.append((epoch, int(order[offset])))
            yield batch
            place += self.num_processes * self.batch_size


class TrainingImages(Dataset):
    """
    Images of a map-style data set as training samples.

    An image that cannot be read is passed over for the next one that can, and its name is handed on.

    Args:
        data ([`~datasets.Dataset`]): with the columns `image` and `label`.
        to_sample (`Callable`): from a picture and whether to flip it to a tensor, such as [`ImageToSample`].
        flip (`bool`): whether to flip half of the images, anew in each epoch.
        seed (`int`): of the flips.
    """

    def __init__(self, data: datasets.Dataset, to_sample: Callable, flip: bool, seed: int = 0):
        self.data = data.cast_column("image", datasets.Image(decode=False))
        self.to_sample, self.flip, self.seed = to_sample, flip, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: tuple[int, int]) -> dict:
        epoch, index = place
        unreadable = []
        for number in range(len(self)):
            i = (index + number) % len(self)
            row = self.data[i]
            flip = self.flip and seed_of("flip", self.seed, epoch, i) % 2 == 1
            try:
                sample = self.to_sample(open_image(row["image"]), flip)
            except Exception as error:  # whatever a decoder makes of a damaged file
                unreadable.append(f"{row['image'].get('path') or f'row {i}'}: {error}")
                continue
            return {"sample": sample, "class_labels": row["label"], "id": i, "unreadable": unreadable}
        raise ValueError(f"Not one of {len(self)} images can be read; the first: {unreadable[0]}")


class StreamingImages(IterableDataset):
    """
    Images of a streamed data set as training samples, without end.

    Shards are divided between processes and their workers by `datasets`; where there are too few, single images are.

    Args:
        data ([`~datasets.IterableDataset`]): with the columns `image` and `label`.
        to_sample, flip, seed: as in [`TrainingImages`].
        rank, num_processes (`int`): this process among all that share the stream.
        shuffle_buffer (`int`): images among which the next is drawn.
        endless (`bool`, defaults to `True`): whether another epoch follows the first.
    """

    def __init__(
        self,
        data: datasets.IterableDataset,
        to_sample: Callable,
        flip: bool,
        seed: int = 0,
        rank: int = 0,
        num_processes: int = 1,
        shuffle_buffer: int = 1000,
        endless: bool = True,
    ):
        data = data.cast_column("image", datasets.Image(decode=False))
        data = data.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else data
        self.data = split_dataset_by_node(data, rank, num_processes)
        self.to_sample, self.flip, self.seed, self.rank, self.endless = to_sample, flip, seed, rank, endless
        self.starts: dict[int, tuple[int, int]] = {}  # where each worker begins: epoch, images of it to pass over

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, unreadable, read = info.id if info else 0, [], True
        epoch, first = self.starts.get(worker, (0, 0))
        data = copy.deepcopy(self.data)  # whose epoch is its own: that of the original is shared by all workers
        while read:  # a worker without a shard of its own has nothing to do
            data.set_epoch(epoch)
            read = first > 0
            for number, row in enumerate(data):
                if number < first:
                    continue
                flip = self.flip and seed_of("flip", self.seed, epoch, self.rank, worker, number) % 2 == 1
                try:
                    sample = self.to_sample(open_image(row["image"]), flip)
                except Exception as error:
                    unreadable.append(f"{row['image'].get('path') or f'image {number} of a shard'}: {error}")
                    continue
                read = True
                yield {
                    "sample": sample,
                    "class_labels": row["label"],
                    "id": row.get("id", f"epoch {epoch}, process {self.rank}, worker {worker}, image {number}"),
                    "unreadable": unreadable,
                    "place": (worker, epoch, number + 1),
                }
                unreadable = []
            if unreadable and not read:
                raise ValueError(f"Not one image of a stream can be read; the first: {unreadable[0]}")
            if not self.endless:
                return
            epoch, first = epoch + 1, 0


class Batches:
    """
    Batches of one process, without end. Use it in a `with` statement, at the end of which its workers stop.

    Args:
        loader (`DataLoader`): gives the batches.
    """

    def __init__(self, loader: DataLoader):
        self.batches = iter(loader)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict:
        return next(self.batches)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_):
        # Workers do not heed SIGTERM, by which Python would end them at exit; and where an error is on its way, its
        # traceback keeps the loader's iterator, which would stop them, alive.
        if hasattr(self.batches, "_shutdown_workers"):
            self.batches._shutdown_workers()
            for worker in self.batches._workers:
                worker.kill()  # if it is still reading: a download may take for ever


class StreamBatches(Batches):
    """
    [`Batches`] from a stream, which know where they are.

    Args:
        data ([`StreamingImages`]): the stream.
        place (`dict`, *optional*): where to go on, the `place` of an earlier instance with as many workers.
        options: of the `DataLoader`.
    """

    def __init__(self, data: StreamingImages, place: dict | None = None, **options):
        self.given = place["given"] if place else 0
        # of each worker that has a shard: where it was before the last batch that it gave and after it, (epoch, images)
        self.around = {int(worker): around for worker, around in place["around"].items()} if place else {}
        # A loader always begins with its first worker. So all begin with the round that the next batch belongs to, and
        # what this round has given already goes by.
        active = len(self.around)
        ahead = self.given if self.given <= active else self.given % active
        data = copy.copy(data)
        data.starts = {worker: self.around[worker][i >= ahead] for i, worker in enumerate(sorted(self.around))}
        super().__init__(DataLoader(data, **options))
        try:
            for _ in range(ahead):
                next(self.batches)
        except BaseException:
            self.__exit__()
            raise

    @property
    def place(self) -> dict:
        """How many batches were given, and where the workers are: numbers and lists that JSON can hold."""
        return {"given": self.given, "around": {str(worker): around for worker, around in self.around.items()}}

    def __next__(self) -> dict:
        batch = super().__next__()
        worker, *after = batch.pop("place")
        before = self.around.get(worker, [None, [0, 0]])[1]
        self.around[worker] = [before, after]
        self.given += 1
        return batch


def collate(rows: list[dict]) -> dict:
    """Rows to a batch of tensors; the names of unreadable images stay a list, of places in a stream the last counts."""
    rest = {"unreadable": [name for row in rows for name in row.pop("unreadable")]}
    if "place" in rows[0]:
        rest["place"] = [row.pop("place") for row in rows][-1]
    return {**default_collate(rows), **rest}


def _leave_signals_alone(worker: int):
    """Clusters signal all processes at once; workers must live until the main one has saved its checkpoint."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def batch_loader(
    data: Dataset | IterableDataset,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    num_processes: int = 1,
    seed: int = 0,
    first_batch: int = 0,
    place: dict | None = None,
) -> Batches:
    """
    The batches of one process, without end, from any place on.

    Args:
        data ([`TrainingImages`], [`CachedLatents`] or [`StreamingImages`]): to cut them from.
        batch_size (`int`): images per process.
        num_workers (`int`): processes that read ahead; 0 reads in this one.
        rank, num_processes, seed, first_batch: as in [`StreamSampler`]; the last does not apply to streams.
        place (`dict`, *optional*): where a stream goes on, see [`StreamBatches`].
    """
    options = {"num_workers": num_workers, "collate_fn": collate, "persistent_workers": num_workers > 0}
    options |= {
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _leave_signals_alone,
        "generator": torch.Generator().manual_seed(seed),
    }
    if isinstance(data, IterableDataset):
        return StreamBatches(data, place, batch_size=batch_size, **options)
    sampler = StreamSampler(len(data), batch_size, rank, num_processes, seed, first_batch)
    return Batches(DataLoader(data, batch_sampler=sampler, **options))
