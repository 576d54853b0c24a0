"""Model cards: what a published pipeline says of itself."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_djepa import PRESETS, DJEPAConfig
from .conversion.sizes import preset_name
from .imagenet_classes import IMAGENET_CLASSES
from .labels import find_label_id
from .latents import vae_stride

TASK = {"task_type": "unconditional-image-generation", "task_name": "Class-conditional image generation"}
IMAGENET = {"dataset_type": "ILSVRC/imagenet-1k", "dataset_name": "ImageNet 256x256"}
PUBLISHED = {"source_name": "published by the authors", "source_url": "https://arxiv.org/abs/2410.03755"}

# Paper, Tables 1 and 2. The settings stand beside each figure, because FID means little without them.
_PUBLISHED_FIGURES = {
    "base": {"epochs": 1400, "fid": 3.40, "inception_score": 197.1, "precision": 0.77, "recall": 0.61},
    "large": {"epochs": 480, "fid": 2.32, "inception_score": 233.5, "precision": 0.79, "recall": 0.61},
    "huge": {"epochs": 320, "fid": 2.04, "inception_score": 239.3, "precision": 0.79, "recall": 0.62},
}
_PUBLISHED_GUIDED_FID = {"large": (1.58, 3.0), "huge": (1.54, 3.9)}
_METRIC_NAMES = {"fid": "FID", "inception_score": "Inception Score", "precision": "Precision", "recall": "Recall"}

_FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
_LOADED_FROM = re.compile(r'Pipeline\.from_pretrained\("([^"]+)"')


def create_model_card(
    pipe: DiffusionPipeline,
    repo_id: str,
    training: str | None = None,
    eval_results: Iterable[EvalResult] = (),
    sampling: dict[str, Any] | None = None,
    self_contained: bool = False,
    license: str | None = None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    published: str | None = None,
) -> ModelCard:
    """
    The card of a pipeline, from its own configuration and what is known besides.

    Args:
        pipe ([`DJEPAPipeline`]): to describe.
        repo_id (`str`): from where it will be loaded.
        training (`str`, *optional*): data and recipe, in Markdown.
        eval_results (iterable of [`~huggingface_hub.EvalResult`], *optional*): figures. Those with a `source_name` are
            its, the others are called "measured here".
        sampling (`dict`, *optional*): arguments of the call that suit the model best.
        self_contained (`bool`, defaults to `False`): whether the folder brings its own code.
        license (`str`, *optional*): the weights', as the Hub writes it.
        datasets (`list[str]`, *optional*): ids of the training data on the Hub.
        base_model (`str`, *optional*): id of the model that this one was trained from.
        published (`str`, *optional*): the preset, where these are the authors' own weights: fills in the paper's recipe
            and figures.

    Raises:
        ValueError: if the authors published no model like this one.
    """
    config: DJEPAConfig = pipe.transformer.config
    if published is not None and not _is_published(config, published):
        raise ValueError(f"`published`: the authors' {published} model has another size, objective or other classes.")
    name = _last_part(repo_id)
    eval_results = [*(published_results(published, config.weights) if published else []), *eval_results]
    sampling = sampling or {"num_inference_steps": min(64, config.num_tokens)}
    names = [_name_of(i, config.id2label) for i in dict.fromkeys([0, config.num_labels // 5, config.num_labels // 2])]
    data = ModelCardData(
        model_name=name,
        license="other" if published else license,
        license_name="see-the-authors-release" if published else None,
        library_name="diffusers",
        pipeline_tag=TASK["task_type"],
        tags=["djepa", "class-conditional", "masked-autoregressive", config.objective.replace("_", "-")],
        datasets=[IMAGENET["dataset_type"]] if published else datasets,
        base_model=base_model,
        eval_results=eval_results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        model_name=name,
        repo_id=repo_id,
        facts=_facts(pipe),
        call=[json.dumps(names[-1]), *(f"{option}={json.dumps(value)}" for option, value in sampling.items())],
        makes_pictures=_makes_pictures(pipe),
        self_contained=self_contained,
        example_names=", ".join(map(json.dumps, names)),
        training=training,
        published_epochs=_PUBLISHED_FIGURES[published]["epochs"] if published else None,
        figures=figures_table(eval_results),
        is_imagenet=list(config.id2label.values()) == IMAGENET_CLASSES,
    )


def create_lora_card(
    repo_id: str,
    base: str,
    class_names: list[str],
    example: str,
    training: str,
    sampling: dict[str, Any],
    base_is_on_hub: bool,
) -> ModelCard:
    """
    The card of a LoRA adapter.

    Args:
        repo_id (`str`): from where it will be loaded.
        base (`str`): the pipeline that it belongs to.
        class_names (`list[str]`): of the classes that it brings.
        example (`str`): a class to show.
        training (`str`): data and recipe, in Markdown.
        sampling (`dict`): arguments of the call that suit it best.
        base_is_on_hub (`bool`): whether `base` is an id.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK["task_type"],
        tags=["djepa", "lora"],
        base_model=base if base_is_on_hub else None,
    )
    options = "".join(f"    {name}={json.dumps(value)},\n" for name, value in sampling.items())
    load = "from_single_file" if base.endswith((".pth", ".pt", ".ckpt")) else "from_pretrained"
    classes = ", ".join(class_names)
    brings = f"It brings the classes {classes}; all others keep their embeddings." if class_names else ""
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {_last_part(repo_id)}

A LoRA adapter for the D-JEPA pipeline `{base}`, in the implementation of `djepa_hf`. {brings}

```python
from djepa_hf import DJEPAPipeline

pipe = DJEPAPipeline.{load}({json.dumps(base)})
pipe.load_lora_weights({json.dumps(repo_id)})
image = pipe(
    {json.dumps(example)},
{options}).images[0]
```

![Samples](previews/final.png)

## Training

{training}
"""
    )


def figures_table(eval_results: list[EvalResult]) -> str:
    """The results as a Markdown table, each with its settings and its source."""
    if not eval_results:
        return "None yet."
    rows = ["| metric | value | data | settings | source |", "|---|---|---|---|---|"]
    for result in eval_results:
        settings = ", ".join(f"{name} {value}" for name, value in (result.metric_args or {}).items())
        source = f"[{result.source_name}]({result.source_url})" if result.source_name else "measured here"
        metric = result.metric_name or result.metric_type
        rows.append(f"| {metric} | {result.metric_value} | {result.dataset_name} | {settings} | {source} |")
    return "\n".join(rows)


def published_results(preset: str, weights: str | None = "ema") -> list[EvalResult]:
    """
    The paper's figures for one of the published models. They hold for the EMA weights alone.

    Args:
        preset (`str`): `"base"`, `"large"` or `"huge"`.
        weights (`str`, defaults to `"ema"`): which copy it is; there are no figures for the other.
    """
    if weights != "ema":
        return []
    unguided = {"guidance_scale": 1.0, "temperature": 0.94}
    figures = [(metric, _PUBLISHED_FIGURES[preset][metric], unguided) for metric in _METRIC_NAMES]
    if preset in _PUBLISHED_GUIDED_FID:
        value, scale = _PUBLISHED_GUIDED_FID[preset]
        figures.append(("fid", value, {"guidance_scale": scale, "temperature": 0.98}))
    return [
        EvalResult(
            **TASK,
            **IMAGENET,
            **PUBLISHED,
            metric_type=metric,
            metric_name=_METRIC_NAMES[metric],
            metric_value=value,
            metric_args=settings,
        )
        for metric, value, settings in figures
    ]


def add_results(folder: Path, eval_results: list[EvalResult]):
    """
    Puts figures into the card of a pipeline folder, in place of earlier ones of the same metric and settings.

    Args:
        folder (`Path`): of a pipeline; without a `README.md` nothing happens.
        eval_results (list of [`~huggingface_hub.EvalResult`]): new figures.
    """
    if not (folder / "README.md").exists():
        return
    card = ModelCard.load(folder / "README.md")
    kept = [
        old for old in card.data.eval_results or [] if not any(old.is_equal_except_value(new) for new in eval_results)
    ]
    card.data.eval_results = [*kept, *eval_results]
    card.data.model_name = card.data.model_name or folder.name
    card.text = _FIGURES.sub(lambda _: figures_table(card.data.eval_results) + "\n", card.text)
    card.save(folder / "README.md")


def renamed(card: ModelCard, repo_id: str) -> ModelCard:
    """A copy for another place: the snippets that loaded from the old one load from there, and the title follows."""
    card = ModelCard(card.content)
    old = [place for place in _LOADED_FROM.findall(card.text) if _last_part(place) == card.data.model_name]
    if old:
        card.text = card.text.replace(f'from_pretrained("{old[0]}"', f'from_pretrained("{repo_id}"')
        card.text = card.text.replace(f"\n# {card.data.model_name}\n", f"\n# {_last_part(repo_id)}\n", 1)
        card.data.model_name = _last_part(repo_id)
    return card


def _last_part(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _is_published(config: DJEPAConfig, preset: str) -> bool:
    is_imagenet = list(config.id2label.values()) == IMAGENET_CLASSES
    return preset in PRESETS and preset_name(config) == preset and config.objective == "diffusion" and is_imagenet


def _name_of(i: int, id2label: dict[int, str]) -> str | int:
    """The usual name of a class; its id where several classes have that name."""
    name = id2label[i].split(",")[0].strip()
    try:
        return name if find_label_id(name, id2label) == i else i
    except ValueError:
        return i


def _makes_pictures(pipe: DiffusionPipeline) -> bool:
    config = pipe.transformer.config
    return pipe.vae is not None or (len(config.sample_shape) == 2 and config.num_channels in (1, 3))


def _facts(pipe: DiffusionPipeline) -> dict[str, str]:
    config: DJEPAConfig = pipe.transformer.config
    grid, sample = (" x ".join(map(str, shape)) for shape in (config.grid_size, config.sample_shape))
    space = f"{'pixels' if _makes_pictures(pipe) else f'samples of {config.num_channels} channels'}, {sample}"
    if pipe.vae is not None:
        size = " x ".join(str(side * vae_stride(pipe.vae)) for side in config.sample_shape)
        space = f"images of {size} pixels, as latents of {config.num_channels} channels, {sample}, scaled by "
        space += f"{pipe.vae.config.scaling_factor}"
    elif config.latent_scaling_factor is not None:
        space = f"latents of {config.num_channels} channels, {sample}, scaled by {config.latent_scaling_factor}"
    copies = {"ema": "EMA (the moving average over training)", "online": "online (not the moving average)"}
    return {
        "parameters": f"{pipe.transformer.num_parameters():,}",
        "weights": copies.get(config.weights, "unknown whether EMA or online"),
        "works on": space,
        "tokens": f"{config.num_tokens} ({grid}) of {config.token_size} numbers",
        "context encoder": f"{config.num_hidden_layers} layers, width {config.hidden_size}",
        "feature predictor": f"{config.predictor_num_hidden_layers} layers, width {config.predictor_hidden_size}",
        "denoising MLP": f"{config.denoiser_num_hidden_layers} blocks, width {config.denoiser_hidden_size}",
        "objective": config.objective.replace("_", " "),
        "classes": f"{config.num_labels:,}",
    }
