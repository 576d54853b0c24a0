"""The ablation: equal but for the prediction loss, measured alike, and resumed where it was."""

import json
from types import SimpleNamespace

import ablation
import pytest
import torch
import train
from conftest import tiny_model
from PIL import Image
from test_training import DIGITS, command_line


@pytest.fixture
def in_process(monkeypatch):
    """Trains here instead of in a process of its own; counts the runs."""
    calls = []

    def run(argv, check):
        calls.append(argv)
        train.main([*command_line(argv[argv.index("--output_dir") + 1]), *argv[2:]])

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    return calls


def losses_of(folder):
    return torch.load(folder / "checkpoint-4" / "custom_checkpoint_0.pkl", weights_only=True)["losses"]


def test_with_and_without_are_measured_alike(in_process, tmp_path):
    options = {**DIGITS, "max_train_steps": 4, "evaluations": 2, "num_images": 24, "timestep_spacing": "leading"}
    options |= {"reference": "digits", "classifier_data": "digits", "diffusion_denoising_steps": 2}
    options = {name: value for name, value in options.items() if name != "objective"}
    argv = [*command_line(tmp_path, **options), "--seeds", "3"]
    ablation.main(argv)
    found = json.loads((tmp_path / "ablation.json").read_text())
    names = {(run["objective"], run["prediction_loss_weight"], run["seed"]) for run in found["runs"]}
    assert names == {(o, w, 3) for o in ("flow_matching", "diffusion") for w in (0.0, 1.0)}
    for run in found["runs"]:
        assert [entry["step"] for entry in run["measurements"]] == [2, 4]
        assert all(entry[name] >= 0 for entry in run["measurements"] for name in ablation.FIGURES)
    assert found["judge_accuracy_on_real_images"] > 0.95
    assert found["probes_of_pixels"]["linear_probe"] > 0.9
    with_it, without = (losses_of(tmp_path / f"flow_matching_{weight}_3") for weight in (1, 0))
    assert with_it["diffusion_loss"][0] == without["diffusion_loss"][0], "the same start, data and draws"
    assert with_it["diffusion_loss"][3] != without["diffusion_loss"][3]
    assert without["prediction_loss"] == [0.0] * 4
    assert (tmp_path / "ablation.md").read_text().count("|\n") == 7
    with Image.open(tmp_path / "ablation.png") as picture:
        assert picture.width > 1000
    assert len(in_process) == 4
    ablation.main(argv)
    assert len(in_process) == 4, "nothing is trained twice"
    with pytest.raises(ValueError, match=r"holds a run with other options \(learning_rate\): remove it first"):
        ablation.main([*argv, "--learning_rate", "0.5"])
    ablation.main([*argv, "--prediction_loss_weights", "0.5", "--objectives", "flow_matching"])
    assert len(in_process) == 5
    assert "| flow matching | 0.5 | 1 |" in (tmp_path / "ablation.md").read_text()


def test_probes_see_images_without_their_class():
    model = tiny_model()
    images = torch.rand(5, 1, 8, 8)
    features = ablation.pooled_features(model, images)
    assert features.shape == (5, 32)
    tokens = model.patchify(images * 2 - 1)
    null = torch.full((5,), model.config.num_labels)
    torch.testing.assert_close(features, model.encode(tokens, null)[:, model.config.num_buffer_tokens :].mean(1))


def test_probes_are_those_of_separable_classes():
    labels = torch.arange(200) % 4
    features = torch.nn.functional.one_hot(labels, 4) + 0.1 * torch.randn(200, 4)
    scores = ablation.probe((features[:100], labels[:100]), (features[100:], labels[100:]))
    assert scores == {"linear_probe": 1.0, "nearest_neighbours": 1.0}


def test_bad_options(tmp_path):
    options = {**DIGITS, "reference": "digits", "classifier_data": "digits", "max_train_steps": 5}
    with pytest.raises(ValueError, match=r"must be a multiple of `evaluations` \(4\), got 5"):
        ablation.main(command_line(tmp_path, **options))
    other = {**options, "max_train_steps": 4, "reference": tmp_path / "nothing"}
    with pytest.raises((ValueError, FileNotFoundError), match="nothing"):
        ablation.main(command_line(tmp_path, **other))
    with pytest.raises(ValueError, match="`reference` and `classifier_data` say what to measure with"):
        ablation.main(command_line(tmp_path, **DIGITS))
