"""What a training run reads, from options: images or cached latents, with their classes. Needs the `train` extra."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL
from torch.utils.data import Dataset, IterableDataset

from .arguments import DataArguments
from .batches import StreamingImages, TrainingImages
from .data import ImageToSample, load_training_data, num_image_channels
from .latent_cache import CachedLatents


@dataclass
class TrainingData:
    """
    Training samples and what is known about them.

    Args:
        samples ([`TrainingImages`], [`StreamingImages`] or [`CachedLatents`]): to cut batches from.
        names (`list[str]`): of the classes.
        resolution (`int` or `tuple[int, int]`): side of the images, or their height and width.
        channels (`int`): of the images.
        source (`str`): where they come from, for people.
        num_workers (`int`): processes that read ahead.
        is_cached (`bool`): whether samples are moments of latents, and not images.
    """

    samples: Dataset | IterableDataset
    names: list[str]
    resolution: int | tuple[int, int]
    channels: int
    source: str
    num_workers: int
    is_cached: bool = False

    @property
    def is_stream(self) -> bool:
        return isinstance(self.samples, IterableDataset)

    def count_images(self) -> int:
        """
        Images per epoch.

        Raises:
            ValueError: if a stream does not say.
        """
        if not self.is_stream:
            return len(self.samples)
        info = self.samples.data.info
        split = (info.splits or {}).get("train")
        if split is None or not split.num_examples:
            raise ValueError(f"{self.source} does not say how many images it has: pass `max_train_steps`.")
        return split.num_examples


def load_training_samples(
    args: DataArguments, vae: AutoencoderKL | None, seed: int, rank: int = 0, num_processes: int = 1
) -> TrainingData:
    """
    The samples that the options ask for.

    Args:
        args ([`DataArguments`]): the options.
        vae ([`~diffusers.AutoencoderKL`], *optional*): of the model's latents.
        seed (`int`): of everything random in them.
        rank, num_processes (`int`): this process among all.

    Raises:
        ValueError: if options contradict each other, there are fewer images than processes, or a cache was made with
            another VAE or size. As [`load_training_data`] besides.
    """
    if args.latent_cache_dir is not None:
        if args.dataset_name or args.train_data_dir:
            raise ValueError("`latent_cache_dir` takes the place of `dataset_name` and `train_data_dir`: pass one.")
        samples = CachedLatents(args.latent_cache_dir, args.random_flip, seed)
        samples.check(vae, args.image_size)
        data = TrainingData(
            samples,
            samples.names,
            args.image_size,
            vae.config.in_channels,
            samples.source,
            args.dataloader_num_workers,
            True,
        )
    else:
        images = load_training_data(
            args.dataset_name,
            args.train_data_dir,
            args.image_column,
            args.label_column,
            args.dataset_config_name,
            args.data_files,
            args.streaming,
            args.num_classes,
        )
        names = images.features["label"].names
        channels = num_image_channels(images) if vae is None else vae.config.in_channels
        to_sample = ImageToSample(args.image_size, channels)
        if args.streaming:
            samples = StreamingImages(images, to_sample, args.random_flip, seed, rank, num_processes)
        else:
            samples = TrainingImages(images, to_sample, args.random_flip, seed)
        source = args.dataset_name or Path(args.train_data_dir).name
        data = TrainingData(samples, names, args.image_size, channels, source, args.dataloader_num_workers)
    if not args.streaming and len(data.samples) < num_processes:
        raise ValueError(f"{data.source} has {len(data.samples)} images, fewer than the {num_processes} processes.")
    return data
