"""LoRA: adapters change what they should and nothing else, come and go without a trace, and bring classes."""

import copy
import json

import peft
import pytest
import torch
from accelerate import cpu_offload
from conftest import generators, relative_error, tiny_model, tiny_pipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from djepa_hf import DJEPAModel, DJEPAPipeline
from djepa_hf.lora import DEFAULT_TARGETS, WEIGHT_NAME, Adapter, add_adapter, attach

FAST = {"num_inference_steps": 5, "num_denoising_steps": 3, "guidance_scale": 1.5, "output_type": "latent"}


def adapter(seed=0, rank=3, classes=(), model=None, **options):
    """An adapter with random weights everywhere."""
    model = copy.deepcopy(model) if model is not None else tiny_model()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=DEFAULT_TARGETS, **options)
    add_adapter(model, config, "made")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    made = Adapter.of_model(model, "made")
    if classes:
        made.class_names, made.class_rows = list(classes), torch.randn(len(classes), 32, generator=generator)
    return made


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def file(tmp_path):
    return adapter().write(tmp_path / "lora")


def sample(pipe, labels=(0, 3), **options):
    seeds = generators(*range(len(labels)))
    return pipe(list(labels), generator=seeds, **{**FAST, **options}).images


def weights_of(pipe):
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


# --- exactness


def test_a_fresh_adapter_changes_nothing(pipe):
    before = sample(pipe)
    add_adapter(pipe.transformer, LoraConfig(r=2, target_modules=DEFAULT_TARGETS), "fresh")
    assert torch.equal(sample(pipe), before)
    targets = [name for name, _ in pipe.transformer.named_modules() if name.endswith(".lora_A")]
    assert len(targets) == 4 * 4 + 2 * 2  # of two transformers and a denoiser with two blocks each


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_leaves_no_trace(pipe, tmp_path, options):
    before, images = weights_of(pipe), sample(pipe)
    pipe.load_lora_weights(adapter(model=pipe.transformer, **options).write(tmp_path))
    assert relative_error(sample(pipe), images) > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), images)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert pipe.get_list_adapters() == {}


def test_fused_is_as_attached(pipe, file):
    plain = sample(pipe)
    pipe.load_lora_weights(file)
    attached = sample(pipe)
    pipe.fuse_lora()
    assert relative_error(sample(pipe), attached) < 1e-5
    pipe.unfuse_lora()
    assert relative_error(sample(pipe), attached) < 1e-5
    pipe.unload_lora_weights()
    assert relative_error(sample(pipe), plain) < 1e-5


def test_adapters_mix_linearly(pipe, tmp_path):
    first, second = (adapter(seed, model=pipe.transformer) for seed in (1, 2))
    features = torch.randn(2, 7, 32)
    layer = pipe.transformer.encoder.layers[0].fc1
    plain = layer(features)
    for made, name in ((first, "first"), (second, "second")):
        pipe.load_lora_weights(made.write(tmp_path / name), adapter_name=name)
    layer = pipe.transformer.encoder.layers[0].fc1

    def change(names, weights=None):
        pipe.set_adapters(names, weights)
        return layer(features) - plain

    one, other = change("first"), change("second")
    assert pipe.get_active_adapters() == ["second"]
    torch.testing.assert_close(change(["first", "second"], [0.5, 2.0]), 0.5 * one + 2 * other, rtol=1e-4, atol=1e-5)
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    pipe.delete_adapters("first")
    torch.testing.assert_close(change("second"), other)


def test_a_call_may_scale_adapters(pipe, file):
    plain = sample(pipe)
    pipe.load_lora_weights(file)
    full = sample(pipe)
    half = sample(pipe, attention_kwargs={"scale": 0.5})
    assert torch.equal(sample(pipe, attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(sample(pipe), full)  # for that call alone
    pipe.set_adapters("default_0", 0.5)
    torch.testing.assert_close(sample(pipe), half)
    assert torch.equal(sample(pipe, attention_kwargs={"scale": 0.0}), plain)
    torch.testing.assert_close(sample(pipe), half)
    pipe.disable_lora()
    assert torch.equal(sample(pipe), plain)
    pipe.enable_lora()
    torch.testing.assert_close(sample(pipe), half)


def test_works_in_bfloat16(pipe, file):
    pipe.load_lora_weights(file)
    expected = sample(pipe)
    half = DJEPAPipeline(copy.deepcopy(pipe.transformer), pipe.scheduler).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert relative_error(sample(half), expected) < 0.05
    late = tiny_pipeline()
    late.transformer.load_state_dict(pipe.transformer.base_state_dict())
    late.to(torch.bfloat16)
    late.load_lora_weights(file)
    assert {p.dtype for p in late.transformer.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(sample(late), sample(half))


def test_weights_may_come_and_go(pipe, file):
    pipe.load_lora_weights(file)
    expected = sample(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))  # which stands in for an accelerator
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    assert torch.equal(sample(pipe), expected)


def test_compiled_pipelines_take_adapters(pipe, file, tmp_path):
    programs = []

    def backend(module, inputs):
        programs.append(module)
        return module.forward

    torch._dynamo.reset()
    pipe.load_lora_weights(file, adapter_name="style")
    expected, other = sample(pipe), adapter(5, model=tiny_model())
    pipe.compile(backend=backend)
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-3)
    compiled = len(programs)
    assert compiled >= 3
    pipe.load_lora_weights(other.write(tmp_path), adapter_name="style", hotswap=True)
    swapped = sample(pipe)
    assert len(programs) == compiled
    plain = tiny_pipeline()
    plain.transformer.load_state_dict(pipe.transformer.base_state_dict())
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(swapped, sample(plain), rtol=1e-3, atol=1e-3)


# --- files


def test_an_adapter_survives_its_file(pipe, tmp_path):
    pipe.load_lora_weights(adapter(classes=["axolotl"]).write(tmp_path / "first"), adapter_name="pets")
    images = sample(pipe, ("axolotl", 1))
    path = pipe.save_lora_weights(tmp_path / "second")
    with safe_open(path, "pt") as saved:
        metadata = saved.metadata()
    assert json.loads(metadata["class_names"]) == ["axolotl"]
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.r"] == 3
    assert all(name.startswith("transformer.") for name in load_file(path))
    pipe.unload_lora_weights()
    for source in (path, path.parent, str(path)):
        pipe.load_lora_weights(source)
        assert torch.equal(sample(pipe, ("axolotl", 1)), images)
        pipe.unload_lora_weights()


def test_tensors_are_loaded_with_their_configuration(pipe):
    made = adapter(classes=["axolotl"])
    tensors = {f"transformer.{name}": tensor for name, tensor in made.weights.items()}
    tensors["transformer.class_rows"] = made.class_rows
    pipe.load_lora_weights(tensors, config=made.config, class_names=["axolotl"])
    attach(other := tiny_model(), made, "x")
    assert pipe.get_label_ids("axolotl") == [5]
    for name, tensor in Adapter.of_model(other, "x").weights.items():
        assert torch.equal(Adapter.of_model(pipe.transformer, "default_0").weights[name], tensor)


def test_how_an_adapter_began_does_not_change_the_model(pipe, tmp_path):
    before, made = weights_of(pipe), adapter()
    made.config.init_lora_weights = "pissa"
    pipe.load_lora_weights(made.write(tmp_path))
    base = pipe.transformer.base_state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())


def test_room_for_other_ranks_can_be_made(pipe, file, tmp_path):
    pipe.enable_lora_hotswap(target_rank=6)
    pipe.load_lora_weights(file, adapter_name="style")
    higher = adapter(4, rank=5)
    pipe.load_lora_weights(higher.write(tmp_path), adapter_name="style", hotswap=True)
    swapped = sample(pipe)
    pipe.unload_lora_weights()
    pipe._hotswap_options = None
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(swapped, sample(pipe), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="comes before the first adapter is loaded"):
        pipe.enable_lora_hotswap()


def test_adapters_of_plain_peft_are_read(pipe, tmp_path):
    model = copy.deepcopy(pipe.transformer)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["qkv", "proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    other = DJEPAPipeline(wrapped.base_model.model, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(sample(pipe), sample(other))


def test_a_saved_pipeline_holds_the_model_and_the_adapter(pipe, tmp_path):
    before = weights_of(pipe)
    pipe.load_lora_weights(adapter(classes=["axolotl"]).write(tmp_path / "lora"))
    images = sample(pipe, ("axolotl", 1))
    pipe.save_pretrained(tmp_path / "saved")
    assert sample(pipe, ("axolotl", 1)).equal(images)  # saving changes nothing
    saved = DJEPAPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    after = saved.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert saved.transformer.config.num_labels == 5
    saved.load_lora_weights(tmp_path / "saved")
    assert torch.equal(sample(saved, ("axolotl", 1)), images)


def test_a_saved_pipeline_holds_several_adapters(pipe, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        pipe.load_lora_weights(adapter(seed).write(tmp_path / name), adapter_name=name)
    pipe.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.safetensors")} == {"one.safetensors", "two.safetensors"}
    with pytest.raises(ValueError, match=r"Say which adapter to save with `adapter_name`: there are \['one', 'two'\]"):
        pipe.save_lora_weights(tmp_path / "x")


def test_fused_adapters_are_saved_with_the_weights(pipe, file, tmp_path):
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    images = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    saved = DJEPAPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert not (tmp_path / "saved" / WEIGHT_NAME).exists()
    assert torch.equal(sample(saved), images)


# --- classes


def test_new_classes_come_and_go(pipe, tmp_path):
    old, table = sample(pipe), pipe.transformer.encoder.class_embeddings
    rows = table(torch.arange(6)).clone()
    null = rows[-1]
    first = adapter(1, classes=["axolotl", "quokka"])
    pipe.load_lora_weights(first.write(tmp_path / "a"), adapter_name="a")
    pipe.load_lora_weights(adapter(2, classes=["okapi"]).write(tmp_path / "b"), adapter_name="b")
    assert pipe.get_label_ids(["hen", "axolotl", "quokka", "okapi"]) == [3, 5, 6, 7]
    assert pipe.transformer.config.num_labels == 8
    table = pipe.transformer.encoder.class_embeddings
    assert torch.equal(table(torch.arange(5)), rows[:5])
    assert torch.equal(table(torch.tensor([5, 6])), first.class_rows)
    assert torch.equal(table(torch.tensor([8])), null[None])
    assert sample(pipe, ("okapi", "axolotl")).isfinite().all()
    pipe.delete_adapters("a")
    assert pipe.get_label_ids("okapi") == [5]
    with pytest.raises(ValueError, match="Unknown class 'axolotl'"):
        pipe("axolotl", **FAST)
    pipe.unload_lora_weights()
    assert pipe.transformer.config.id2label == tiny_model().config.id2label
    assert torch.equal(sample(pipe), old)


def test_new_classes_start_as_none_in_particular():
    model = tiny_model()
    model.add_classes(["axolotl"])
    features = model.encode(torch.randn(2, 16, 4), torch.tensor([5, 6]))
    same = torch.zeros(2, 16, 4)
    features = model.encode(same, torch.tensor([5, 6]))
    torch.testing.assert_close(features[0], features[1])  # the null class


# --- bad input


def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, tmp_path):
    before, images = weights_of(pipe), sample(pipe)

    def refuses(message, source, **options):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source, **options)
        assert list(pipe.transformer.state_dict()) == list(before)
        assert torch.equal(sample(pipe), images)

    wide = adapter(model=tiny_model(hidden_size=64)).write(tmp_path / "wide")
    refuses("The adapter belongs to another model: encoder.layers.0.* has shape .*, but the layer maps 32 to", wide)
    deep = adapter(model=tiny_model(num_hidden_layers=3)).write(tmp_path / "deep")
    refuses(r"this one has no layer 'encoder.layers.2", deep)
    torn = adapter()
    torn.config.r = 5
    refuses("The adapter's rank is 5, but .* has shape", torn.write(tmp_path / "torn"))
    fewer = adapter()
    fewer.config.target_modules = {"fc1"}
    refuses("The adapter's targets are not those of its weights", fewer.write(tmp_path / "fewer"))
    ranks = adapter()
    ranks.config.rank_pattern = {"fc1": 7}
    refuses("The adapter does not fit", ranks.write(tmp_path / "ranks"))
    (tmp_path / "damaged.safetensors").write_bytes(b"not tensors")
    refuses("damaged.safetensors is damaged", tmp_path / "damaged.safetensors")
    refuses("Tensors do not tell rank and scale: pass the adapter's `config`", adapter().weights)
    refuses("There is a class 'hen' already", adapter(classes=["hen"]).write(tmp_path / "hen"))
    refuses("neither pytorch_lora_weights.safetensors nor adapter_model.safetensors", tmp_path)
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    refuses("holds pytorch_lora_weights.bin: pickle files can run code", tmp_path)
    refuses("is no safetensors file", tmp_path / "pytorch_lora_weights.bin")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refuses("does not say how it was made", tmp_path / "other.safetensors")
    other = {"weight": torch.zeros(2)}
    refuses("These are no weights of a LoRA adapter", other, config=LoraConfig())
    refuses("There is no adapter 'nobody/nothing', neither here nor on the Hub", "nobody/nothing")
    adapter().write(tmp_path / "good")
    refuses("There is no adapter 'style'; attached are none", tmp_path / "good", adapter_name="style", hotswap=True)


def test_unknown_adapters_and_targets_are_named(pipe, file):
    pipe.load_lora_weights(file, adapter_name="style")
    with pytest.raises(ValueError, match="There is no adapter 'stile'; attached are style"):
        pipe.set_adapters("stile")
    with pytest.raises(ValueError, match="There is no adapter 'stile'"):
        pipe.delete_adapters(["stile"])
    with pytest.raises(ValueError, match="There is an adapter 'style' already"):
        pipe.load_lora_weights(file, adapter_name="style")
    with pytest.raises(ValueError, match=r"match no layer. Linear layers are called .*fc1, fc2, .*qkv"):
        add_adapter(tiny_model(), LoraConfig(target_modules=["to_q"]), "x")


def test_a_model_of_its_own_keeps_its_classes(tmp_path):
    model = tiny_model()
    attach(model, adapter(classes=["axolotl"]), "pets")
    model.save_pretrained(tmp_path)
    assert DJEPAModel.from_pretrained(tmp_path).config.num_labels == 5
    assert model.config.num_labels == 6
    with pytest.raises(ValueError, match="There is a class 'axolotl' already"):
        model.add_classes(["axolotl"], adapter_name="other")


def test_adapters_may_have_other_targets(pipe):
    for name, target in (("a", "qkv"), ("b", "fc1")):
        add_adapter(pipe.transformer, LoraConfig(r=2, target_modules=[target], init_lora_weights=False), name)
    pipe.set_adapters(["a", "b"])
    full = sample(pipe)
    assert not torch.equal(sample(pipe, attention_kwargs={"scale": 0.5}), full)
    assert torch.equal(sample(pipe), full)


def test_a_failed_load_leaves_other_adapters_at_work(pipe, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        pipe.load_lora_weights(adapter(seed).write(tmp_path / name), adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    images = sample(pipe)
    fewer, none, torn = adapter(), adapter(), adapter()
    fewer.config.target_modules = {"fc1"}
    none.config.target_modules = {"to_q"}
    del torn.weights["encoder.layers.0.fc1.lora_B.weight"]
    for made, message in ((fewer, "targets are not those"), (none, "match no layer"), (torn, "targets are not those")):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(made.write(tmp_path / "c"), adapter_name="c")
        assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
        assert torch.equal(sample(pipe), images)
    pipe.load_lora_weights(adapter(3).write(tmp_path / "c"), adapter_name="c")
    with pytest.raises(ValueError, match=r"must not have a dot, got 'v1.0'"):
        pipe.load_lora_weights(tmp_path / "c", adapter_name="v1.0")


@pytest.mark.parametrize("rank", [3, 2])
def test_what_was_swapped_in_is_what_is_saved(pipe, file, tmp_path, rank):
    pipe.load_lora_weights(file, adapter_name="s")
    other = adapter(8, rank=rank)
    other.config.lora_alpha = 30
    pipe.load_lora_weights(other.write(tmp_path / "other"), adapter_name="s", hotswap=True)
    images = sample(pipe)
    pipe.set_adapters("s")
    torch.testing.assert_close(sample(pipe), images)
    pipe.save_lora_weights(tmp_path / "saved")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "saved")
    torch.testing.assert_close(sample(pipe), images, rtol=1e-4, atol=1e-4)
    dora = adapter(use_dora=True).write(tmp_path / "dora")
    with pytest.raises(ValueError, match="Adapters with DoRA cannot be swapped"):
        pipe.load_lora_weights(dora, adapter_name="default_0", hotswap=True)


def test_fusing_is_taken_back_with_its_scale(pipe, file, tmp_path):
    pipe.load_lora_weights(file, adapter_name="a")
    images = sample(pipe)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unfuse_lora()
    assert relative_error(sample(pipe), images) < 1e-5
    with pytest.raises(ValueError, match="There is no adapter 'nope'"):
        pipe.fuse_lora(adapter_names=["nope"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.num_fused_loras == 0
    pipe.load_lora_weights(file, adapter_name="a")
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / WEIGHT_NAME).exists()


def test_classes_of_a_fused_adapter_are_not_lost(pipe, tmp_path):
    pipe.load_lora_weights(adapter(classes=["axolotl"]).write(tmp_path), adapter_name="pets")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="The fused adapter 'pets' brings classes, which would be lost"):
        pipe.save_pretrained(tmp_path / "saved")


def test_loading_leaves_what_can_be_trained(pipe, file):
    before = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    pipe.load_lora_weights(file)
    pipe.unload_lora_weights()
    assert [parameter.requires_grad for parameter in pipe.transformer.parameters()] == before
