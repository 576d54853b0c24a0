"""Reading the authors' files: what is in them, what may be in them, and which weights are taken."""

import argparse
import logging
import os

import pytest
import torch
from conftest import GOLDEN, golden_config, tiny_config

from djepa_hf import DDPMTokenScheduler, DJEPAConfig, DJEPAPipeline, FlowMatchTokenScheduler, load_official_checkpoint


def read(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def rewrite(golden, path, change):
    """A copy of the golden checkpoint after `change` of its content."""
    checkpoint = read(golden.path)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_online_and_ema_weights_go_to_their_places(golden):
    checkpoint = read(golden.path)
    for part, key in ((golden.model.djepa, "model"), (golden.model.target, "model_ema")):
        official = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint[key].items()}
        table = part.encoder.class_embeddings.weight
        assert torch.equal(table[:-1], official["class_emb.weight"])
        assert torch.equal(table[-1:], official["fake_latent"])
        assert torch.equal(part.denoiser.layers[1].fc2.weight, official["diffloss.net.res_blocks.1.mlp.2.weight"])
    assert not torch.equal(golden.model.djepa.predictor.mask_token, golden.model.target.predictor.mask_token)
    assert not any(parameter.requires_grad for parameter in golden.model.target.parameters())
    assert all(parameter.requires_grad for parameter in golden.model.djepa.parameters())


def test_a_pipeline_takes_the_ema_weights_unless_told_otherwise(golden, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = DJEPAPipeline.from_single_file(golden.path, config=golden.config)
        assert "Taking the EMA weights" in caplog.text
        online = DJEPAPipeline.from_single_file(golden.path, config=golden.config, weights="online")
        assert "Taking the online weights" in caplog.text
    mask_token = pipe.transformer.predictor.mask_token
    assert torch.equal(mask_token, golden.model.target.predictor.mask_token)
    assert torch.equal(online.transformer.predictor.mask_token, golden.model.djepa.predictor.mask_token)
    assert mask_token.requires_grad
    assert isinstance(pipe.scheduler, FlowMatchTokenScheduler if golden.flow else DDPMTokenScheduler)
    with pytest.raises(ValueError, match="`weights` must be 'ema' or 'online', got 'raw'"):
        DJEPAPipeline.from_single_file(golden.path, config=golden.config, weights="raw")


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_files_of_compiled_and_of_plain_training_are_read(golden, tmp_path, prefix):
    def rename(checkpoint):
        for key in ("model", "model_ema"):
            checkpoint[key] = {
                prefix + name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint[key].items()
            }

    model = load_official_checkpoint(rewrite(golden, tmp_path / "a.pth", rename), config=golden.config)
    for name, tensor in golden.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_training_without_prediction_loss_is_recognized(golden, tmp_path, caplog):
    def without_head(checkpoint):
        for key in ("model", "model_ema"):
            checkpoint[key] = {name: tensor for name, tensor in checkpoint[key].items() if "jepaloss" not in name}

    config = golden_config(golden.meta["kw"], golden.config.objective)
    with caplog.at_level(logging.WARNING):
        model = load_official_checkpoint(rewrite(golden, tmp_path / "a.pth", without_head), config=config)
    assert model.prediction_head is None
    assert model.config.prediction_loss_weight == 0
    assert config.prediction_loss_weight == 1, "the caller's configuration must stay as it is"
    assert "was trained without the prediction loss" in caplog.text


def test_what_does_not_fit_is_listed(golden, tmp_path):
    def damage(checkpoint):
        model = checkpoint["model"]
        prefix = "_orig_mod." if any(name.startswith("_orig_mod.") for name in model) else ""
        del model[f"{prefix}mask_token"]
        model[f"{prefix}surplus"] = torch.zeros(1)
        model[f"{prefix}buffer"] = torch.zeros(1, 7, 32)

    path = rewrite(golden, tmp_path / "a.pth", damage)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_official_checkpoint(path, config=golden.config)
    assert "missing djepa.predictor.mask_token" in str(error.value)
    assert "unexpected djepa.surplus" in str(error.value)
    assert "djepa.encoder.buffer_tokens is (1, 7, 32), not (1, 4, 32)" in str(error.value)
    with pytest.raises(ValueError, match=r"does not fit the configuration: .* is \("):
        load_official_checkpoint(golden.path, config=tiny_config())


def test_presets_come_from_the_file_or_are_asked_for(golden, tmp_path):
    with pytest.raises(ValueError, match=r"names no known preset .*: pass `config`"):
        load_official_checkpoint(golden.path)

    def name_preset(checkpoint):
        checkpoint["args"].model = "djepa_base"

    with pytest.raises(ValueError, match=r"djepa.encoder.buffer_tokens is \(1, 4, 32\), not \(1, 64, 768\)"):
        load_official_checkpoint(rewrite(golden, tmp_path / "a.pth", name_preset))
    assert DJEPAConfig.from_preset("base").hidden_size == 768


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "model_ema": {}, "args": Payload()}, "evil.pth")
    with pytest.raises(ValueError, match="no checkpoint that can be read safely"):
        load_official_checkpoint("evil.pth")
    assert not (tmp_path / "executed").exists()


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not an official D-JEPA checkpoint: it has no entry 'model'"):
        load_official_checkpoint(tmp_path / "other.pth")
    data = (GOLDEN / "official_flow.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is not a complete PyTorch file"):
        load_official_checkpoint(tmp_path / "half.pth")
    with pytest.raises(FileNotFoundError):
        load_official_checkpoint(tmp_path / "nowhere.pth")
