#!/usr/bin/env python
"""Encode a data set once, so that training need not: moments of the latents of every image and its mirror image.

    accelerate launch examples/cache_latents.py --dataset_name ILSVRC/imagenet-1k --resolution 256 \\
        --pretrained_vae_model_name_or_path kl16.ckpt --output_dir imagenet_latents
    accelerate launch examples/train.py --config examples/configs/imagenet_base.yaml \\
        --latent_cache_dir imagenet_latents --pretrained_vae_model_name_or_path kl16.ckpt

All processes take part. A run that was killed goes on where it was when it is started again: finished shards stay. The
folder is one that `datasets.load_from_disk` reads; `manifest.json` says what it was made with, and marks it complete.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from djepa_hf.arguments import DataArguments, parse_arguments
from djepa_hf.data import ImageToSample, load_training_data, open_image
from djepa_hf.engines import start_processes
from djepa_hf.json_files import write_json
from djepa_hf.latent_cache import MANIFEST, cache_features, weight_hash, write_index, write_shard
from djepa_hf.latents import height_and_width, latent_size, posterior_moments
from djepa_hf.loading import load_vae

PLAN = "plan.json"  # what an unfinished cache is being made with


@dataclass
class CacheArguments:
    """How to encode."""

    output_dir: str = field(metadata={"help": "The cache."})
    batch_size: int = field(default=32, metadata={"help": "Images that are encoded at once."})
    shard_size: int = field(default=4096, metadata={"help": "Images per file; what a killed run may have to repeat."})

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class Images(Dataset):
    """Images in order; one that cannot be read is its own name and what is wrong with it."""

    def __init__(self, data: datasets.Dataset, to_sample: ImageToSample):
        self.data, self.to_sample = data.cast_column("image", datasets.Image(decode=False)), to_sample

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | str, int]:
        row = self.data[index]
        try:
            return self.to_sample(open_image(row["image"])), row["label"]
        except Exception as error:  # whatever a decoder makes of a damaged file
            return f"{row['image'].get('path') or f'row {index}'}: {error}", row["label"]


def make_plan(args: DataArguments, shard_size: int, data: datasets.Dataset, vae: AutoencoderKL) -> dict:
    """What the cache is made with, so that nobody goes on with something else."""
    source = args.dataset_name or str(args.train_data_dir)
    fingerprint = hashlib.sha256(json.dumps([source, len(data), data["label"][:]]).encode()).hexdigest()[:16]
    height, width = height_and_width(latent_size(args.image_size, vae))
    return {
        "source": source,
        "fingerprint": fingerprint,
        "resolution": args.image_size if isinstance(args.image_size, int) else list(args.image_size),
        "crop": "centre, as ADM",
        "vae": args.pretrained_vae_model_name_or_path,
        "vae_weights": weight_hash(vae),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor or 0.0,
        "shape": [2 * vae.config.latent_channels, height, width],
        "dtype": "float16",
        "shard_size": shard_size,
    }


def check_plan(plan: dict, folder: Path):
    """Raises a `ValueError` if the folder holds shards that were made with something else."""
    for name in (PLAN, MANIFEST):
        if (folder / name).is_file():
            earlier = json.loads((folder / name).read_text())
            for key, value in plan.items():
                if earlier.get(key) != value:
                    raise ValueError(
                        f"{folder} holds a cache with {key} {earlier.get(key)}, this one has {value}: choose another "
                        "`output_dir`, or remove it."
                    )


@torch.no_grad()
def encode(
    batches: Iterator[list], vae: AutoencoderKL, device: torch.device, unreadable: list[str]
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Moments `(n, 2, 2 * latent_channels, h, w)` of images and mirror images, and their classes, batch by batch."""
    for batch in batches:
        readable = [(sample, label) for sample, label in batch if not isinstance(sample, str)]
        unreadable += [sample for sample, _ in batch if isinstance(sample, str)]
        if readable:
            images = torch.stack([sample for sample, _ in readable]).to(device)
            moments = [posterior_moments(view, vae) for view in (images, images.flip(-1))]
            yield torch.stack(moments, dim=1).to(torch.float16).cpu(), [label for _, label in readable]


def main(argv: list[str] | None = None):
    args, data_args = parse_arguments(CacheArguments, DataArguments, argv=argv, description=__doc__)
    if data_args.pretrained_vae_model_name_or_path is None:
        raise ValueError("`pretrained_vae_model_name_or_path` is missing: pixels need no cache.")
    if data_args.streaming:
        raise ValueError("`streaming` data have no fixed order to go on in: download them for a cache.")
    state, folder = start_processes(), Path(args.output_dir)
    vae = load_vae(data_args.pretrained_vae_model_name_or_path).to(state.device)
    latent_size(data_args.image_size, vae)  # raises before anything is read, if there is none
    data = load_training_data(
        data_args.dataset_name,
        data_args.train_data_dir,
        data_args.image_column,
        data_args.label_column,
        data_args.dataset_config_name,
        data_args.data_files,
    )
    plan = make_plan(data_args, args.shard_size, data, vae)
    check_plan(plan, folder)
    state.wait_for_everyone()  # before the plan that they check is written
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, plan)
    state.wait_for_everyone()

    images = Images(data, ImageToSample(data_args.image_size, vae.config.in_channels))
    features = cache_features(data.features["label"].names, tuple(plan["shape"]))
    starts = range(0, len(data), args.shard_size)
    shards = [f"data-{i:05d}-of-{len(starts):05d}.arrow" for i in range(len(starts))]
    mine = [i for i in range(len(starts)) if i % state.num_processes == state.process_index]
    left = [i for i in mine if not (folder / shards[i]).is_file()]
    count = sum(min(args.shard_size, len(data) - starts[i]) for i in left)
    progress = tqdm(total=count, unit=" images", disable=not state.is_main_process, desc="encoding")
    for i in left:
        rows = range(starts[i], min(starts[i] + args.shard_size, len(data)))
        loader = DataLoader(
            images,
            batch_sampler=[rows[j : j + args.batch_size] for j in range(0, len(rows), args.batch_size)],
            num_workers=data_args.dataloader_num_workers,
            collate_fn=list,
        )
        moments, labels, unreadable = [], [], []
        for part, classes in encode(loader, vae, state.device, unreadable):
            moments.append(part)
            labels += classes
            progress.update(len(classes))
        if unreadable:
            (folder / f"unreadable-{i:05d}.log").write_text("\n".join(unreadable) + "\n")
        shape = (0, 2, *plan["shape"])
        write_shard(folder / shards[i], torch.cat(moments) if moments else torch.empty(shape), labels, features)
    progress.close()
    state.wait_for_everyone()
    if state.is_main_process:
        count = sum(len(datasets.Dataset.from_file(str(folder / name))) for name in shards)
        write_index(folder, shards, features, {**plan, "count": count})
        (folder / PLAN).unlink()
        missing = f" {len(data) - count:,} could not be read: see unreadable-*.log." if count < len(data) else ""
        print(f"{folder} holds the latents of {count:,} images in {len(shards)} shards.{missing}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
