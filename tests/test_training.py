"""The training script, run for real on the digits and on a folder of images."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train
import train_with_trainer
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import tiny_pipeline, tiny_pretraining, tiny_vae
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from djepa_hf import DJEPAForPreTraining, DJEPAModel, DJEPAPipeline
from djepa_hf.checkpoints import find_checkpoint
from djepa_hf.conversion import save_official_checkpoint
from djepa_hf.loading import load_for_training

TINY = {
    "patch_size": 2,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_buffer_tokens": 2,
    "denoiser_hidden_size": 32,
    "denoiser_num_hidden_layers": 1,
    "objective": "flow_matching",
    "num_inference_steps": 2,
    "num_denoising_steps": 2,
    "train_batch_size": 32,
    "lr_warmup_steps": 2,
}
DIGITS = {**TINY, "dataset_name": "digits", "resolution": 8, "random_flip": False}


def command_line(output_dir, **options):
    for state in (AcceleratorState, GradientState, PartialState):  # a fresh process would start like this
        state._reset_state()
    options = {**options, "output_dir": output_dir}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def run(output_dir, **options):
    train.main(command_line(output_dir, **options))
    return output_dir


def latest(output_dir):
    return find_checkpoint(Accelerator(), output_dir, "latest")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """45 steps are a little more than one epoch of the 1,347 training digits."""
    options = {"max_train_steps": 45, "learning_rate": 2e-3, "checkpointing_steps": 15, "validation_steps": 15}
    options |= {"random_flip": True}  # which the seed decides, and not the state of a generator
    options |= {"hidden_dropout_prob": 0.1, "report_to": "tensorboard"}
    return run(tmp_path_factory.mktemp("digits"), **{**DIGITS, **options})


def test_the_result_is_a_pipeline_with_the_ema_weights(digits_run):
    pipe = DJEPAPipeline.from_pretrained(digits_run)
    checkpoint = load_file(digits_run / "checkpoint-45" / "model.safetensors")
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, checkpoint[f"target.{name}"])
    assert not torch.equal(checkpoint["target.predictor.mask_token"], checkpoint["djepa.predictor.mask_token"])
    assert pipe.transformer.config.id2label[7] == "7"
    options = yaml.safe_load((digits_run / "sampling.yaml").read_text())
    assert options["num_inference_steps"] == 2
    image = pipe("7", **options).images[0]
    assert (image.size, image.mode) == ((8, 8), "L")


def test_there_is_something_to_see(digits_run):
    for name in ("loss.png", "loss_by_noise_level.png", "previews/step-000030.png", "previews/film_strip.png"):
        with Image.open(digits_run / name) as picture:
            assert picture.width > 300
            assert picture.height > (300 if "strip" not in name else 90)
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
    assert list((digits_run / "logs").rglob("events.out.tfevents*"))
    index = json.loads((digits_run / "model_index.json").read_text())
    assert index["vae"] == [None, None]


def test_training_learns_and_the_average_moves(digits_run):
    history = torch.load(digits_run / "checkpoint-45" / "custom_checkpoint_0.pkl", weights_only=True)
    for losses in history["losses"].values():
        assert len(losses) == 45
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    early, late = (load_file(digits_run / f"checkpoint-{step}" / "model.safetensors") for step in (15, 45))
    moved = {name for name in late if not torch.equal(early[name], late[name])}
    assert {name.split(".")[0] for name in moved} == {"djepa", "target", "prediction_head"}


def test_resuming_continues_as_if_nothing_had_happened(digits_run, tmp_path):
    options = {"max_train_steps": 45, "learning_rate": 2e-3, "hidden_dropout_prob": 0.1, "random_flip": True}
    options |= {"resume_from_checkpoint": digits_run / "checkpoint-30", "dataloader_num_workers": 1}
    resumed = run(tmp_path / "resumed", **{**DIGITS, **options})
    expected = load_file(digits_run / "transformer" / "model.safetensors")
    for name, tensor in load_file(resumed / "transformer" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_checkpoints_are_found_and_limited(tmp_path):
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    run(tmp_path, **DIGITS, **options)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert latest(tmp_path) == (tmp_path / "checkpoint-6", 6)
    assert find_checkpoint(Accelerator(), tmp_path, "checkpoint-4") == (tmp_path / "checkpoint-4", 4)
    with pytest.raises(ValueError, match="no checkpoint 'checkpoint-5'"):
        find_checkpoint(Accelerator(), tmp_path, "checkpoint-5")
    first = {**DIGITS, "max_train_steps": 1, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    run(tmp_path / "empty", **first)  # one command for the first start and for all others
    assert latest(tmp_path / "empty")[1] == 1
    (tmp_path / "empty" / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"'latest', but .* holds no sound checkpoint"):
        run(tmp_path / "empty", **first)


def test_a_used_folder_and_impossible_previews_are_refused_before_training(digits_run, tmp_path):
    with pytest.raises(ValueError, match=r"holds checkpoints of another run: pass `resume_from_checkpoint` 'latest'"):
        run(digits_run, **DIGITS)
    with pytest.raises(ValueError, match=r"`num_inference_steps` must lie in 1..16"):
        run(tmp_path, **{**DIGITS, "num_inference_steps": 17})
    assert not list(tmp_path.iterdir())


def assert_continues(output_dir, before: dict[str, torch.Tensor], decay: float, step: int = 1):
    """The average is still the one that training started from, but for its share of the new weights."""
    after = DJEPAForPreTraining.from_pretrained(output_dir / f"checkpoint-{step}")
    for name, tensor in before.items():
        expected = torch.lerp(tensor, after.djepa.state_dict()[name], 1 - decay)
        torch.testing.assert_close(after.target.state_dict()[name], expected)


def test_training_continues_from_an_official_file(golden, tmp_path):
    tiny_vae(4).save_pretrained(tmp_path / "vae")
    options = {"dataset_name": "digits", "resolution": 8, "pretrained_vae_model_name_or_path": tmp_path / "vae"}
    options |= {"max_train_steps": 1, "checkpointing_steps": 1, "num_inference_steps": 2, "num_denoising_steps": 2}
    out = run(tmp_path / "out", **options, init_from=golden.path, ema_decay=0.99, hidden_dropout_prob=0.2)
    assert_continues(out, golden.model.target.state_dict(), 0.99)
    head = DJEPAForPreTraining.from_pretrained(out / "checkpoint-1").prediction_head
    torch.testing.assert_close(head.fc1.weight, golden.model.prediction_head.fc1.weight, rtol=0, atol=1e-3)
    config = DJEPAPipeline.from_pretrained(out).transformer.config
    assert config.objective == golden.config.objective
    assert (config.id2label[3], config.hidden_dropout_prob, config.latent_scaling_factor) == ("3", 0.2, 0.5)
    assert f"It started from the weights of `{golden.path}`" in (out / "README.md").read_text()
    # a resumed run need not be told again where it started from
    before = DJEPAForPreTraining.from_pretrained(out / "checkpoint-1").target.state_dict()
    options |= {"max_train_steps": 2, "hidden_dropout_prob": 0.2, "ema_decay": 0.99, "resume_from_checkpoint": "latest"}
    options |= {name: getattr(golden.config, name) for name in ("hidden_size", "num_hidden_layers", "objective")}
    options |= {name: getattr(golden.config, name) for name in ("num_attention_heads", "num_buffer_tokens")}
    options |= {"denoiser_hidden_size": 32, "denoiser_num_hidden_layers": 2}
    run(out, **options)
    assert_continues(out, before, 0.99, 2)
    assert f"It started from the weights of `{golden.path}`" in (out / "README.md").read_text()


@pytest.mark.parametrize("part", ["", "checkpoint-45"])
def test_training_continues_from_our_own(digits_run, tmp_path, part):
    options = {name: value for name, value in DIGITS.items() if name != "hidden_size"}
    options |= {"max_train_steps": 1, "checkpointing_steps": 1, "ema_decay": 0.99}
    out = run(tmp_path, **options, init_from=digits_run / part)
    assert_continues(out, DJEPAModel.from_pretrained(digits_run / "transformer").state_dict(), 0.99)


def test_training_goes_on_in_float32_whatever_was_stored(tmp_path):
    names = {i: f"old {i}" for i in range(10)}
    tiny_pipeline(id2label=names).to(torch.bfloat16).save_pretrained(tmp_path / "pipe")
    save_official_checkpoint(tiny_pretraining().bfloat16(), tmp_path / "a.pth")
    for source in (tmp_path / "pipe", tmp_path / "a.pth"):
        options = {"id2label": {i: str(i) for i in range(10)}} if source.is_dir() else {}
        model = load_for_training(source, options)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert source.is_file() or model.config.label2id == {str(i): i for i in range(10)}
    with pytest.raises(ValueError, match="There is no option 'hiden_size'"):
        load_for_training(source, {"hiden_size": 3})
    with pytest.raises(FileNotFoundError, match="is not a folder of djepa_hf"):
        load_for_training(tmp_path / "nowhere", {})


def test_weights_that_do_not_fit_are_refused_by_name(golden, digits_run, tmp_path):
    options = {**DIGITS, "hidden_size": 64, "init_from": digits_run}
    with pytest.raises(ValueError, match="does not fit: hidden_size is 32, not 64"):
        run(tmp_path / "a", **options)
    with pytest.raises(ValueError, match="num_hidden_layers is 2 in the file, 1 in `config`"):
        run(tmp_path / "b", **{**DIGITS, "init_from": golden.path})
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8), colour == "red").save(tmp_path / "images" / name / "1.png")
    options = {**TINY, "train_data_dir": tmp_path / "images", "resolution": 8, "init_from": digits_run}
    with pytest.raises(ValueError, match="num_labels is 10, not 2"):
        run(tmp_path / "c", **options)


@pytest.mark.parametrize(
    ("name", "expected"), [("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]), ("cosine", [0.5, 1, 0.854, 0.5, 0.146, 0])]
)
def test_the_learning_rate_follows_its_schedule(tmp_path, name, expected):
    options = {**DIGITS, "max_train_steps": 6, "lr_warmup_steps": 2, "learning_rate": 1.0, "lr_scheduler": name}
    state = train.prepare(*train.parse_options(command_line(tmp_path, **options)))
    rates = []
    for _ in expected:
        state.optimizer.step()
        state.lr_scheduler.step()
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, abs=1e-3)


def test_pictures_need_not_be_square(picture_folder, tmp_path, capsys):
    tiny_vae(4).save_pretrained(tmp_path / "vae")
    options = {**TINY, "train_data_dir": picture_folder, "max_train_steps": 1, "validation_steps": 1}
    options |= {
        "train_batch_size": 4,
        "pretrained_vae_model_name_or_path": tmp_path / "vae",
        "report_to": "tensorboard",
    }
    argv = [*command_line(tmp_path / "out", **options), "--resolution", "8", "16"]
    train.main(argv)
    pipe = DJEPAPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.sample_size == (4, 8)
    assert pipe("red", num_inference_steps=2, num_denoising_steps=1).images[0].size == (16, 8)
    with pytest.raises(ValueError, match=r"`resolution` \(8, 15\) must be divisible by the VAE's stride 2"):
        train.main([*command_line(tmp_path / "bad", **options), "--resolution", "8", "15"])
    with pytest.raises(ValueError, match=r"must be a side, or a height and a width, got \[8, 8, 8\]"):
        train.main([*command_line(tmp_path / "bad", **options), "--resolution", "8", "8", "8"])


def test_trackio_gets_the_losses(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    options = {**DIGITS, "max_train_steps": 2, "logging_steps": 1, "report_to": "trackio"}
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "ACCELERATE_USE_CPU": "true"}
    argv = [sys.executable, train.__file__, *command_line(tmp_path / "out", **options)]
    subprocess.run(argv, env=environment, check=True, capture_output=True, timeout=300)
    (database,) = (tmp_path / "trackio").glob("*.db")
    content = database.read_bytes()
    for name in (b"diffusion_loss", b"gradient_norm", b"learning_rate", b"images_per_second"):
        assert name in content


def test_the_loss_is_split_by_noise_level(digits_run):
    history = torch.load(digits_run / "checkpoint-45" / "custom_checkpoint_0.pkl", weights_only=True)
    assert list(history["noise_levels"]) == [15, 30, 45]
    early, _, late = history["noise_levels"].values()
    assert len(early) == 5
    assert late[-1] < early[-1], "where noise is nearly all there is, a model learns first"


def test_transformers_trainer_trains_the_model_too(tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "use_cpu": True}
    options |= {"save_steps": 4, "logging_steps": 1, "report_to": "none"}
    train_with_trainer.main(command_line(tmp_path, **options))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    model = DJEPAForPreTraining.from_pretrained(tmp_path / "checkpoint-4")
    pipe = DJEPAPipeline.from_pretrained(tmp_path)
    average = pipe.transformer.state_dict()["predictor.mask_token"]
    assert torch.equal(model.target.predictor.mask_token, average)
    assert not torch.equal(model.djepa.predictor.mask_token, average)
    assert (pipe.transformer.config.weights, pipe.get_label_ids("7")) == ("ema", [7])


@pytest.mark.parametrize("preset", ["base", "large", "huge"])
def test_the_published_recipe(preset):
    path = Path(train.__file__).parent / "configs" / f"imagenet_{preset}.yaml"
    model, data, args, sampling = train.parse_options(["--config", str(path)])
    assert model.preset == preset
    assert args.train_batch_size * args.gradient_accumulation_steps * 8 == 2048
    assert (args.learning_rate, args.ema_decay, args.max_grad_norm) == (8e-4, 0.9999, 3.0)
    assert args.num_train_epochs == {"base": 1400, "large": 480, "huge": 320}[preset]
    assert args.lr_warmup_steps == math.ceil(100 * 1_281_167 / 2048)
    assert (data.image_size, sampling.num_inference_steps) == (256, 64)


def test_a_dry_run_shows_the_plan_and_trains_nothing(tmp_path, capsys):
    run(tmp_path / "plan", **DIGITS, max_train_steps=50, dry_run=True)
    plan = capsys.readouterr().out
    for line in ("hidden_size: 32", "parameters, context encoder", "FLOPs per step, all", "GiB", "steps per epoch"):
        assert line in plan
    assert "Nothing was trained." in plan
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"first_batch.png"}
    with Image.open(tmp_path / "plan" / "first_batch.png") as picture:
        assert picture.width > 100


def test_the_result_has_a_card(digits_run):
    card = ModelCard.load(digits_run / "README.md")
    assert f'from_pretrained("{digits_run}")' in card.text
    assert "On digits: 45 steps with a batch of 32, AdamW" in card.text
    assert "    num_inference_steps=2,\n    num_denoising_steps=2,\n" in card.text
    assert "EMA (the moving average" in card.text


@pytest.fixture
def picture_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("red", "blue"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_pictures_of_ones_own_in_the_latents_of_a_vae(picture_folder, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    options = {
        **TINY,
        "train_data_dir": picture_folder,
        "resolution": 8,
        "patch_size": 1,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "objective": "diffusion",
        "pretrained_vae_model_name_or_path": tmp_path / "vae",
    }
    pipe = DJEPAPipeline.from_pretrained(run(tmp_path / "out", **options))
    assert pipe.transformer.config.sample_size == 4
    assert pipe.transformer.config.num_channels == 4
    assert pipe.transformer.dtype == torch.float32
    image = pipe("red", num_inference_steps=2, num_denoising_steps=2).images[0]
    assert (image.size, image.mode) == ((8, 8), "RGB")
    with pytest.raises(ValueError, match="`resolution` 9 must be divisible by the VAE's stride 2"):
        run(tmp_path / "odd", **{**options, "resolution": 9})


def test_epochs_count_accumulated_steps(picture_folder, tmp_path):
    options = {"train_data_dir": picture_folder, "resolution": 8, "train_batch_size": 2, "num_train_epochs": 2}
    accumulated = {"gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    run(tmp_path, **{**TINY, **options, **accumulated})
    assert latest(tmp_path)[1] == 2 * 10 / 4  # the data are a stream, so that steps need not end with an epoch


def test_a_training_checkpoint_is_a_model_folder_too(digits_run, caplog):
    folder = digits_run / "checkpoint-45"
    weights = load_file(folder / "model.safetensors")
    training = DJEPAForPreTraining.from_pretrained(folder)
    for name, tensor in training.state_dict().items():
        assert torch.equal(tensor, weights[name])
    with caplog.at_level(logging.WARNING):
        model = DJEPAModel.from_pretrained(folder, config=training.config)
    assert "taking its EMA weights" in caplog.text
    assert torch.equal(model.predictor.mask_token, weights["target.predictor.mask_token"])
