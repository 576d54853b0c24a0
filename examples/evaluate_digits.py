#!/usr/bin/env python
"""How good a digits pipeline is, judged by a classifier that was trained on real digits alone.

    python examples/evaluate_digits.py --pipeline outputs/digits --config outputs/digits/sampling.yaml

Prints the share of generated digits that the classifier reads as the label asked for, and the Fréchet distance of its
hidden features from generated to held-out real digits, beside the same distance from the real training digits. Writes
`metrics.json` and `samples.png`, ten digits of each class, into the pipeline's folder, and the figures into its card.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import EvalResult
from PIL import Image

from djepa_hf import DJEPAPipeline
from djepa_hf.arguments import SamplingArguments, parse_arguments
from djepa_hf.data import load_digits
from djepa_hf.metrics import DigitJudge, class_agreement, frechet_distance
from djepa_hf.model_card import TASK, add_results
from djepa_hf.visualization import labelled_grid


@dataclass
class EvaluationArguments:
    """What to evaluate."""

    pipeline: str = field(default="outputs/digits", metadata={"help": "The folder of a pipeline trained on digits."})
    num_images: int = field(default=1000, metadata={"help": "Digits to generate, equally many of each class."})
    seed: int = field(default=0, metadata={"help": "Seed of the generated digits."})


def real_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(n, 1, 8, 8)` in [0, 1] and labels `(n,)` of a split of the real digits."""
    data = load_digits(split)
    images = np.stack([np.asarray(image, dtype=np.float32) for image in data["image"]]) / 255
    return torch.from_numpy(images).unsqueeze(1), torch.tensor(data["label"])


def card_results(results: dict) -> list[EvalResult]:
    """The figures as the model card's metadata wants them."""
    about = {
        **TASK,
        "dataset_type": "digits",
        "dataset_name": "handwritten digits of scikit-learn, held out",
    }
    settings = {**results["sampling"], "num_images": results["num_images"], "seed": results["seed"]}
    agreement, distance = round(results["class_agreement"], 4), round(results["frechet_distance"], 3)
    return [
        EvalResult(
            **about,
            metric_type="accuracy",
            metric_name="Class agreement with a classifier of real digits",
            metric_value=agreement,
            metric_args=settings,
        ),
        EvalResult(
            **about,
            metric_type="frechet_distance",
            metric_name="Fréchet distance of that classifier's features",
            metric_value=distance,
            metric_args=settings,
        ),
    ]


def main(argv: list[str] | None = None):
    args, sampling = parse_arguments(EvaluationArguments, SamplingArguments, argv=argv, description=__doc__)
    pipe = DJEPAPipeline.from_pretrained(args.pipeline)
    config = pipe.transformer.config
    labels = torch.arange(args.num_images) % config.num_labels
    options = sampling.call_options(config.num_tokens)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(args.seed)
    images = pipe(labels, generator=generator, output_type="pt", **options).images
    seconds = time.perf_counter() - started

    train_images, train_labels = real_digits("train")
    test_images, test_labels = real_digits("test")
    judge = DigitJudge(train_images, train_labels)
    distance = frechet_distance(judge, images, test_images)
    floor = frechet_distance(judge, train_images, test_images)
    results = {
        "class_agreement": class_agreement(judge, images, labels),
        "frechet_distance": distance,
        "frechet_distance_of_real_training_digits": floor,
        "ratio": distance / floor,
        "judge_accuracy_on_held_out_digits": class_agreement(judge, test_images, test_labels),
        "num_images": args.num_images,
        "seed": args.seed,
        "objective": config.objective,
        "seconds_of_sampling": round(seconds, 1),
        "sampling": {**asdict(sampling), **options},
    }
    folder = Path(args.pipeline)
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    add_results(folder, card_results(results))
    pictures = [Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8)) for image in images]
    rows = [(config.id2label[i], pictures[i :: config.num_labels][:10]) for i in range(config.num_labels)]
    labelled_grid(rows).save(folder / "samples.png")
    print(
        f"Judge: {results['judge_accuracy_on_held_out_digits']:.1%} right on {len(test_labels)} held-out real digits.\n"
        f"Class agreement: {results['class_agreement']:.1%} of {args.num_images} generated digits "
        f"({seconds:.0f} s to sample).\n"
        f"Fréchet distance to held-out real digits: {distance:.2f}; from real training digits: {floor:.2f} "
        f"(ratio {results['ratio']:.2f}).\n"
        f"Look at {folder / 'samples.png'}."
    )


if __name__ == "__main__":
    main()
