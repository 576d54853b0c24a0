#!/usr/bin/env python
"""What the prediction loss brings: the same training with and without it, for both objectives and several seeds.

    python examples/ablation.py --config examples/configs/digits.yaml --timestep_spacing leading \\
        --reference digits --classifier_data digits --output_dir outputs/ablation_digits

Options are those of train.py, which does the training, and a few more. Budgets are equal: with a weight of 0 there is
neither a prediction head nor a target forward, and everything else, data and draws included, is the same. A few times
over training the moving average is sampled from and measured, and its context encoder's features of real images,
mean-pooled over all tokens and without a class, go through a linear probe and a nearest-neighbour classifier. A run
that was killed goes on when it is started again.

Writes `ablation.json`, `ablation.md` and `ablation.png`.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from djepa_hf import DJEPAConfig, DJEPAModel, DJEPAPipeline
from djepa_hf.arguments import (
    DataArguments,
    ModelArguments,
    SamplingArguments,
    TrainingArguments,
    option,
    parse_arguments,
)
from djepa_hf.engines import start_processes
from djepa_hf.evaluation.extractors import ClassifierExtractor
from djepa_hf.evaluation.protocol import Evaluation, Protocol
from djepa_hf.evaluation.real_images import RealImages, Reference, load_reference
from djepa_hf.evaluation.scores import class_agreement
from djepa_hf.json_files import write_json
from djepa_hf.schedulers import token_scheduler_for
from djepa_hf.training_data import load_training_samples

TRAIN = Path(__file__).with_name("train.py")
NEIGHBOURS = 20
FIGURES = {
    "class_agreement": "class agreement",
    "frechet_distance": "Fréchet distance",
    "linear_probe": "linear probe",
    "nearest_neighbours": f"{NEIGHBOURS} nearest neighbours",
}


@dataclass
class AblationArguments:
    """What to compare, and how to measure it."""

    reference: str = option(None, "Held-out real images: 'digits', a data set or a folder of class folders.")
    reference_split: str = option("test", "Of a data set.")
    classifier_data: str = option(None, "Real images to train the judge and the probes on, as `reference`.")
    classifier_split: str = option("train", "Of that data set.")
    objectives: list[str] = option(["flow_matching", "diffusion"], "Which.")
    prediction_loss_weights: list[float] = option([0.0, 1.0], "Which.")
    seeds: list[int] = option([0, 1, 2], "Which.")
    evaluations: int = option(4, "How often a run is measured, at equal distances.")
    num_images: int = option(500, "Images generated each time.")
    diffusion_denoising_steps: int = option(50, "Denoising steps of the diffusion objective, which needs more of them.")


@dataclass
class RealData:
    """
    Real images in [0, 1] and their classes, who judges generated ones by them, and what they are measured against.

    Args:
        train, test (`tuple`): images `(n, channels, height, width)` and labels `(n,)`.
        judge ([`ClassifierExtractor`]): trained on the former.
        reference ([`Reference`]): the latter, in the judge's features.
    """

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    judge: ClassifierExtractor
    reference: Reference

    def judge_accuracy(self) -> float:
        """How many of the held-out images the judge reads right."""
        return class_agreement(self.reference.logits, self.reference.labels, self.judge)


def load_real_data(args: AblationArguments, data_args: DataArguments, device: torch.device) -> RealData:
    """
    The images that judge and probes learn from, and those held out.

    Raises:
        ValueError: if there are none, they have no classes, or not the same ones.
    """
    columns = {"image_column": data_args.image_column, "label_column": data_args.label_column, "needs_classes": True}
    sources = [
        RealImages(args.classifier_data, args.classifier_split, **columns),
        RealImages(args.reference, args.reference_split, **columns),
    ]
    names = [source.open().names for source in sources]
    if names[0] != names[1]:
        raise ValueError(f"`classifier_data` and `reference` have other classes: {names[0]} and {names[1]}.")
    data = load_training_samples(data_args, None, 0)
    if data.names != names[0]:
        raise ValueError(f"The training data and `classifier_data` have other classes: {data.names} and {names[0]}.")
    parts = []
    for source in sources:
        images, labels = source.load(data_args.image_size, data.channels)
        parts.append((images.float() / 255, labels))
    judge = ClassifierExtractor(*parts[0]).to(device)
    reference = load_reference(sources[1], judge, data_args.image_size, data.channels, device=device)
    return RealData(*parts, judge, reference)


@torch.no_grad()
def pooled_features(model: DJEPAModel, images: torch.Tensor) -> torch.Tensor:
    """Features of all tokens of images in [0, 1] by a context encoder that sees everything but the class, `(n, D)`."""
    features = []
    for part in (images * 2 - 1).split(256):
        encoded = model.encode(model.patchify(part.to(model.device)))
        features.append(encoded[:, model.config.num_buffer_tokens :].mean(1).cpu())
    return torch.cat(features)


def probe(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Accuracy on held-out features of a linear and of a nearest-neighbour classifier."""
    probes = {
        "linear_probe": LogisticRegression(max_iter=2000),
        "nearest_neighbours": KNeighborsClassifier(NEIGHBOURS),
    }
    scores = {}
    for name, classifier in probes.items():
        fitted = make_pipeline(StandardScaler(), classifier).fit(train[0].numpy(), train[1].numpy())
        scores[name] = float(fitted.score(test[0].numpy(), test[1].numpy()))
    return scores


def train(options: dict, output_dir: Path, steps: int, every: int):
    """
    A run of train.py, from its latest checkpoint if there is one.

    Raises:
        ValueError: if the folder holds a run with other options.
    """
    options = {**options, "output_dir": str(output_dir), "checkpointing_steps": every}
    path = output_dir / "options.json"
    if path.is_file() and (earlier := json.loads(path.read_text())) != options:
        differing = [name for name in options if earlier.get(name) != options[name]]
        raise ValueError(f"{output_dir} holds a run with other options ({', '.join(differing)}): remove it first.")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, options)
    if (output_dir / f"checkpoint-{steps}").is_dir():
        return
    argv = [sys.executable, str(TRAIN)]
    for name, value in {**options, "resume_from_checkpoint": "latest"}.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    subprocess.run(argv, check=True)


def measure_checkpoint(checkpoint: Path, folder: Path, real: RealData, protocol: Protocol, spacing: str) -> dict:
    """Quality of samples and of features of one checkpoint's moving average."""
    state = start_processes()
    model = DJEPAModel.from_pretrained(checkpoint).to(state.device).eval()
    objective = model.config.objective
    options = {"timestep_spacing": spacing} if objective == "diffusion" else {}
    pipe = DJEPAPipeline(model, token_scheduler_for(objective, **options))
    evaluation = Evaluation(pipe, str(checkpoint), real.judge, real.reference, state)
    result = evaluation.measure(folder, protocol, title=f"{folder.parent.name}, {checkpoint.name}")
    features = [(pooled_features(model, images), labels) for images, labels in (real.train, real.test)]
    quality = {name: result["metrics"][name] for name in ("class_agreement", "frechet_distance")}
    return quality | probe(*features)


def spread(values: list[float]) -> str:
    """Mean and standard deviation, for a table."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def table(runs: list[dict], pixels: dict[str, float]) -> str:
    """The last measurement of every setting, mean and standard deviation over seeds, as Markdown."""
    rows = [f"| objective | prediction loss | seeds | {' | '.join(FIGURES.values())} |", "|---" * 7 + "|"]
    for objective, weight in dict.fromkeys((run["objective"], run["prediction_loss_weight"]) for run in runs):
        group = [run for run in runs if (run["objective"], run["prediction_loss_weight"]) == (objective, weight)]
        last = [run["measurements"][-1] for run in group]
        cells = [spread([entry[name] for entry in last]) for name in FIGURES]
        rows.append(f"| {objective.replace('_', ' ')} | {name_of(weight)} | {len(group)} | {' | '.join(cells)} |")
    cells = [f"{pixels[name]:.3f}" if name in pixels else "" for name in FIGURES]
    rows.append(f"| (pixels) | | | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def name_of(weight: float) -> str:
    """Of a weight of the prediction loss."""
    return {0.0: "without", 1.0: "with"}.get(weight, f"{weight:g}")


def plot(runs: list[dict], path: Path, title: str):
    """Every figure over training, mean and spread over seeds; a row for each objective."""
    from matplotlib.figure import Figure

    objectives = list(dict.fromkeys(run["objective"] for run in runs))
    weights = sorted({run["prediction_loss_weight"] for run in runs})
    figure = Figure(figsize=(3.4 * len(FIGURES), 2.9 * len(objectives)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(objectives), len(FIGURES), squeeze=False)
    for row, objective in zip(grid, objectives, strict=True):
        for axes, (name, label) in zip(row, FIGURES.items(), strict=True):
            for weight, colour in zip(weights, ("tab:orange", "tab:blue", "tab:green", "tab:red"), strict=False):
                group = [r for r in runs if (r["objective"], r["prediction_loss_weight"]) == (objective, weight)]
                if not group:
                    continue
                steps = [entry["step"] for entry in group[0]["measurements"]]
                values = torch.tensor([[entry[name] for entry in run["measurements"]] for run in group])
                mean, low, high = values.mean(0), values.min(0).values, values.max(0).values
                axes.plot(steps, mean, marker="o", markersize=3, color=colour, label=name_of(weight))
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(title=f"{label}, {objective.replace('_', ' ')}", xlabel="optimizer step")
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3)
            if name == "frechet_distance":
                axes.set_yscale("log")
        row[0].legend(title="prediction loss", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None):
    kinds = (ModelArguments, DataArguments, TrainingArguments, SamplingArguments, AblationArguments)
    *training, sampling, args = parse_arguments(*kinds, argv=argv, description=__doc__)
    _, data_args, train_args = training
    if args.reference is None or args.classifier_data is None:
        raise ValueError("`reference` and `classifier_data` say what to measure with: pass both.")
    if data_args.pretrained_vae_model_name_or_path is not None:
        raise ValueError("The ablation compares models of pixels: leave `pretrained_vae_model_name_or_path` out.")
    steps, evaluations = train_args.max_train_steps, args.evaluations
    if evaluations < 1 or steps is None or steps % evaluations:
        raise ValueError(f"`max_train_steps` must be a multiple of `evaluations` ({evaluations}), got {steps}.")
    every, output_dir = steps // evaluations, Path(train_args.output_dir)
    given = {name: value for part in (*training, sampling) for name, value in asdict(part).items()}
    given |= dict.fromkeys(("validation_steps", "report_to", "checkpoints_total_limit", "resume_from_checkpoint"))
    real = load_real_data(args, data_args, start_processes().device)
    pixels = probe(*((images.flatten(1), labels) for images, labels in (real.train, real.test)))
    about = {"judge_accuracy_on_real_images": real.judge_accuracy(), "probes_of_pixels": pixels}
    runs = []
    for seed in args.seeds:  # the outer loop, so that what there is can be compared early
        for objective in args.objectives:
            for weight in args.prediction_loss_weights:
                folder = output_dir / f"{objective}_{weight:g}_{seed}"
                varied = {"seed": seed, "objective": objective, "prediction_loss_weight": weight}
                train(given | varied, folder, steps, every)
                measurements = []
                for step in range(every, steps + 1, every):
                    checkpoint = folder / f"checkpoint-{step}"
                    options = sampling.call_options(DJEPAConfig.from_pretrained(checkpoint).num_tokens)
                    if objective == "diffusion":
                        options["num_denoising_steps"] = args.diffusion_denoising_steps
                    protocol = Protocol(num_images=args.num_images, sampling=options, seed=seed)
                    place = folder / f"evaluation-{step}"
                    found = measure_checkpoint(checkpoint, place, real, protocol, train_args.timestep_spacing)
                    measurements.append({"step": step, **found})
                runs.append({**varied, "measurements": measurements})
                write_json(output_dir / "ablation.json", {**about, "options": given, "runs": runs})
                (output_dir / "ablation.md").write_text(table(runs, pixels))
                plot(runs, output_dir / "ablation.png", f"with and without prediction loss, {args.reference}")
                print(table(runs, pixels))


if __name__ == "__main__":
    main()
