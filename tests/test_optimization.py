"""Which weights decay, how much, and how fast the moving average follows."""

import pytest
import torch
from conftest import tiny_pretraining

from djepa_hf.optimization import ema_decay, parameter_groups, set_weight_decay


def test_only_the_transformers_matrices_decay():
    model = tiny_pretraining()
    decayed, undecayed = (group["params"] for group in parameter_groups(model))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name in (names[parameter] for parameter in decayed):
        assert name.endswith((".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight"))
        assert name.startswith(("djepa.encoder.layers.", "djepa.predictor.layers."))
    assert len(decayed) == 4 * (2 + 2)
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert set(decayed) | set(undecayed) == trainable
    assert not any(names[parameter].startswith("target.") for parameter in undecayed)


def test_weight_decay_rises_for_the_first_group_alone():
    optimizer = torch.optim.AdamW(parameter_groups(tiny_pretraining()), weight_decay=0.02)
    for progress, expected in ((0.0, 0.0), (0.5, 0.01), (1.0, 0.02)):
        set_weight_decay(optimizer, 0.02, progress)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(expected), 0.0]


def test_moving_average_warms_up():
    assert ema_decay(0.9999, 1) == pytest.approx(2 / 11)
    assert ema_decay(0.9999, 10**6) == 0.9999
    assert ema_decay(0.0, 5) == 0.0
