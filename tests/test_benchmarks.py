"""The benchmarks run, and what they compare is the same."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from djepa_hf.arguments import parse_arguments
from djepa_hf.configuration_djepa import PRESETS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"denoiser_hidden_size": 32, "denoiser_num_hidden_layers": 1}


def benchmark(monkeypatch, name):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"{name}_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sampling(monkeypatch):
    return benchmark(monkeypatch, "sampling")


def test_quality_is_measured_against_the_reference(monkeypatch, tmp_path, capsys):
    quality = benchmark(monkeypatch, "quality")
    pipe = tiny_pipeline(id2label={i: str(i) for i in range(10)})
    pipe.save_pretrained(tmp_path / "pipe")
    kinds = {
        kind for kind, _, _ in quality.settings("diffusion", {"num_inference_steps": 16, "num_denoising_steps": 50})
    }
    assert {"reference", "ddpm", "unipc", "shrinking steps", "null class now and then", "profiles"} < kinds
    few = [("reference", "reference", {}), ("euler", "2 steps", {"solver": "euler", "num_denoising_steps": 2})]
    monkeypatch.setattr(quality, "settings", lambda *_: [*few, ("profiles", "fast", {"profile": "fast"})])
    argv = ["--pipeline", tmp_path / "pipe", "--reference", "digits", "--extractor", "classifier", "--num_images", 30]
    argv += ["--classifier_data", "digits", "--num_inference_steps", 4, "--num_denoising_steps", 8, "--seeds", 0, 1]
    argv += ["--output_dir", tmp_path / "cells", "--output_path", tmp_path / "quality.json"]
    quality.main([str(word) for word in argv])
    rows = {row["name"]: row for row in json.loads((tmp_path / "quality.json").read_text())["results"]}
    assert rows["reference"]["work"] == 1
    assert rows["reference"]["change_from_reference"] == 0
    assert rows["2 steps"]["work"] < rows["fast"]["work"] < 1
    assert rows["fast"]["frechet_distance_std"] > 0
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 500
    assert "All figures are in" in capsys.readouterr().out


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_the_plain_version_draws_the_pipelines_images(sampling, objective, guidance_scale):
    pipe = tiny_pipeline(objective=objective)
    labels, noise = torch.tensor([0, 3, 4]), torch.randn(3, 16, 4)
    order = torch.rand(3, 16).argsort(-1)
    options = {"num_inference_steps": 5, "num_denoising_steps": 4, "guidance_scale": guidance_scale}
    ours = sampling.pipeline_sample(pipe, labels, noise, order, **options)
    plain = sampling.plain_sample(pipe, labels, noise, order, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_sampling_is_measured_part_by_part(sampling, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "base", TINY)
    path = tmp_path / "out" / "sampling.json"
    argv = ["--output_path", str(path), "--rounds", "1", "--num_inference_steps", "2", "--num_denoising_steps", "4"]
    argv += ["--batch_sizes", "1", "2", "--dtypes", "float32", "bfloat16", "--profiles", "exact", "fast"]
    monkeypatch.setattr(sampling, "KL16_SIZES", {"latent_channels": 16})  # one level
    sampling.main(argv)
    report = json.loads(path.read_text())
    rows = {(row["variant"], row["dtype"], row["batch_size"]): row for row in report["results"]}
    assert len(rows) == len(report["results"]) == 12
    for row in rows.values():
        assert all(seconds > 0 for seconds in row["seconds_of_parts"].values())
        assert list(row["seconds_of_parts"]) == ["encoder", "predictor", "denoiser", "vae"]
        assert 0 <= row["utilisation"] < 1
        assert row["milliseconds_per_image"] == pytest.approx(1000 * row["seconds"] / row["batch_size"], rel=1e-3)
        if row["dtype"] == "float32" and row["variant"] == "exact":
            assert row["relative_difference_from_plain"] < 1e-4
    assert rows["plain", "float32", 1]["times_as_fast_as_plain"] == 1.0
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    assert "All figures are in" in capsys.readouterr().out


@pytest.mark.parametrize("config", sorted((BENCHMARKS / "configs").glob("sampling_*.yaml")), ids=lambda path: path.stem)
def test_configs_hold_options_that_exist(sampling, config):
    (args,) = parse_arguments(sampling.BenchmarkArguments, argv=["--config", str(config)])
    assert args.output_path.endswith(".json")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("presets", ["tiny"], r"`presets` must be in \['base', 'large', 'huge'\], got \['tiny'\]"),
        ("profiles", ["slow"], "`profile` must be one of exact, balanced, fast, got 'slow'"),
        ("batch_sizes", [0], "Batch sizes, steps and rounds must be at least 1"),
        ("dtypes", [], "`dtypes` must hold at least one value"),
    ],
)
def test_what_cannot_be_measured_is_refused(sampling, option, value, message):
    with pytest.raises(ValueError, match=message):
        sampling.BenchmarkArguments(**{option: value})
