"""Results for people and for the Hub: a table, a line for each figure, and the metadata of a model card."""

from pathlib import Path

from huggingface_hub import EvalResult

from ..model_card import TASK

# name in the result -> (how the Hub calls it, with features of Inception; how people do; digits)
_FIGURES = {
    "frechet_distance": ("fid", "FID", 3),
    "kernel_distance": ("kid", "KID", 5),
    "inception_score": ("inception_score", "Inception Score", 2),
    "precision": ("precision", "Precision", 4),
    "recall": ("recall", "Recall", 4),
    "class_agreement": ("accuracy", "Class agreement", 4),
}
_PLAIN_NAMES = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "Kernel distance",
    "inception_score": "Score of the classifier",
}


def figures(result: dict) -> dict[str, float]:
    """The figures of a result under the names that people know, rounded."""
    return {
        name_of(name, result): round(result["metrics"][name], digits)
        for name, (_, _, digits) in _FIGURES.items()
        if name in result["metrics"]
    }


def markdown_table(results: list[dict]) -> str:
    """Results as a Markdown table, a row each, with the settings that set them apart."""
    columns = list(dict.fromkeys(name for result in results for name in figures(result)))
    settings = ["guidance_scale", "guidance_schedule", "temperature", "num_inference_steps", "num_denoising_steps"]
    used = {name for result in results for name in result["protocol"]["sampling"]}
    settings += [name for name in ("final_denoising_steps", "null_refresh_interval", "token_order") if name in used]
    header = ["weights", "solver", *settings, "images", *columns, "images/s"]
    rows = [header, ["---"] * len(header)]
    for result in results:
        protocol, found = result["protocol"], figures(result)
        row = [
            protocol["weights"] or "?",
            protocol["solver"],
            *(protocol["sampling"].get(name, "") for name in settings),
        ]
        row += [protocol["num_images"], *(found.get(name, "") for name in columns)]
        rows.append([*row, result["environment"]["images_per_second"]])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"


def eval_results(result: dict) -> list[EvalResult]:
    """The figures as metadata of a model card, each with its protocol."""
    protocol = result["protocol"]
    reference = protocol["reference"]
    name = Path(reference["source"]).name if Path(reference["source"]).exists() else reference["source"]
    about = {**TASK, "dataset_type": name, "dataset_name": name}
    if reference.get("split"):
        about |= {"dataset_split": reference["split"]}
    settings = {name: value for name, value in protocol["sampling"].items() if value is not None}
    settings |= {
        name: protocol[name] for name in ("profile", "solver", "num_images", "labels", "seed", "dtype", "extractor")
    }
    return [
        EvalResult(
            **about,
            metric_type=hub_name if _is_inception(result) or name not in _PLAIN_NAMES else name,
            metric_name=name_of(name, result),
            metric_value=round(result["metrics"][name], digits),
            metric_args=settings,
        )
        for name, (hub_name, _, digits) in _FIGURES.items()
        if name in result["metrics"]
    ]


def name_of(name: str, result: dict) -> str:
    """What people call a figure: it is FID with features of Inception alone."""
    return _FIGURES[name][1] if _is_inception(result) else _PLAIN_NAMES.get(name, _FIGURES[name][1])


def _is_inception(result: dict) -> bool:
    return result["protocol"]["extractor"].startswith("inception ")
