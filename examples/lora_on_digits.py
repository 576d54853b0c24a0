#!/usr/bin/env python
"""What LoRA fine-tuning does to a small model, from beginning to end: a new style, and two new classes.

    python examples/lora_on_digits.py --output_dir outputs/lora_on_digits

A base is trained on handwritten digits from 0 to 7. One adapter learns to draw them inverted, dark on light, from a few
dozen examples; another learns the classes 8 and 9 from 30 examples each. Judges that were trained on all real digits,
upright or inverted, say how many generated images they read as the digit asked for, before and after. `result.json`
holds the figures, `before_and_after.png` the pictures. Steps that are done are not done again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import train
import train_lora
import yaml
from PIL import Image, ImageOps

from djepa_hf import DJEPAPipeline
from djepa_hf.arguments import option, parse_arguments
from djepa_hf.data import load_digits
from djepa_hf.evaluation.extractors import ClassifierExtractor
from djepa_hf.evaluation.real_images import RealImages
from djepa_hf.evaluation.scores import class_agreement
from djepa_hf.json_files import write_json
from djepa_hf.lora import WEIGHT_NAME, Adapter
from djepa_hf.visualization import labelled_grid

CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
OLD, NEW = range(8), (8, 9)
SAMPLING = {"num_inference_steps": 16, "num_denoising_steps": 25, "guidance_scale": 1.45, "temperature": 1.0}


@dataclass
class LoraOnDigitsArguments:
    """How much to do."""

    output_dir: str = option("outputs/lora_on_digits", "Where everything goes.")
    base_steps: int = option(1400, "Of the base.")
    style_steps: int = option(600, "Of the adapter for inverted digits.")
    class_steps: int = option(800, "Of the adapter for new classes.")
    style_images: int = option(8, "Inverted examples of each of the eight classes.")
    class_images: int = option(30, "Examples of each new class.")
    prior_images: int = option(120, "Of old classes, which the base draws so that it does not forget them.")
    rank: int = option(8, "Of both adapters.")
    num_images: int = option(1000, "Images that the judges see each time.")
    seed: int = option(0, "Of everything.")


def write_folders(folder: Path, args: LoraOnDigitsArguments):
    """Training images as folders of classes: `base`, `inverted`, `new`."""
    data, counts = load_digits("train"), {}
    for image, label in zip(data["image"], data["label"], strict=True):
        place = counts[label] = counts.get(label, -1) + 1
        wanted = {"base": label in OLD, "inverted": label in OLD and place < args.style_images}
        wanted["new"] = label in NEW and place < args.class_images
        for name, is_wanted in wanted.items():
            if is_wanted:
                path = folder / name / str(label) / f"{place:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                (ImageOps.invert(image) if name == "inverted" else image).save(path)


def judge(is_inverted: bool) -> ClassifierExtractor:
    """Who reads digits, having learnt from all real ones."""
    images, labels = RealImages("digits", "train", needs_classes=True).load(8, 1)
    images = images.float() / 255
    return ClassifierExtractor(1 - images if is_inverted else images, labels)


@torch.no_grad()
def agreement(pipe: DJEPAPipeline, reader: ClassifierExtractor, names: list[int], args: LoraOnDigitsArguments) -> float:
    """The share of images of these classes that the judge reads as such."""
    labels = [names[i % len(names)] for i in range(args.num_images)]
    logits = []
    for start in range(0, len(labels), 250):
        some = labels[start : start + 250]
        seeds = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(some))]
        images = pipe([str(label) for label in some], generator=seeds, output_type="pt", **SAMPLING).images
        logits.append(reader((images * 255).round() / 255)[1])
    return round(class_agreement(torch.cat(logits), torch.tensor(labels), reader), 4)


def pictures(pipe: DJEPAPipeline, names: list[int]) -> Image.Image:
    """A row of six for each class."""
    rows = []
    for name in names:
        seeds = [torch.Generator().manual_seed(i) for i in range(6)]
        rows.append((str(name), pipe(str(name), num_images_per_label=6, generator=seeds, **SAMPLING).images))
    return labelled_grid(rows)


def main(argv: list[str] | None = None):
    (args,) = parse_arguments(LoraOnDigitsArguments, argv=argv, description=__doc__)
    folder, old = Path(args.output_dir), list(OLD)
    base, style, classes = folder / "base", folder / "style", folder / "classes"
    write_folders(folder / "images", args)
    common = ["--seed", str(args.seed), "--random_flip", "false"]
    if not (base / "model_index.json").is_file():
        options = {**yaml.safe_load(CONFIG.read_text()), "output_dir": base, "max_train_steps": args.base_steps}
        options |= {"dataset_name": None, "train_data_dir": folder / "images" / "base"}
        train.main([*words(options), *common])
    for place, images, steps in ((style, "inverted", args.style_steps), (classes, "new", args.class_steps)):
        if not (place / WEIGHT_NAME).is_file():
            options = {"pretrained_model_name_or_path": base, "output_dir": place, "rank": args.rank, **SAMPLING}
            options |= {"train_data_dir": folder / "images" / images, "max_train_steps": steps, "learning_rate": 2e-3}
            options |= {"lr_scheduler": "cosine", "lr_warmup_steps": 20, "train_batch_size": 60}
            options["num_prior_images"] = args.prior_images if images == "new" else 0
            train_lora.main([*words(options), *common])

    pipe = DJEPAPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    upright, inverted = judge(False), judge(True)
    size = pipe.transformer.num_parameters()
    result = {"base": {"parameters": size, "old classes": agreement(pipe, upright, old, args)}}
    result["base"]["read as inverted"] = agreement(pipe, inverted, old, args)
    grids = [pictures(pipe, old[:4])]
    pipe.load_lora_weights(style)
    result["style"] = {
        "parameters": sum(t.numel() for t in Adapter.read(style).weights.values()),
        "images": args.style_images * len(old),
        "read as inverted": agreement(pipe, inverted, old, args),
    }
    grids.append(pictures(pipe, old[:4]))
    pipe.unload_lora_weights()
    pipe.load_lora_weights(classes)
    result["classes"] = {
        "parameters": sum(t.numel() for t in Adapter.read(classes).weights.values()),
        "images": args.class_images * len(NEW),
        "old classes": agreement(pipe, upright, old, args),
        "new classes": agreement(pipe, upright, list(NEW), args),
    }
    grids.append(pictures(pipe, [*old[:2], *NEW]))
    for part in ("style", "classes"):
        result[part]["share of the base"] = round(result[part]["parameters"] / size, 4)
    write_json(folder / "result.json", result)
    side_by_side(grids).save(folder / "before_and_after.png")
    print(json.dumps(result, indent=2))


def words(options: dict) -> list[str]:
    """Options as a command line."""
    given = {name: value for name, value in options.items() if value is not None}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def side_by_side(pictures: list[Image.Image], gap: int = 24) -> Image.Image:
    """Pictures of one height in a row."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row, left = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white"), 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


if __name__ == "__main__":
    main()
