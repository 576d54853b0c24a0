"""Model cards: metadata that the Hub understands, figures with their source, and code that runs."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_pipeline, tiny_vae
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image

from djepa_hf import DJEPAConfig, DJEPAModel, DJEPAPipeline
from djepa_hf.model_card import TASK, add_results, create_model_card, published_results, renamed
from djepa_hf.schedulers import token_scheduler_for

FOLDER = Path(__file__).parents[1] / "model_cards"
PUBLISHED = ("base", "large", "huge")


def load(name: str) -> ModelCard:
    return ModelCard((FOLDER / f"{name}.md").read_text())


@pytest.mark.parametrize("preset", PUBLISHED)
def test_cards_in_the_repository_are_what_the_template_gives(preset, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import render

    assert render.published_card(preset).content.strip() == (FOLDER / f"djepa-{preset}.md").read_text().strip()


@pytest.mark.parametrize("name", [*(f"djepa-{preset}" for preset in PUBLISHED), "djepa-digits"])
def test_metadata_is_valid(name):
    data = load(name).data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert "djepa" in data.tags
    assert data.model_name == name
    assert data.eval_results, "figures must survive the way through the Hub's format"
    assert eval_results_to_model_index(name, data.eval_results)[0]["name"] == name
    sources = {result.source_name for result in data.eval_results}
    assert sources == {None if name == "djepa-digits" else "published by the authors"}
    assert ("measured here" in load(name).text) == (name == "djepa-digits")


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("base", [3.40, 197.1, 0.77, 0.61]),
        ("large", [2.32, 233.5, 0.79, 0.61, 1.58]),
        ("huge", [2.04, 239.3, 0.79, 0.62, 1.54]),
    ],
)
def test_published_figures_stand_in_text_and_metadata(preset, expected):
    card = load(f"djepa-{preset}")
    assert [result.metric_value for result in card.data.eval_results] == expected
    rows = re.findall(
        r"^\| (?:FID|Inception Score|Precision|Recall) \| ([\d.]+) .*published by the authors", card.text, re.M
    )
    assert [float(row) for row in rows] == expected
    assert published_results(preset, "online") == [], "the figures hold for the moving average alone"


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


@pytest.mark.parametrize("name", [*(f"djepa-{preset}" for preset in PUBLISHED), "djepa-digits"])
def test_code_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "djepa-digits":
        pipe = tiny_pipeline(id2label={i: str(i) for i in range(10)})
    else:
        config = DJEPAConfig.from_preset("base")
        sizes = {"sample_size": 8, "patch_size": 1, "num_channels": 4, "id2label": config.id2label}
        pipe = tiny_pipeline(tiny_vae(4), **sizes)
    pipe.save_pretrained(f"your-org/{name}", self_contained=True)
    first, *rest = snippets(load(name))
    exec(
        first.replace("generator=", "num_denoising_steps=1,\n    generator=") if "denoising" not in first else first, {}
    )
    with Image.open("sample.png") as picture:
        assert picture.width >= 8
    assert len(rest) == (name != "djepa-digits")
    assert all(f'"your-org/{name}", trust_remote_code=True' in snippet for snippet in rest)


def test_a_card_comes_from_the_models_own_configuration():
    pipe = DJEPAPipeline(
        tiny_model(weights="online", objective="diffusion"), tiny_pipeline(objective="diffusion").scheduler
    )
    result = EvalResult(**TASK, dataset_type="x", dataset_name="X", metric_type="fid", metric_value=1.5)
    card = create_model_card(
        pipe,
        "me/model",
        training="On mine.",
        eval_results=[result],
        license="mit",
        datasets=["me/data"],
        base_model="a/b",
    )
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["me/data"], "a/b")
    for text in (
        f"| parameters | {pipe.transformer.num_parameters():,} |",
        "| weights | online (not the moving average) |",
        "| works on | pixels, 8 x 8 |",
        "| tokens | 16 (4 x 4) of 4 numbers |",
        "On mine.",
        "| fid | 1.5 | X |  | measured here |",
        '"tench", "goldfish", "great_white shark"',
    ):
        assert text in card.text
    assert "unknown whether" in create_model_card(tiny_pipeline(), "me/model").text
    latents = create_model_card(tiny_pipeline(num_channels=4, sample_size=4, patch_size=1), "me/model")
    assert 'output_type="latent"' in latents.text


def test_new_figures_take_the_place_of_old_ones(tmp_path):
    def result(value, steps):
        about = {"dataset_type": "x", "dataset_name": "X", "metric_type": "fid", "metric_name": "FID"}
        return EvalResult(**TASK, **about, metric_value=value, metric_args={"steps": steps})

    add_results(tmp_path, [result(3.0, 8)])
    assert not (tmp_path / "README.md").exists()
    create_model_card(tiny_pipeline(), "me/model").save(tmp_path / "README.md")
    add_results(tmp_path, [result(3.0, 8), result(2.0, 16)])
    add_results(tmp_path, [result(1.0, 16)])
    card = ModelCard.load(tmp_path / "README.md")
    assert sorted(one.metric_value for one in card.data.eval_results) == [1.0, 3.0]
    assert card.text.count("| FID |") == 2
    assert "None yet" not in card.text
    assert "## Limits and bias" in card.text


def test_snippets_follow_a_card_to_its_repository():
    card = renamed(create_model_card(tiny_pipeline(), "here/first", self_contained=True), "there/second")
    assert card.text.count('from_pretrained("there/second"') == 2
    assert (card.data.model_name, "\n# second\n" in card.text) == ("second", True)
    assert "here/first" not in card.text
    card.data.model_name = "A name of its own"
    assert renamed(card, "there/third").data.model_name == "A name of its own"


def test_snippets_call_what_can_be_called():
    twins = {0: "crane, bird", 1: "crane, machine"}
    card = create_model_card(tiny_pipeline(id2label=twins), "me/cranes")
    assert "pipe(\n    1,\n" in card.text
    sound = create_model_card(tiny_pipeline(sample_size=(16,), patch_size=1, num_channels=1), "me/sound")
    assert "samples of 1 channels" in sound.text
    assert 'output_type="latent"' in sound.text


@pytest.mark.parametrize("options", [{}, {"num_labels": 10}, {"objective": "flow_matching"}, {"sample_size": 8}])
def test_the_authors_figures_go_to_their_models_alone(options):
    with torch.device("meta"):
        model = DJEPAModel(DJEPAConfig.from_preset("base", **options))
    pipe = DJEPAPipeline(model, token_scheduler_for(model.config.objective))
    if options:
        with pytest.raises(ValueError, match="the authors' base model has another size"):
            create_model_card(pipe, "me/model", published="base")
    else:
        assert create_model_card(pipe, "me/model", published="base").data.license == "other"
    with pytest.raises(ValueError, match="the authors' tiny model"):
        create_model_card(pipe, "me/model", published="tiny")
