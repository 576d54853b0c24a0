"""Fine-tuning with LoRA: what is trained, what is left alone, what comes out, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_lora
from conftest import tiny_pipeline, tiny_pretraining
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from test_hub import run as run_with_hub
from test_training import command_line

from djepa_hf import DJEPAConfig, DJEPAPipeline
from djepa_hf.conversion import save_official_checkpoint
from djepa_hf.data import load_digits
from djepa_hf.lora import WEIGHT_NAME, Adapter

OPTIONS = {"max_train_steps": 6, "train_batch_size": 8, "rank": 2, "random_flip": False, "learning_rate": 1e-2}
OPTIONS |= {"num_inference_steps": 2, "num_denoising_steps": 2, "checkpointing_steps": 3, "lr_warmup_steps": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders `zero` and `two`, a dozen digits each."""
    folder, data = tmp_path_factory.mktemp("images"), load_digits("train")
    for name, label in (("zero", 0), ("two", 2)):
        (folder / name).mkdir()
        for i in [i for i, found in enumerate(data["label"]) if found == label][:12]:
            data[i]["image"].save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline that knows `zero`, by another spelling, and not `two`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(id2label={0: "one", 1: "Zero, nought"}).save_pretrained(folder)
    return folder


def run(output_dir, base, images, **options):
    options = {**OPTIONS, "pretrained_model_name_or_path": base, "train_data_dir": images, **options}
    train_lora.main(command_line(output_dir, **{name: value for name, value in options.items() if value is not None}))
    return output_dir


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base, images):
    return run(tmp_path_factory.mktemp("tuned"), base, images)


def test_the_result_is_one_small_file_with_a_card(tuned, base):
    adapter = Adapter.read(tuned)
    assert adapter.config.r == 2
    assert adapter.class_names == ["two"]
    card = ModelCard.load(tuned / "README.md")
    assert "lora" in card.data.tags
    assert "It brings the classes two" in card.text
    assert "moving average" not in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    found = {}
    exec(code, found)
    assert found["image"].size == (8, 8)
    for name in ("loss.png", "previews/final.png"):
        with Image.open(tuned / name) as picture:
            assert picture.width > 100
    pipe = DJEPAPipeline.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tuned)
    assert pipe.get_label_ids(["nought", "two"]) == [1, 2]
    pipe.unload_lora_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_the_adapter_and_the_new_row_have_learnt(tuned, base):
    adapter = Adapter.read(tuned)
    table = DJEPAPipeline.from_pretrained(base).transformer.get_input_embeddings()
    assert not torch.allclose(adapter.class_rows[0], table.weight[-1], atol=1e-3)  # where it began
    changed = [name for name, tensor in adapter.weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(changed) == len(adapter.weights) // 2
    assert {name.split(".")[0] for name in changed} == {"encoder", "predictor", "denoiser"}


def test_resuming_continues_as_if_nothing_had_happened(tuned, base, images, tmp_path):
    assert sorted(path.name for path in (tuned / "checkpoint-3").glob("*.safetensors")) == [WEIGHT_NAME]
    shutil.copytree(tuned / "checkpoint-3", tmp_path / "checkpoint-3")
    run(tmp_path, base, images, resume_from_checkpoint="latest")
    expected, resumed = Adapter.read(tuned), Adapter.read(tmp_path)
    assert torch.equal(resumed.class_rows, expected.class_rows)
    for name, tensor in expected.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name


def test_official_files_and_half_precision(images, tmp_path):
    save_official_checkpoint(tiny_pretraining(id2label={0: "zero", 1: "one"}), tmp_path / "base.pth")
    options = {"resolution": 8, "mixed_precision": "bf16", "validation_steps": 3}
    run(tmp_path / "out", tmp_path / "base.pth", images, **options)
    adapter = Adapter.read(tmp_path / "out")
    assert {tensor.dtype for tensor in adapter.weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in adapter.weights.values())
    assert "DJEPAPipeline.from_single_file(" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "previews" / "step-000003.png").exists()


def test_adapters_go_to_the_hub_and_come_back(base, images, tmp_path):
    options = {**OPTIONS, "pretrained_model_name_or_path": base, "train_data_dir": images, "output_dir": tmp_path}
    options |= {"max_train_steps": 1, "push_to_hub": True, "hub_model_id": "me/lora"}
    argv = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    code = f"""
    import sys
    sys.path.insert(0, {str(Path(train_lora.__file__).parent)!r})
    import train_lora
    from djepa_hf import DJEPAPipeline

    train_lora.main({argv!r})
    pipe = DJEPAPipeline.from_pretrained({str(base)!r})
    pipe.load_lora_weights("me/lora")
    print(json.dumps(pipe.get_label_ids(["nought", "two"])))
    """
    with HubServer() as server:
        assert run_with_hub(code, tmp_path / "home", server) == [1, 2]
        files = server.repos["me/lora"]["main"]
    assert {WEIGHT_NAME, "README.md", "loss.png", "previews/final.png"} <= set(files)


def test_two_processes_do_what_one_does(base, images, tmp_path):
    options = {"num_prior_images": 4, "learning_rate": 1e-3}
    one = run(tmp_path / "one", base, images, train_batch_size=8, **options)
    options = {**OPTIONS, **options, "pretrained_model_name_or_path": base, "train_data_dir": images}
    argv = command_line(tmp_path / "two", **{**options, "train_batch_size": 4})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train_lora.__file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *argv], env=environment, check=True, capture_output=True)
    expected, found = Adapter.read(one), Adapter.read(tmp_path / "two")
    for name, tensor in {**expected.weights, "rows": expected.class_rows}.items():
        torch.testing.assert_close({**found.weights, "rows": found.class_rows}[name], tensor, rtol=1e-3, atol=1e-5)


def test_checkpoints_bring_the_prediction_loss(images, tmp_path):
    model = tiny_pretraining(id2label={0: "zero", 1: "two"})
    model.save_pretrained(tmp_path / "base")
    options = {"resolution": 8, "use_dora": True, "target_modules": "qkv"}
    run(tmp_path / "out", tmp_path / "base", images, **options)
    history = torch.load(tmp_path / "out" / "checkpoint-6" / "custom_checkpoint_0.pkl", weights_only=True)
    assert all(loss > 0 for loss in history["losses"]["prediction_loss"])
    adapter = Adapter.read(tmp_path / "out")
    assert adapter.config.use_dora
    assert adapter.class_names == []
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapter.weights} == {"qkv"}


def test_the_base_may_draw_what_it_shall_not_forget(base, images, tmp_path):
    run(tmp_path, base, images, num_prior_images=3, max_train_steps=1)
    drawn = sorted((tmp_path / "images" / "prior-00000").iterdir())
    assert [path.name for path in drawn] == [f"{i:05d}.png" for i in range(3)]  # `zero` is in the data already
    assert len(list((tmp_path / "images" / "two").iterdir())) == 12
    with Image.open(drawn[0]) as picture:
        assert picture.size == (8, 8)
    before = drawn[0].stat().st_mtime_ns
    shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)
    run(tmp_path, base, images, num_prior_images=3, max_train_steps=1)
    assert drawn[0].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="`num_prior_images` needs a pipeline as the base, and images in"):
        run(tmp_path, base, images, num_prior_images=3, train_data_dir=None, dataset_name="digits")
    shutil.copytree(images / "two", tmp_path / "all" / "one")
    shutil.copytree(images / "zero", tmp_path / "all" / "zero")
    with pytest.raises(ValueError, match="the images show every class of the base"):
        run(tmp_path / "out", base, tmp_path / "all", num_prior_images=3)


def test_classes_go_by_the_names_that_the_pipeline_knows():
    config = DJEPAConfig(id2label={0: "crane", 1: "harp", 2: "crane", 3: "mouth organ, harp"})
    assert train_lora.known_ids(config, ["HARP", "axolotl", "prior-00002"]) == [1, None, 2]
    with pytest.raises(ValueError, match="'crane' is the name of several classes"):
        train_lora.known_ids(config, ["crane"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 9}, "The checkpoint was made with lora_alpha None, this run has 9"),
        ({"rank": 3}, "holds an adapter of another rank, or for other layers or classes"),
    ],
)
def test_a_resumed_run_keeps_to_its_adapter(tuned, base, images, tmp_path, options, message):
    shutil.copytree(tuned / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, base, images, resume_from_checkpoint="latest", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prior_images": -1}, "`num_prior_images` must not be negative, got -1"),
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must lie in \[0, 1\), got 1.0"),
        ({"target_modules": "to_q"}, "match no layer. Linear layers are called .*qkv"),
        ({"push_to_hub": True}, "`push_to_hub` needs `hub_model_id`"),
        ({"train_data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_refused_before_training(base, images, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "out", base, images, **options)
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_an_empty_folder_is_refused(base, tmp_path):
    (tmp_path / "images" / "two").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match="image"):
        run(tmp_path / "out", base, tmp_path / "images")


def test_the_comparison_on_digits_runs(tmp_path, monkeypatch, capsys):
    import lora_on_digits

    argv = ["--output_dir", str(tmp_path), "--base_steps", "4", "--style_steps", "2", "--class_steps", "2"]
    command_line(tmp_path)
    monkeypatch.setattr(lora_on_digits, "SAMPLING", {"num_inference_steps": 2, "num_denoising_steps": 2})
    lora_on_digits.main([*argv, "--num_images", "40", "--rank", "2"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"base", "style", "classes"}
    assert result["classes"]["images"] == 60
    assert 0 < result["style"]["share of the base"] < 0.05
    with Image.open(tmp_path / "before_and_after.png") as picture:
        assert picture.width > 900
