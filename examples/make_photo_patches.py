#!/usr/bin/env python
"""Small colour pictures of sixteen classes, no network needed: patches of the photographs that come with scikit-image.

    python examples/make_photo_patches.py --output_dir outputs/photo_patches

Writes `train/CLASS/*.png` and `test/CLASS/*.png`, where a class is a photograph. Photographs are cut into blocks first,
and a block's patches are all for training or all held out, so that no pixel is in both.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from tqdm.auto import tqdm

from djepa_hf.arguments import option, parse_arguments

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "cameraman": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
    "tissue": "ihc.png",
}
BLOCKS = 10  # along each side of a photograph
HELD_OUT = 5  # one block in so many
LEAST_SIDE = 320  # pixels, of what photographs are made smaller to


@dataclass
class PatchArguments:
    """What to cut."""

    output_dir: str = option("outputs/photo_patches", "Where the folders go.")
    size: int = option(16, "Side of the patches.")
    per_class: int = option(640, "Training patches per class; a quarter as many are held out.")
    seed: int = option(0, "Of their places.")

    def __post_init__(self):
        if self.size < 1 or self.per_class < 4:
            raise ValueError(f"`size` must be at least 1 and `per_class` 4, got {self.size} and {self.per_class}.")


def patches(photograph: Image.Image, held_out: bool, count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Patches `(count, size, size, 3)` from random places in the blocks of one part."""
    pixels = np.asarray(photograph.convert("RGB"))
    height, width = (side // BLOCKS for side in pixels.shape[:2])
    blocks = [(i, j) for i in range(BLOCKS) for j in range(BLOCKS) if ((2 * i + j) % HELD_OUT == 0) == held_out]
    found = []
    for _ in range(count):
        i, j = blocks[random.integers(len(blocks))]
        top = i * height + random.integers(height - size + 1)
        left = j * width + random.integers(width - size + 1)
        found.append(pixels[top : top + size, left : left + size])
    return np.stack(found)


def main(argv: list[str] | None = None):
    (args,) = parse_arguments(PatchArguments, argv=argv, description=__doc__)
    random, folder = np.random.default_rng(args.seed), Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another `output_dir`, or remove it.")
    side = max(LEAST_SIDE, BLOCKS * (args.size + 1))  # so that a patch shows something, and fits into a block
    for name, file in tqdm(PHOTOGRAPHS.items(), unit=" photographs"):
        photograph = Image.open(Path(skimage.__file__).parent / "data" / file)
        shortest = min(photograph.size)
        if shortest > side:
            photograph = photograph.convert("RGB")
            photograph.thumbnail([length * side // shortest for length in photograph.size])
        elif shortest < BLOCKS * args.size:
            photograph = photograph.resize([round(length * side / shortest) for length in photograph.size])
        for part, count in (("train", args.per_class), ("test", args.per_class // 4)):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i, patch in enumerate(patches(photograph, part == "test", count, args.size, random)):
                Image.fromarray(patch).save(folder / part / name / f"{i:05d}.png")


if __name__ == "__main__":
    main()
