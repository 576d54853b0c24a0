"""The authors' files: what is in them, what may be in them, which weights are taken, and the way back."""

import argparse
import logging
import os
from pathlib import Path

import convert_official_checkpoint
import pytest
import torch
from conftest import GOLDEN, golden_config, tiny_config, tiny_model, tiny_pretraining, tiny_vae
from diffusers import AutoencoderKL
from test_ldm_vae import ldm_tensors

from djepa_hf import (
    DDPMTokenScheduler,
    DJEPAConfig,
    DJEPAForPreTraining,
    DJEPAModel,
    DJEPAPipeline,
    FlowMatchTokenScheduler,
    load_official_checkpoint,
)
from djepa_hf.conversion import save_official_checkpoint
from djepa_hf.conversion.files import find_file, read_checkpoint, written_whole
from djepa_hf.conversion.names import to_official
from djepa_hf.conversion.sizes import infer_config, preset_name, sizes_of_tensors


def read(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def rewrite(golden, path, change):
    """A copy of the golden checkpoint after `change` of its content, its tensors without prefix."""
    checkpoint = read(golden.path)
    for key in ("model", "model_ema"):
        checkpoint[key] = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint[key].items()}
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


# --- which weights


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


def test_a_pipeline_takes_the_ema_weights_unless_told_otherwise(golden, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        pipe = DJEPAPipeline.from_single_file(golden.path)
        assert "Taking the EMA weights" in caplog.text
        online = DJEPAPipeline.from_single_file(golden.path, weights="online")
        assert "Taking the online weights" in caplog.text
    mask_token = pipe.transformer.predictor.mask_token
    assert torch.equal(mask_token, golden.model.target.predictor.mask_token)
    assert torch.equal(online.transformer.predictor.mask_token, golden.model.djepa.predictor.mask_token)
    assert mask_token.requires_grad
    assert isinstance(pipe.scheduler, FlowMatchTokenScheduler if golden.flow else DDPMTokenScheduler)
    for choice, chosen in (("ema", pipe), ("online", online)):
        chosen.save_pretrained(tmp_path / choice)
        assert DJEPAPipeline.from_pretrained(tmp_path / choice).transformer.config.weights == choice
    with pytest.raises(ValueError, match="`weights` must be 'ema' or 'online', got 'raw'"):
        DJEPAPipeline.from_single_file(golden.path, weights="raw")


def test_one_copy_is_enough_to_sample_from_but_not_to_train(golden, tmp_path):
    path = rewrite(golden, tmp_path / "a.pth", lambda checkpoint: checkpoint.pop("model_ema"))
    with pytest.raises(ValueError, match="with 'model_ema' in it; it has online weights: weights=\"online\""):
        DJEPAPipeline.from_single_file(path)
    pipe = DJEPAPipeline.from_single_file(path, weights="online")
    assert torch.equal(pipe.transformer.predictor.mask_token, golden.model.djepa.predictor.mask_token)
    with pytest.raises(ValueError, match="not an official D-JEPA checkpoint with 'model_ema' in it"):
        load_official_checkpoint(path)


def test_the_model_does_not_depend_on_the_file_any_longer(golden, tmp_path):
    path = rewrite(golden, tmp_path / "a.pth", lambda checkpoint: None)
    pipe, training = DJEPAPipeline.from_single_file(path), load_official_checkpoint(path)
    with path.open("r+b") as file:  # in place: a map of the file would see it
        file.write(bytes(path.stat().st_size))
    for model in (pipe.transformer, training.target):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, golden.model.target.state_dict()[name])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped where")
def test_files_are_mapped_and_not_read(golden):
    checkpoint = read_checkpoint(golden.path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(golden.path) in line]
    (first, last), *_ = [[int(end, 16) for end in fields[0].split("-")] for fields in maps]
    for part in ("model", "model_ema"):
        assert all(first <= tensor.data_ptr() < last for tensor in checkpoint[part].values())


def test_types(golden):
    pipe = DJEPAPipeline.from_single_file(golden.path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    expected = golden.model.target.denoiser.layers[0].fc1.weight.bfloat16()
    assert torch.equal(pipe.transformer.denoiser.layers[0].fc1.weight, expected)


def test_values_too_large_for_float16_are_named(golden, tmp_path):
    def enlarge(checkpoint):
        checkpoint["model_ema"]["mask_token"][0, 0, 0] = 1e5

    path = rewrite(golden, tmp_path / "a.pth", enlarge)
    with pytest.raises(ValueError, match=r"beyond float16's range \(65504\) in mask_token \(up to 1e\+05\)"):
        DJEPAPipeline.from_single_file(path, dtype=torch.float16)
    DJEPAPipeline.from_single_file(path, dtype=torch.bfloat16)


# --- sizes


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_files_of_compiled_and_of_plain_training_are_read(golden, tmp_path, prefix):
    def rename(checkpoint):
        for key in ("model", "model_ema"):
            checkpoint[key] = {prefix + name: tensor for name, tensor in checkpoint[key].items()}

    model = load_official_checkpoint(rewrite(golden, tmp_path / "a.pth", rename), config=golden.config)
    for name, tensor in golden.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_sizes_come_from_the_shapes_and_from_the_options_in_the_file(golden):
    config = load_official_checkpoint(golden.path).config
    expected = golden.config.to_dict()
    assert {name: value for name, value in config.to_dict().items() if expected[name] != value} == {}


def test_what_neither_tells_is_asked_for_by_name(golden, tmp_path):
    path = rewrite(golden, tmp_path / "a.pth", lambda checkpoint: checkpoint.pop("args"))
    with pytest.raises(ValueError, match="do not tell `patch_size`, `num_channels`, `sample_size`: pass `config`"):
        DJEPAPipeline.from_single_file(path)
    pipe = DJEPAPipeline.from_single_file(path, config={"patch_size": 1})
    assert pipe.transformer.config.num_channels == golden.config.num_channels
    pipe = DJEPAPipeline.from_single_file(path, config={"patch_size": 2})  # a token is four grey pixels
    assert (pipe.transformer.config.num_channels, pipe.transformer.config.sample_size) == (1, 8)
    pipe = DJEPAPipeline.from_single_file(path, vae=tiny_vae(4))  # the autoencoder tells, too
    assert (pipe.transformer.config.num_channels, pipe.transformer.config.patch_size) == (4, 1)


def test_heads_are_asked_for_without_qk_norm(golden, tmp_path):
    def without_qk_norm(checkpoint):
        for key in ("model", "model_ema"):
            for name in [name for name in checkpoint[key] if "_norm.weight" in name and ".attn." in name]:
                del checkpoint[key][name]

    path = rewrite(golden, tmp_path / "a.pth", without_qk_norm)
    with pytest.raises(ValueError, match=r"do not tell `num_attention_heads`: .*config=\{'num_attention_heads': ...\}"):
        load_official_checkpoint(path)
    config = load_official_checkpoint(path, config={"num_attention_heads": 8}).config
    assert (config.num_attention_heads, config.predictor_num_attention_heads, config.qk_norm) == (8, 8, False)


@pytest.mark.parametrize("preset", ["base", "large", "huge"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_presets_are_known_by_their_shapes(preset, qk_norm):
    config = DJEPAConfig.from_preset(preset, qk_norm=qk_norm)
    with torch.device("meta"):
        tensors = to_official(DJEPAModel(config).state_dict())
    inferred = infer_config(Path("file"), tensors)
    assert preset_name(inferred) == preset
    assert inferred.to_dict() == config.to_dict()
    assert inferred.id2label[207] == "golden retriever"
    assert sizes_of_tensors(tensors).get("num_attention_heads") == (config.num_attention_heads if qk_norm else None)


def test_a_file_of_another_preset_is_refused_in_few_words(golden):
    with pytest.raises(
        ValueError, match="does not fit `config`: hidden_size is 32 in the file, 768 in `config`"
    ) as error:
        DJEPAPipeline.from_single_file(golden.path, config=DJEPAConfig.from_preset("base"))
    assert "num_hidden_layers is 2 in the file, 12 in `config`" in str(error.value)
    assert len(str(error.value)) < 6000
    with pytest.raises(ValueError, match="num_labels is 10 in the file, 2 in `config`"):
        DJEPAPipeline.from_single_file(golden.path, config={"id2label": {0: "a", 1: "b"}})
    with pytest.raises(ValueError, match="has num_tokens 16; `sample_size` 8, `patch_size` 1"):
        DJEPAPipeline.from_single_file(golden.path, config={"sample_size": 8})


@pytest.mark.parametrize("ratio", [4.0, 2.7, 2.2, 1.03])
@pytest.mark.parametrize("width", [28, 32, 36])
def test_any_width_of_the_mlp_is_read_from_the_shapes(tmp_path, width, ratio):
    model = tiny_model(hidden_size=width, mlp_ratio=ratio)
    args = argparse.Namespace(patch_size=2, vae_embed_dim=1)
    torch.save({"model_ema": to_official(model.state_dict()), "args": args}, tmp_path / "a.pth")
    for config in (None, model.config, {"mlp_ratio": ratio}):
        loaded = DJEPAPipeline.from_single_file(tmp_path / "a.pth", config=config).transformer
        assert torch.equal(loaded.encoder.layers[0].fc1.weight, model.encoder.layers[0].fc1.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "online"}, "There is no option 'weight'; did you mean 'weights'"),
        ({"torch_dtype": torch.bfloat16}, "There is no option 'torch_dtype'; did you mean 'dtype'"),
        ({"config": {"num_attention_head": 4}}, "did you mean 'num_attention_heads'"),
        ({"config": "base"}, "`config` must be a DJEPAConfig or a dict of its arguments, got 'base'"),
        ({"dtype": "bfloat16"}, r"`dtype` must be a torch.dtype such as torch.bfloat16, got 'bfloat16'"),
        ({"vae": "org/vae"}, "`vae` must be an AutoencoderKL, got 'org/vae'"),
        ({"vae": tiny_vae(16), "config": {"patch_size": 1}}, "16 latent channels, the model 4"),
    ],
)
def test_options_that_cannot_be_right_are_refused(golden, options, message):
    with pytest.raises(ValueError, match=message):
        DJEPAPipeline.from_single_file(golden.path, **options)


def test_a_vae_that_cannot_make_such_tokens_is_named(golden, tmp_path):
    path = rewrite(golden, tmp_path / "a.pth", lambda checkpoint: checkpoint.pop("args"))
    with pytest.raises(ValueError, match="has 4 numbers, which 16 channels cannot make"):
        DJEPAPipeline.from_single_file(path, vae=tiny_vae(16))


def test_misfits_are_found_before_the_weights_are_read(golden, tmp_path, capsys):
    with pytest.raises(ValueError, match="do not belong together"):
        DJEPAPipeline.from_single_file(golden.path, vae=tiny_vae(3))
    assert "Reading weights" not in capsys.readouterr().err


def test_names_can_be_given(golden):
    names = {i: f"digit {i}" for i in range(10)}
    assert DJEPAPipeline.from_single_file(golden.path, config={"id2label": names}).get_label_ids("Digit_7") == [7]


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
    without = load_official_checkpoint(golden.path, config={"prediction_loss_weight": 0.0})
    assert without.prediction_head is None
    assert torch.equal(without.djepa.predictor.mask_token, golden.model.djepa.predictor.mask_token)
    assert "was trained without the prediction loss" in caplog.text


# --- bad files


def test_all_that_does_not_fit_is_listed_in_one_error(golden, tmp_path):
    def damage(checkpoint):
        for key in ("model", "model_ema"):
            del checkpoint[key]["mask_token"]
            checkpoint[key]["surplus"] = torch.zeros(1)
            checkpoint[key]["decoder_norm.bias"] = torch.zeros(7)

    path = rewrite(golden, tmp_path / "a.pth", damage)
    for load in (load_official_checkpoint, DJEPAPipeline.from_single_file):
        with pytest.raises(ValueError, match="does not fit") as error:
            load(path)
        for problem in ("missing: mask_token.", "unexpected: surplus.", "decoder_norm.bias is (7,), not (32,)."):
            assert problem in str(error.value)
    with pytest.raises(ValueError, match="does not fit"):
        load_official_checkpoint(golden.path, config=tiny_config())


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "model_ema": {}, "args": Payload()}, "evil.pth")
    for load in (load_official_checkpoint, DJEPAPipeline.from_single_file):
        with pytest.raises(ValueError, match=r"evil.pth holds a (posix|nt|os).system, .*nothing was run"):
            load("evil.pth")
    assert not (tmp_path / "executed").exists()
    torch.save({"model": {}, "args": tmp_path}, "path.pth")
    with pytest.raises(ValueError, match=r"path.pth holds a pathlib\S*Path"):
        load_official_checkpoint("path.pth")


def test_other_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"with 'model' in it; its entries are \['state_dict'\]"):
        load_official_checkpoint(tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="it holds a list, not a dict"):
        load_official_checkpoint(tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match=r"text\.pth is not a checkpoint"):
        load_official_checkpoint(tmp_path / "text.pth")
    data = (GOLDEN / "official_flow.pth").read_bytes()
    for size in (3, len(data) // 2, len(data) - 100):
        (tmp_path / "half.pth").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"half\.pth is damaged"):
            load_official_checkpoint(tmp_path / "half.pth")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_official_checkpoint(tmp_path / "nowhere.pth")


def test_flipped_bytes_never_show_more_than_one_clear_error(golden, tmp_path):
    torch.save(read(golden.path), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    messages = []
    for source in (golden.path, tmp_path / "old.pth"):
        data = bytearray(source.read_bytes())
        for i in range(100):
            damaged = bytearray(data)
            for place in range(100 + 7 * i, 100 + 7 * i + 5):
                damaged[place] ^= 0xA5
            (tmp_path / "damaged.pth").write_bytes(damaged)
            try:
                DJEPAPipeline.from_single_file(tmp_path / "damaged.pth")
            except ValueError as error:
                messages.append(str(error))
    assert messages
    assert all("damaged.pth" in message or "`" in message for message in messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 1}, "model_ema": {"a": 1}}, "`model_ema` holds 'a': int, where only tensors belong"),
        ({"model": {}, "model_ema": {3: torch.zeros(1)}}, "`model_ema` holds 3: Tensor, where only tensors belong"),
        ({"model": {"encoder.conv_in.weight": torch.zeros(1)}}, "is an autoencoder, not D-JEPA: .*`load_ldm_vae`"),
        ({"model_ema": {}, "args": {"patch_size": None}}, "do not tell `hidden_size`, `num_attention_heads`"),
    ],
)
def test_files_of_another_make_are_explained(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        DJEPAPipeline.from_single_file(tmp_path / "a.pth")


def test_files_from_before_pytorch_1_6_are_read(golden, tmp_path):
    torch.save(read(golden.path), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = load_official_checkpoint(tmp_path / "old.pth")
    assert torch.equal(model.target.predictor.mask_token, golden.model.target.predictor.mask_token)


def test_a_mar_checkpoint_is_called_by_its_name(golden, tmp_path):
    def like_mar(checkpoint):
        checkpoint["args"] = argparse.Namespace(model="mar_base")
        checkpoint["model_ema"]["diffusion_pos_embed_learned"] = torch.zeros(1, 16, 32)

    with pytest.raises(ValueError, match="This is a checkpoint of MAR, not of D-JEPA"):
        DJEPAPipeline.from_single_file(rewrite(golden, tmp_path / "mar.pth", like_mar))


def test_a_vae_with_another_scaling_factor_is_refused(tmp_path):
    model = tiny_model(num_channels=16, sample_size=4, patch_size=1, objective="diffusion")
    args = argparse.Namespace(img_size=64, vae_stride=16, vae_embed_dim=16, patch_size=1)
    torch.save({"model_ema": to_official(model.state_dict()), "args": args}, tmp_path / "a.pth")
    vae = tiny_vae(16)
    with pytest.raises(ValueError, match=r"latents times 0.2325, but the VAE's `scaling_factor` is 0.5"):
        DJEPAPipeline.from_single_file(tmp_path / "a.pth", vae=vae)
    with pytest.raises(ValueError, match=r"the VAE's `scaling_factor` is 0.5"):
        DJEPAPipeline.from_single_file(tmp_path / "a.pth", vae=vae, config=model.config)
    other = DJEPAPipeline.from_single_file(tmp_path / "a.pth", vae=vae, config={"latent_scaling_factor": 0.5})
    assert other.transformer.config.latent_scaling_factor == 0.5, "who says so knows the VAE of the training"
    vae.register_to_config(scaling_factor=0.2325)
    assert DJEPAPipeline.from_single_file(tmp_path / "a.pth", vae=vae).vae is vae
    vae.save_pretrained(tmp_path / "vae")  # the message's advice
    assert AutoencoderKL.from_pretrained(tmp_path / "vae", scaling_factor=0.5).config.scaling_factor == 0.5


# --- the way back


def test_the_way_there_and_back_keeps_every_bit(golden, tmp_path):
    save_official_checkpoint(golden.model, tmp_path / "back.pth")
    original, back = read(golden.path), read(tmp_path / "back.pth")
    for key in ("model", "model_ema"):
        before = {name.removeprefix("_orig_mod."): tensor for name, tensor in original[key].items()}
        assert before.keys() == back[key].keys()
        for name, tensor in before.items():
            if key == "model" or "jepaloss" not in name:  # of whose average there is only the online copy
                assert torch.equal(tensor, back[key][name])
    model = load_official_checkpoint(tmp_path / "back.pth")
    assert model.config.to_dict() == golden.model.config.to_dict()


def test_a_configuration_survives_the_official_layout(tmp_path):
    options = {"qk_norm": False, "mask_ratio_min": 0.2, "num_attention_heads": 2, "predictor_num_attention_heads": 8}
    options |= {"mlp_ratio": 2.7, "weights": "ema", "sample_size": (8, 8)}  # 2.7 x 32 is no whole number
    for model in (tiny_pretraining(**options), tiny_model(**options)):
        path = tmp_path / f"{type(model).__name__}.pth"
        save_official_checkpoint(model, path)
        training = load_official_checkpoint(path)
        expected = model.state_dict()
        prefix = "djepa." if isinstance(model, DJEPAModel) else ""
        for name, tensor in expected.items():
            assert torch.equal(training.state_dict()[prefix + name], tensor)
        head = {} if isinstance(model, DJEPAForPreTraining) else {"prediction_loss_weight": 0.0}  # there is none
        assert training.config.to_dict() == {**model.config.to_dict(), **head, "weights": None}
        again = DJEPAPipeline.from_single_file(path, weights="online").transformer.config
        assert again.to_dict() == {**model.config.to_dict(), "weights": "online"}
    with pytest.raises(ValueError, match="square images only"):
        save_official_checkpoint(tiny_model(sample_size=(4, 8)), tmp_path / "wide.pth")
    with pytest.raises(ValueError, match="exists already"):
        save_official_checkpoint(model, path)


# --- files


def test_an_interruption_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def interrupted():
        with written_whole(tmp_path / "out") as folder:
            folder.mkdir()
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with written_whole(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "whole").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    for taken in ("out", "link", "dangling", "."):
        with pytest.raises(ValueError, match="exists already"):
            written_whole(tmp_path / taken).__enter__()
    with written_whole(f"{tmp_path}/empty/") as file:  # even a file, where there was an empty folder
        file.write_text("whole")
    assert (tmp_path / "empty").read_text() == "whole"


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    argv = ["--checkpoint_path", "nowhere.pth", "--output_path", str(tmp_path / "file" / "out")]
    with pytest.raises(ValueError, match=r"Cannot write to .*file: (Not a directory|File exists)"):
        convert_official_checkpoint.main(argv)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give up its permissions")
def test_missing_permission_is_named(tmp_path):
    tmp_path.chmod(0o755)
    try:
        os.seteuid(65534)
        with pytest.raises(ValueError, match=r"Cannot write to .*: Permission denied"):
            written_whole(tmp_path / "out").__enter__()
    finally:
        os.seteuid(0)


def test_files_of_the_hub_are_told_from_local_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no file nowhere\.pth"):
        find_file("nowhere.pth")
    (tmp_path / "here" / "there").mkdir(parents=True)
    for path in ("here/there/nowhere.pth", "./a/b/c.pth", "../a/c.pth", "~/a/b.pth", "datasets/a/b.pth", "/a/b/c.pth"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            find_file(path)


# --- the script


def test_the_script_writes_a_pipeline_and_says_what_is_in_it(golden, tmp_path, capsys):
    torch.save({"model": ldm_tensors()}, tmp_path / "kl.ckpt")
    argv = ["--checkpoint_path", str(golden.path), "--vae", str(tmp_path / "kl.ckpt")]
    convert_official_checkpoint.main([*argv, "--output_path", str(tmp_path / "out"), "--max_shard_size", "100KB"])
    summary = capsys.readouterr().out
    for line in ("99 tensors, 77,", "EMA", "none of the paper's", "10: LABEL_0 ... LABEL_9", "scaling factor 0.2325"):
        assert line in summary
    assert len(list((tmp_path / "out" / "transformer").glob("model-0*.safetensors"))) > 1
    pipe = DJEPAPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae.config.scaling_factor == 0.2325
    assert "EMA (the moving average" in (tmp_path / "out" / "README.md").read_text()
    for name, tensor in golden.model.target.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], tensor)
    assert {path.name for path in tmp_path.iterdir()} == {"kl.ckpt", "out"}
    # and back
    back = ["--reverse", "--checkpoint_path", str(tmp_path / "out"), "--output_path", str(tmp_path / "back.pth")]
    convert_official_checkpoint.main(back)
    original, back = read(golden.path)["model_ema"], read(tmp_path / "back.pth")["model_ema"]
    for name, tensor in back.items():
        assert torch.equal(tensor, {key.removeprefix("_orig_mod."): value for key, value in original.items()}[name])


def test_the_script_converts_the_autoencoder_alone(tmp_path, capsys):
    tensors = ldm_tensors()
    torch.save({"model": tensors}, tmp_path / "kl.ckpt")
    convert_official_checkpoint.main(["--vae", str(tmp_path / "kl.ckpt"), "--output_path", str(tmp_path / "vae")])
    assert f"{len(tensors)} tensors" in capsys.readouterr().out
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == 0.2325


def test_the_script_converts_a_training_checkpoint_back(tmp_path):
    model = tiny_pretraining()
    model.save_pretrained(tmp_path / "checkpoint")
    argv = ["--reverse", "--checkpoint_path", str(tmp_path / "checkpoint"), "--output_path", str(tmp_path / "a.pth")]
    convert_official_checkpoint.main(argv)
    reread = load_official_checkpoint(tmp_path / "a.pth")
    assert isinstance(reread, DJEPAForPreTraining)
    for name, tensor in model.state_dict().items():
        assert torch.equal(reread.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Say what to convert"),
        (["--reverse"], "Say what to convert"),
        (["--checkpoint_path", "a.pth", "--push_to_hub"], "There is no Hugging Face token"),
        (["--checkpoint_path", "a", "--reverse", "--push_to_hub"], "`push_to_hub` has no meaning with `reverse`"),
        (["--checkpoint_path", "a.pth", "--vae", "b.ckpt", "--vae_scaling_factor", "0"], "must be positive, got 0"),
        (["--checkpoint_path", str(GOLDEN / "official_ddpm.pth"), "--published"], "this file has other sizes"),
    ],
)
def test_the_script_refuses(tmp_path, monkeypatch, argv, message):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint.main([*argv, "--output_path", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
