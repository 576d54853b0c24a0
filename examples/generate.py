#!/usr/bin/env python
"""Generate images of classes with a trained pipeline.

    python examples/generate.py --pipeline outputs/digits --config outputs/digits/sampling.yaml --labels 3 7

Writes one PNG per image and `grid.png`, with a row per label. An image depends on the seed, its label's place in the
list and its number alone, not on how many others are made with it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from djepa_hf import DJEPAPipeline
from djepa_hf.arguments import SamplingArguments, parse_arguments
from djepa_hf.loading import check_place
from djepa_hf.seeds import seed_of
from djepa_hf.visualization import labelled_grid


@dataclass
class GenerationArguments:
    """What to generate."""

    pipeline: str = field(metadata={"help": "A pipeline folder, or its id on the Hub."})
    labels: list[str] = field(metadata={"help": "Class ids or names."})
    num_images_per_label: int = field(default=1, metadata={"help": "Images per label."})
    batch_size: int = field(default=64, metadata={"help": "Images that are made at once."})
    seed: int = field(default=0, metadata={"help": "Another seed gives other images."})
    output_dir: str = field(default="outputs/generated", metadata={"help": "Where the pictures go."})
    device: str | None = field(default=None, metadata={"help": "cuda, mps or cpu; the best there is if not given."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})

    def __post_init__(self):
        for name in ("num_images_per_label", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def best_device() -> str:
    """The fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def generate(
    pipe: DJEPAPipeline, ids: list[int], images_per_label: int, batch_size: int, seed: int, options: dict
) -> list:
    """`images_per_label` pictures of each class, in order, each from a generator of its own."""
    jobs = [(place, i, number) for place, i in enumerate(ids) for number in range(images_per_label)]
    pictures = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed_of(seed, place, number)) for place, _, number in batch]
        pictures += pipe([i for _, i, _ in batch], generator=generators, **options).images
        print(f"{len(pictures)} of {len(jobs)} images")
    return pictures


def main(argv: list[str] | None = None):
    args, sampling = parse_arguments(GenerationArguments, SamplingArguments, argv=argv, description=__doc__)
    check_place(args.pipeline)
    pipe = DJEPAPipeline.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype))
    pipe.to(args.device or best_device())
    config = pipe.transformer.config
    names = set(config.id2label.values())  # a class may be called "2" and have another id
    labels = [int(label) if label not in names and label.isdecimal() else label for label in args.labels]
    ids = pipe.get_label_ids(labels)
    options = sampling.call_options(config.num_tokens)
    pictures = generate(pipe, ids, args.num_images_per_label, args.batch_size, args.seed, options)

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, i in enumerate(ids):
        row = pictures[place * args.num_images_per_label : (place + 1) * args.num_images_per_label]
        for number, picture in enumerate(row):
            name = config.id2label[i].split(",")[0].replace(" ", "_").replace("/", "_")
            picture.save(output_dir / f"{place:03d}_{name}_{number:03d}.png")
        rows.append((config.id2label[i].split(",")[0], row))
    labelled_grid(rows).save(output_dir / "grid.png")
    print(f"{len(pictures)} images and grid.png are in {output_dir}.")


if __name__ == "__main__":
    main()
