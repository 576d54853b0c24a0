"""The benchmarks run, and what they compare is the same."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from djepa_hf.configuration_djepa import PRESETS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"denoiser_hidden_size": 32, "denoiser_num_hidden_layers": 1}


@pytest.fixture
def sampling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("sampling_benchmark", BENCHMARKS / "sampling.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sampling_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_the_plain_version_draws_the_pipelines_images(sampling, objective):
    pipe = tiny_pipeline(objective=objective)
    labels, noise = torch.tensor([0, 3, 4]), torch.randn(3, 16, 4)
    order = torch.rand(3, 16).argsort(-1)
    options = {"num_inference_steps": 5, "num_denoising_steps": 4, "guidance_scale": 2.0}
    ours = sampling.pipeline_sample(pipe, labels, noise, order, options)
    plain = sampling.plain_sample(pipe, labels, noise, order, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_sampling_is_measured_part_by_part(sampling, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "base", TINY)
    path = tmp_path / "out" / "sampling.json"
    argv = ["--output_path", str(path), "--rounds", "1", "--num_inference_steps", "2", "--num_denoising_steps", "2"]
    sampling.main([*argv, "--batch_sizes", "1", "2", "--dtypes", "float32", "bfloat16"])
    report = json.loads(path.read_text())
    settings = [(row["variant"], row["dtype"], row["batch_size"]) for row in report["results"]]
    assert len(set(settings)) == 8
    for row in report["results"]:
        assert row["seconds"]["total"] >= max(row["seconds"][part] for part in ("encoder", "predictor", "denoiser"))
        assert 0 <= row["utilisation"] < 1
        if row["dtype"] == "float32":
            assert row["relative_difference_of_images"] < 1e-4
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    assert "All figures are in" in capsys.readouterr().out
