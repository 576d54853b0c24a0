"""The networks and both models: exactness, masking, losses, the moving average, saving and loading."""

import logging

import pytest
import torch
from conftest import golden_config, relative_error, tiny_config, tiny_model, tiny_pretraining
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAModel
from djepa_hf.draws import draw_training
from djepa_hf.masking import gather_tokens, random_token_order
from djepa_hf.networks import TimeEmbeddingLinear, ZeroInitLinear
from djepa_hf.schedulers import token_scheduler_for

LIMIT = 2e-5


def half_masked(batch_size: int = 2, num_tokens: int = 16, hidden: int = 8) -> torch.Tensor:
    order = random_token_order(batch_size, num_tokens)
    return torch.ones(batch_size, num_tokens, dtype=torch.bool).scatter(1, order[:, hidden:], False)


# --- exact against the official algorithm


def test_tokens_equal_the_official_ones(golden):
    tokens = golden.model.djepa.patchify(golden.tensors["sample"])
    assert torch.equal(tokens, golden.tensors["tokens"])
    assert torch.equal(golden.model.djepa.unpatchify(tokens), golden.tensors["unpatchified"])


@torch.no_grad()
def test_features_equal_the_official_ones(golden):
    labels, mask = golden.tensors["class_labels"], golden.tensors["mask"].bool()
    model, tokens = golden.model.djepa, golden.tensors["tokens"]
    context_features = model.encode(tokens, labels, mask)
    assert relative_error(context_features, golden.tensors["context_features"]) < LIMIT
    assert relative_error(model.predict(context_features, mask), golden.tensors["conditioning"]) < LIMIT
    targets = golden.model.target.encode(tokens, labels)[:, golden.config.num_buffer_tokens :]
    assert relative_error(targets, golden.tensors["target_features"]) < LIMIT


@torch.no_grad()
def test_losses_equal_the_official_ones(golden):
    gold, shape = golden.tensors, golden.tensors["mask"].shape
    prefix = "flow" if golden.flow else "diffusion"
    output = golden.model.eval()(
        gold["sample"],
        gold["class_labels"],
        mask=gold["mask"].bool(),
        timesteps=gold[f"{prefix}_t"].reshape(shape),
        noise=gold[f"{prefix}_noise"].reshape(*shape, -1),
    )
    assert relative_error(output.diffusion_loss, gold["diffusion_loss"]) < LIMIT
    assert relative_error(output.prediction_loss, gold["prediction_loss"]) < LIMIT
    assert output.loss == output.diffusion_loss + output.prediction_loss


# --- tokens, masks, labels


@pytest.mark.parametrize(("sample_size", "patch_size"), [((6,), 2), (4, 2), ((4, 6), (2, 3)), ((2, 4, 6), (1, 2, 2))])
def test_grids_of_any_rank_go_through_both_models(sample_size, patch_size):
    model = tiny_pretraining(sample_size=sample_size, patch_size=patch_size, num_channels=3)
    config = model.config
    sample = torch.randn(2, 3, *config.sample_shape)
    tokens = model.djepa.patchify(sample)
    assert tokens.shape == (2, config.num_tokens, config.token_size)
    assert torch.equal(model.djepa.unpatchify(tokens), sample)
    # inside a token: channel first, then the patch's own axes
    corner = sample[(slice(None), slice(None), *(slice(0, side) for side in config.patch_shape))]
    assert torch.equal(tokens[:, 0], corner.flatten(1))
    assert torch.isfinite(model(sample, torch.tensor([0, 1])).loss)


@torch.no_grad()
def test_hidden_tokens_cannot_be_seen():
    model, mask, labels = tiny_model(), half_masked(), torch.tensor([1, 2])
    tokens = torch.randn(2, 16, 4)
    changed = torch.where(mask.unsqueeze(-1), torch.full_like(tokens, torch.nan), tokens)
    features = model.encode(tokens, labels, mask)
    assert torch.equal(model.encode(changed, labels, mask), features)
    seen = torch.where(mask.unsqueeze(-1), tokens, tokens + 1)
    assert not torch.allclose(model.encode(seen, labels, mask), features)


@torch.no_grad()
def test_places_say_the_same_as_a_mask_in_any_order():
    model, mask, labels = tiny_model(), half_masked(), torch.tensor([1, 2])
    tokens = torch.randn(2, 16, 4)
    expected = model.predict(model.encode(tokens, labels, mask), mask)
    visible = torch.stack([(~row).nonzero().flatten() for row in mask])[:, torch.randperm(8)]
    features = model.predict(model.encode(tokens, labels, visible=visible), visible=visible)
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_every_place_and_every_class_gets_its_own_features():
    model, tokens = tiny_model(), torch.zeros(1, 16, 4)
    mask = torch.ones(1, 16, dtype=torch.bool)
    features = torch.cat([model.predict(model.encode(tokens, torch.tensor([i]), mask), mask) for i in range(6)])
    assert torch.pdist(features[0]).min() > 1e-2  # position
    assert torch.pdist(features.flatten(1)).min() > 1e-2  # class, the null class among them


@torch.no_grad()
def test_no_label_means_the_null_class():
    model, sample = tiny_model(), torch.randn(2, 1, 8, 8)
    unlabelled = model(sample).last_hidden_state
    assert torch.equal(unlabelled, model(sample, torch.tensor([5, 5])).last_hidden_state)


def test_wrong_shapes_are_refused():
    model, labels = tiny_model(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"`sample` must have shape \(batch, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model(torch.randn(2, 3, 8, 8), labels)
    with pytest.raises(ValueError, match=r"`tokens` must have shape \(batch, 16, 4\), got \(2, 15, 4\)"):
        model.encode(torch.randn(2, 15, 4), labels)
    with pytest.raises(ValueError, match=r"`tokens` must have shape \(batch, 16, 4\)"):
        model.unpatchify(torch.randn(2, 16, 5))
    with pytest.raises(
        ValueError, match=r"`mask` must be boolean of shape \(2, 16\), got torch.bool of shape \(2, 9\)"
    ):
        model.encode(torch.randn(2, 16, 4), labels, torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="`mask` must be boolean"):
        model.encode(torch.randn(2, 16, 4), labels, torch.ones(2, 16))
    uneven = half_masked()
    uneven[1] = True
    with pytest.raises(ValueError, match=r"equally many tokens in every row, got \[8, 16\]"):
        model.encode(torch.randn(2, 16, 4), labels, uneven)
    with pytest.raises(ValueError, match=r"must hold 3 buffer and 8 visible tokens, got 19 in all"):
        model.predict(torch.randn(2, 19, 32), half_masked())


# --- losses


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_losses_count_hidden_tokens_alone(objective):
    model, mask, labels = tiny_pretraining(objective=objective).eval(), half_masked(), torch.tensor([1, 2])
    sample = torch.randn(2, 1, 8, 8)
    timesteps = torch.randint(1000, (2, 16)) if objective == "diffusion" else torch.rand(2, 16)
    noise = torch.randn(2, 16, 4)
    losses = model(sample, labels, mask, timesteps, noise)
    noise_of_visible = torch.where(mask.unsqueeze(-1), noise, noise + 5)
    again = model(sample, labels, mask, timesteps, noise_of_visible)
    assert torch.equal(losses.diffusion_loss, again.diffusion_loss)
    noise_of_hidden = torch.where(mask.unsqueeze(-1), noise + 5, noise)
    again = model(sample, labels, mask, timesteps, noise_of_hidden)
    assert not torch.allclose(losses.diffusion_loss, again.diffusion_loss)

    # the mean over hidden tokens of the losses written out
    tokens = model.djepa.patchify(sample)
    features = model.djepa(sample, labels, mask).last_hidden_state
    clean, noise, timesteps = tokens[mask], noise[mask], timesteps[mask]
    noisy = model.token_scheduler.add_noise(clean, noise, timesteps)
    prediction = model.djepa.denoise(noisy, timesteps, features[mask])
    expected = model.token_scheduler.token_loss(prediction, clean, noise, timesteps).mean()
    torch.testing.assert_close(losses.diffusion_loss, expected)
    targets = model.target.encode(tokens, labels)[:, 3:]
    distance = (model.prediction_head(features[mask]) - targets[mask]).abs()
    expected = torch.where(distance < 2, distance**2 / 4, distance - 1).mean()
    torch.testing.assert_close(losses.prediction_loss, expected)


def test_draws_share_features_and_are_independent():
    model = tiny_pretraining(diffusion_batch_mul=3).eval()
    noisy, timesteps, features = torch.randn(12, 4), torch.rand(12), torch.randn(4, 32)
    together = model.djepa.denoise(noisy, timesteps, features)
    torch.testing.assert_close(together, model.djepa.denoise(noisy, timesteps, features.repeat(3, 1)))
    with pytest.raises(ValueError, match=r"a divisor of them \(12\), got 5"):
        model.djepa.denoise(noisy, timesteps, torch.randn(5, 32))
    seen = []
    handle = model.djepa.denoiser.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), mask=half_masked())
    handle.remove()
    assert seen[0].shape == (3 * 16, 4)
    assert torch.pdist(seen[0]).min() > 0


def test_labels_are_dropped_in_training_only_and_never_for_the_target():
    model = tiny_pretraining(label_dropout_prob=1.0)
    labels, sample, mask = torch.tensor([1, 2]), torch.randn(2, 1, 8, 8), half_masked()
    seen = {}
    for name, part in (("online", model.djepa), ("target", model.target)):
        part.encoder.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[1].tolist()))
    model.train()(sample, labels, mask)
    assert seen == {"online": [5, 5], "target": [1, 2]}
    model.eval()(sample, labels, mask)
    assert seen["online"] == [1, 2]


def test_label_dropout_has_its_rate():
    config = tiny_config(label_dropout_prob=0.1, diffusion_batch_mul=1)
    dropped = draw_training(config, token_scheduler_for(config.objective), 20000).dropped_labels.float().mean()
    assert dropped.item() == pytest.approx(0.1, abs=0.01)


def test_the_draws_of_a_batch_can_be_shared_out():
    """Two halves of a batch with their share of its draws have the losses of the whole."""
    model = tiny_pretraining(label_dropout_prob=0.5).train()
    sample, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 5
    draws = draw_training(model.config, model.token_scheduler, 6, seed=3)
    whole = model(sample, labels, draws=draws)
    halves = [model(sample[a:b], labels[a:b], draws=draws.rows(a, b)) for a, b in ((0, 3), (3, 6))]
    for name in ("loss", "diffusion_loss", "prediction_loss"):
        mean = sum(half[name] for half in halves) / 2
        torch.testing.assert_close(mean, whole[name])
    again = draw_training(model.config, model.token_scheduler, 6, seed=3)
    assert torch.equal(again.noise, draws.noise)
    assert torch.equal(again.order, draws.order)
    assert not torch.equal(draw_training(model.config, model.token_scheduler, 6, seed=4).order, draws.order)


def test_training_draws_its_own_masks():
    model = tiny_pretraining(mask_ratio_min=0.7)
    seen = []
    model.djepa.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    for _ in range(20):
        model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    counts = {visible.shape[1] for visible in seen}
    assert counts <= {0, 1, 2, 3, 4}  # at least ceil(0.7 * 16) = 12 hidden
    assert len(counts) > 2
    assert any(not torch.equal(visible[0].sort().values, visible[1].sort().values) for visible in seen)


def test_without_weight_there_is_no_prediction_loss():
    model = tiny_pretraining(prediction_loss_weight=0.0)
    assert model.prediction_head is None
    output = model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    assert output.prediction_loss == 0
    assert output.loss == output.diffusion_loss


def test_a_mask_must_hide_something():
    with pytest.raises(ValueError, match="must hide at least one token per row"):
        tiny_pretraining()(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.zeros(2, 16, dtype=torch.bool))


def test_given_draws_must_have_the_right_shape():
    model = tiny_pretraining()
    with pytest.raises(ValueError, match=r"`timesteps` must have shape \(2, 16\), got \(2,\)"):
        model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), half_masked(), timesteps=torch.rand(2))
    with pytest.raises(ValueError, match=r"`noise` must have shape \(2, 16, 4\), got \(2, 16\)"):
        model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), half_masked(), noise=torch.randn(2, 16))


# --- the moving average


def test_target_moves_towards_the_online_model():
    model = tiny_pretraining()
    before = [parameter.clone() for parameter in model.target.parameters()]
    model.update_target(0.75)
    for old, target, online in zip(before, model.target.parameters(), model.djepa.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * online)
    model.update_target(0.0)
    for target, online in zip(model.target.parameters(), model.djepa.parameters(), strict=True):
        torch.testing.assert_close(target, online)
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\], got 1.1"):
        model.update_target(1.1)


def test_target_gets_no_gradient_and_no_dropout():
    model = tiny_pretraining(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    assert not model.target.training
    assert model.djepa.training
    model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert all(parameter.grad is not None for parameter in model.djepa.parameters())
    assert all(parameter.grad is not None for parameter in model.prediction_head.parameters())
    tokens = torch.randn(2, 16, 4)
    assert torch.equal(model.target.encode(tokens), model.target.encode(tokens))
    assert not torch.equal(model.djepa.encode(tokens), model.djepa.encode(tokens))


# --- initialization, saving, loading


def test_fresh_weights_have_the_papers_distribution():
    model = DJEPAForPreTraining(tiny_config(hidden_size=128, denoiser_hidden_size=128))
    for target, online in zip(model.target.parameters(), model.djepa.parameters(), strict=True):
        assert torch.equal(target, online)
    djepa = model.djepa
    assert djepa.encoder.buffer_tokens.abs().max() == 0
    for tensor in (
        djepa.encoder.class_embeddings.weight,
        djepa.encoder.position_embeddings,
        djepa.predictor.position_embeddings,
        djepa.predictor.mask_token,
    ):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.25)
    for module in djepa.modules():
        if isinstance(module, ZeroInitLinear):
            assert module.weight.abs().max() == 0
        elif isinstance(module, TimeEmbeddingLinear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(module, torch.nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        if isinstance(module, torch.nn.Linear):
            assert module.bias.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", [DJEPAModel, DJEPAForPreTraining])
def test_round_trip_in_shards(tmp_path, model_class, dtype):
    model = (tiny_model() if model_class is DJEPAModel else tiny_pretraining()).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    reloaded, info = model_class.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reloaded.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name
    sample, labels = torch.randn(2, 1, 8, 8, dtype=dtype), torch.tensor([0, 1])
    mask, timesteps = half_masked(), torch.rand(2, 16)
    extra = {} if model_class is DJEPAModel else {"timesteps": timesteps, "noise": torch.randn(2, 16, 4)}
    assert torch.equal(model.eval()(sample, labels, mask, **extra)[0], reloaded(sample, labels, mask, **extra)[0])


def test_auto_classes_know_the_models(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DJEPAConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), DJEPAModel)
    assert isinstance(AutoModelForPreTraining.from_pretrained(tmp_path), DJEPAForPreTraining)


def test_missing_weights_are_initialized(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [name for name in weights if "encoder.layers.1." in name or name in (
        "encoder.buffer_tokens", "encoder.position_embeddings", "predictor.mask_token",
        "denoiser.layers.0.modulation.weight", "denoiser.time_embedding.fc1.weight",
    )]  # fmt: skip
    save_file({name: weights[name] for name in weights if name not in lost}, tmp_path / "model.safetensors")
    reloaded, info = DJEPAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(lost)
    state = reloaded.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert state["denoiser.layers.0.modulation.weight"].abs().max() == 0
    assert state["encoder.buffer_tokens"].abs().max() == 0
    assert state["encoder.layers.1.norm1.weight"].eq(1).all()
    assert 0.01 < state["encoder.position_embeddings"].std() < 0.03
    assert 0.01 < state["denoiser.time_embedding.fc1.weight"].std() < 0.03
    assert state["encoder.layers.1.qkv.weight" if False else "encoder.layers.1.attention.qkv.weight"].std() > 0.05
    for name in set(weights) - set(lost):
        assert torch.equal(state[name], weights[name])


def test_pretraining_from_a_published_model_starts_with_equal_copies(tmp_path, caplog):
    published = tiny_model()
    published.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = DJEPAForPreTraining.from_pretrained(tmp_path)
    assert "`target` starts as a copy of the online weights" in caplog.text
    for name, tensor in published.state_dict().items():
        assert torch.equal(model.djepa.state_dict()[name], tensor)
        assert torch.equal(model.target.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in model.target.parameters())


def test_model_from_a_training_checkpoint_takes_the_ema_weights_and_says_so(tmp_path, caplog):
    training = tiny_pretraining()
    training.save_pretrained(tmp_path)
    for load in (DJEPAModel.from_pretrained, AutoModel.from_pretrained):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model, info = load(tmp_path, output_loading_info=True)
        assert "taking its EMA weights" in caplog.text
        assert "starts as a copy" not in caplog.text
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in training.target.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
        assert all(parameter.requires_grad for parameter in model.parameters())


# --- what the transformers library may ask for


def test_hidden_states_and_attentions_on_request():
    model = tiny_model(attn_implementation="eager")
    sample, labels, mask = torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), half_masked()
    plain = model(sample, labels, mask)
    assert plain.hidden_states is None
    options = ("hidden_states", "attentions", "predictor_hidden_states", "predictor_attentions")
    output = model(sample, labels, mask, **{f"output_{name}": True for name in options})
    assert [state.shape for state in output.hidden_states] == [(2, 3 + 8, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(2, 4, 11, 11)] * 2
    assert [state.shape for state in output.predictor_hidden_states] == [(2, 3 + 16, 32)] * 2
    assert [weights.shape for weights in output.predictor_attentions] == [(2, 4, 19, 19)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 11))
    torch.testing.assert_close(model.encoder.norm(output.hidden_states[-1]), output.context_features)
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state)
    as_tuple = model(sample, labels, mask, return_dict=False)
    assert torch.equal(as_tuple[0], plain.last_hidden_state)
    # the target's encoder must not add to what the online one records
    training = tiny_pretraining(attn_implementation="eager")
    output = training(sample, labels, mask, output_hidden_states=True, output_attentions=True)
    assert (len(output.hidden_states), len(output.attentions)) == (3, 2)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_implementations_agree(backend):
    model, sample, mask = tiny_model(), torch.randn(2, 1, 8, 8), half_masked()
    model.set_attn_implementation("eager")
    expected = model(sample, torch.tensor([0, 1]), mask).last_hidden_state
    model.set_attn_implementation("sdpa")
    with sdpa_kernel(backend):  # the flash kernel takes no mask: it runs only because there is none
        features = model(sample, torch.tensor([0, 1]), mask).last_hidden_state
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_activation_checkpointing_changes_no_gradient(qk_norm):
    model, mask = tiny_pretraining(qk_norm=qk_norm).train(), half_masked()
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), mask, torch.rand(2, 16), torch.randn(2, 16, 4))
    model(*inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.djepa.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(*inputs).loss.backward()
    for parameter, gradient in zip(model.djepa.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradients_flow_when_everything_is_hidden():
    model = tiny_pretraining()
    model(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.ones(2, 16, dtype=torch.bool)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.djepa.parameters())


@torch.no_grad()
def test_half_precision_losses_stay_close(golden):
    gold = golden.tensors
    shape, prefix = gold["mask"].shape, "flow" if golden.flow else "diffusion"
    inputs = {
        "mask": gold["mask"].bool(),
        "timesteps": gold[f"{prefix}_t"].reshape(shape),
        "noise": gold[f"{prefix}_noise"].reshape(*shape, -1),
    }
    with torch.autocast("cpu", torch.bfloat16):
        output = golden.model.eval()(gold["sample"], gold["class_labels"], **inputs)
    assert output.diffusion_loss.dtype == torch.float32
    assert relative_error(output.diffusion_loss, gold["diffusion_loss"]) < 0.02
    assert relative_error(output.prediction_loss, gold["prediction_loss"]) < 0.02


def test_golden_config_is_no_special_case(golden):
    assert golden_config(golden.meta["kw"], golden.config.objective).to_dict() == golden.config.to_dict()
    features = gather_tokens(golden.tensors["tokens"], torch.zeros(len(golden.tensors["tokens"]), 1, dtype=torch.long))
    assert features.shape[-1] == golden.config.token_size
