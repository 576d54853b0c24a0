#!/usr/bin/env python
"""How good a pipeline's images are: FID, KID, Inception Score, precision and recall, with the protocol beside them.

    accelerate launch examples/evaluate_pipeline.py --pipeline org/djepa-h --reference VIRTUAL_imagenet256_labeled.npz
    python examples/evaluate_pipeline.py --pipeline outputs/digits --config outputs/digits/sampling.yaml \\
        --reference digits --extractor classifier --classifier_data digits --num_images 1000

All processes generate; image `i` depends on the seed and on `i` alone. A run that was killed goes on when it is started
again. `result.json` holds all figures and all that they depend on, `result.md` is a table, `samples.png` shows some
images. With `--update_card true` the model card of the pipeline's folder gets the figures into its metadata.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from djepa_hf import DJEPAPipeline
from djepa_hf.arguments import SamplingArguments, option, parse_arguments
from djepa_hf.engines import start_processes
from djepa_hf.evaluation.arguments import EvaluationArguments
from djepa_hf.evaluation.extractors import CLASSIFIER
from djepa_hf.evaluation.generation import KEPT_PICTURES, label_of
from djepa_hf.evaluation.protocol import RESULT, Evaluation, Protocol, check_protocol, image_size
from djepa_hf.evaluation.real_images import extract, save_npz
from djepa_hf.evaluation.report import eval_results, figures, markdown_table
from djepa_hf.evaluation.scores import class_agreement
from djepa_hf.json_files import write_json
from djepa_hf.metrics import load_metric
from djepa_hf.model_card import add_results
from djepa_hf.visualization import labelled_grid

SHOWN_IMAGES = 10  # of each class at most


@dataclass
class OutputArguments:
    """How to draw, and what to keep."""

    labels: Literal["balanced", "random"] = option("balanced", "Classes in turn, or drawn.")
    kernel_subset_size: int | None = option(None, "Images per subset of the kernel distance; 1000 or all.")
    save_images: Literal["no", "png", "npz"] = option("no", "Keep all pictures, or write ADM's sample file, too.")
    update_card: bool = option(False, "Put the figures into the model card of the pipeline's folder.")


def show_samples(folder: Path, pipe: DJEPAPipeline, protocol: Protocol):
    """A grid of the first hundred images, a row for each class."""
    config, rows = pipe.transformer.config, {}
    for path in sorted((folder / "images").glob("*.png"))[:KEPT_PICTURES]:
        i = label_of(int(path.stem), config.num_labels, protocol.labels, protocol.seed)
        rows.setdefault(i, []).append(Image.open(path))
    named = [(config.id2label[i].split(",")[0], rows[i][:SHOWN_IMAGES]) for i in sorted(rows)]
    labelled_grid(named).save(folder / "samples.png")


def compare_with_real(args: EvaluationArguments, evaluation: Evaluation) -> dict:
    """
    What the classifier makes of real images: how many held-out ones it reads right, and how far those that it was
    trained on are from them. Generated images need not be closer than that.
    """
    pipe, extractor, reference = evaluation.pipe, evaluation.extractor, evaluation.reference
    batches = args.classifier_images().batches(*image_size(pipe), args.batch_size)
    features = extract(batches, extractor, pipe.device, "training images").features.numpy()
    frechet = load_metric("frechet_distance")
    distance = frechet.compute(predictions=features, reference=reference.distribution)
    found = {"frechet_distance_of_real_training_images": distance["frechet_distance"]}
    if reference.labels is not None:
        accuracy = class_agreement(reference.logits, reference.labels, extractor)
        found["classifier_accuracy_on_real_images"] = accuracy
    return found


def main(argv: list[str] | None = None):
    args, output, sampling = parse_arguments(
        EvaluationArguments, OutputArguments, SamplingArguments, argv=argv, description=__doc__
    )
    state, folder = start_processes(), args.folder("evaluation")
    pipe = args.load_pipeline(state.device)
    protocol = Protocol(
        num_images=args.num_images,
        sampling=sampling.call_options(pipe.transformer.config.num_tokens),
        labels=output.labels,
        seed=args.seed,
        batch_size=args.batch_size,
        kernel_subset_size=output.kernel_subset_size,
    )
    check_protocol(pipe, protocol)
    if output.update_card and not (Path(args.pipeline) / "README.md").is_file():
        raise ValueError(f"`update_card`: there is no README.md in {args.pipeline}.")
    args.reference_images().check()
    extractor = args.load_extractor(pipe)
    reference = args.load_reference(pipe, extractor, state)
    evaluation = Evaluation(pipe, args.pipeline, extractor, reference, state)
    result = evaluation.measure(folder, protocol, save_images=output.save_images != "no")
    if result is None:
        return
    show_samples(folder, pipe, protocol)
    if output.save_images == "npz":
        save_npz(folder / "images", args.num_images, folder / "samples.npz")
    if args.extractor == CLASSIFIER and "real_images" not in result:
        result["real_images"] = compare_with_real(args, evaluation)
        write_json(folder / RESULT, result)
    (folder / "result.md").write_text(markdown_table([result]))
    for name, value in figures(result).items():
        print(f"{name}: {value}")
    for name, value in result.get("real_images", {}).items():
        print(f"{name.replace('_', ' ').replace('frechet', 'Fréchet')}: {value:.4g}")
    print(f"{args.num_images} images, {result['environment']['images_per_second']} per second.")
    print(f"{folder / RESULT} holds the figures and all that they depend on; look at {folder / 'samples.png'}.")
    if output.update_card:
        add_results(Path(args.pipeline), eval_results(result))
        print(f"The card in {args.pipeline} has the figures now.")


if __name__ == "__main__":
    main()
