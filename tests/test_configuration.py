"""Sizes, presets and validation."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from djepa_hf import DJEPAConfig, DJEPAForPreTraining


@pytest.mark.parametrize(("preset", "millions"), [("base", 212), ("large", 687), ("huge", 1400)])
def test_presets_have_the_published_parameter_counts(preset, millions):
    with torch.device("meta"):
        model = DJEPAForPreTraining(DJEPAConfig.from_preset(preset))
    # the authors count the prediction head in
    head = sum(parameter.numel() for parameter in model.prediction_head.parameters())
    assert (model.djepa.num_parameters() + head) / 1e6 == pytest.approx(millions, rel=0.02)


def test_defaults_are_the_base_preset():
    assert DJEPAConfig().to_dict() == DJEPAConfig.from_preset("base").to_dict()
    assert DJEPAConfig().num_labels == 1000
    assert DJEPAConfig().num_tokens == 256


def test_presets_take_overrides_and_refuse_unknown_names():
    assert DJEPAConfig.from_preset("large", hidden_size=512).hidden_size == 512
    with pytest.raises(ValueError, match=r"`preset` must be one of base, large, huge, got 'tiny'"):
        DJEPAConfig.from_preset("tiny")
    with pytest.raises(ValueError, match="There is no option 'hiden_size'; did you mean 'hidden_size'"):
        DJEPAConfig.from_preset("base", hiden_size=512)


@pytest.mark.parametrize(
    ("sample_size", "patch_size", "grid", "token_size"),
    [(8, 2, (4, 4), 12), ((12,), 3, (4,), 9), ((4, 6, 8), (1, 2, 2), (4, 3, 4), 12), ([4, 6], 2, (2, 3), 12)],
)
def test_grids_of_any_rank(sample_size, patch_size, grid, token_size):
    config = DJEPAConfig(sample_size=sample_size, patch_size=patch_size, num_channels=3)
    assert config.grid_size == grid
    assert config.token_size == token_size


def test_predictor_follows_the_encoder_unless_told_otherwise():
    config = DJEPAConfig(hidden_size=96, num_attention_heads=6, predictor_num_hidden_layers=3)
    assert (config.predictor_hidden_size, config.predictor_num_attention_heads) == (96, 6)
    assert config.predictor_num_hidden_layers == 3


def test_reloaded_config_equals_the_saved_one(tmp_path):
    config = DJEPAConfig(sample_size=(4, 6, 8), patch_size=(1, 2, 2), id2label={0: "cat", 1: "dog"})
    config.save_pretrained(tmp_path)
    reloaded = DJEPAConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict()
    assert reloaded.id2label == {0: "cat", 1: "dog"}
    assert reloaded.label2id == {"cat": 0, "dog": 1}
    assert reloaded.num_labels == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 100}, r"`hidden_size` \(100\) must be divisible by `num_attention_heads` \(12\)"),
        ({"predictor_hidden_size": 100}, r"`predictor_hidden_size` \(100\) must be divisible"),
        ({"sample_size": 9, "patch_size": 2}, r"`sample_size` 9 must be divisible by `patch_size` 2"),
        ({"sample_size": (8, 9), "patch_size": 2}, r"`sample_size` \(8, 9\) must be divisible by `patch_size` 2"),
        ({"sample_size": (8, 8), "patch_size": (1, 2, 2)}, "must have as many axes"),
        ({"sample_size": 0}, "must be positive along every axis"),
        ({"num_channels": 0}, "`num_channels` must be positive, got 0"),
        ({"id2label": {1: "cat", 2: "dog"}}, r"The keys of `id2label` must be 0..1, got \[1, 2\]"),
        ({"num_labels": 0}, "`num_labels` must be at least 1, got 0"),
        ({"label_dropout_prob": 1.5}, r"`label_dropout_prob` must lie in \[0, 1\], got 1.5"),
        ({"mask_ratio_min": 0.0}, r"`mask_ratio_min` must lie in \(0, 1\]"),
        ({"mask_ratio_std": 0.0}, "`mask_ratio_std` must be positive"),
        ({"prediction_loss_weight": -1.0}, "`prediction_loss_weight` must not be negative"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers` must not be negative"),
    ],
)
def test_bad_sizes_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        DJEPAConfig(**options)


@pytest.mark.parametrize("options", [{"objective": "ddpm"}, {"hidden_size": "wide"}, {"qk_norm": 3}])
def test_wrong_types_are_refused_by_name(options):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(options))):
        DJEPAConfig(**options)
