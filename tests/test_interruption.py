"""Runs that are killed, stopped, starved of disk or fed with nonsense: what they lose, which is nothing."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
import train
from safetensors.torch import load_file
from test_training import DIGITS, command_line, latest, run

from djepa_hf import DJEPAForPreTraining
from djepa_hf.checkpoints import CheckpointError
from djepa_hf.data import load_digits

OPTIONS = {**DIGITS, "max_train_steps": 24, "hidden_dropout_prob": 0.1, "random_flip": True, "train_batch_size": 16}


@pytest.fixture(autouse=True)
def _signal_handlers():
    """Runs change how this process takes signals."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **OPTIONS, checkpointing_steps=24)


def losses_of(output_dir):
    folder, _ = latest(output_dir)
    return torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)["losses"]


def inodes(paths):
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # renamed in the meantime
            found.add(path.stat().st_ino)
    return found


def assert_same_run(output_dir, expected):
    assert losses_of(output_dir) == losses_of(expected)
    weights = load_file(expected / "checkpoint-24" / "model.safetensors")
    for name, tensor in load_file(output_dir / "checkpoint-24" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    published = load_file(expected / "transformer" / "model.safetensors")
    for name, tensor in load_file(output_dir / "transformer" / "model.safetensors").items():
        assert torch.equal(tensor, published[name]), name


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(uninterrupted, tmp_path):
    choose, environment = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def start():
        resume = {"resume_from_checkpoint": "latest"} if any(tmp_path.glob("checkpoint-*")) else {}
        argv = command_line(tmp_path, **OPTIONS, **resume, checkpointing_steps=3, checkpoints_total_limit=3)
        return subprocess.Popen([sys.executable, train.__file__, *argv], env=environment, stderr=subprocess.PIPE)

    for kill_while_writing in (True, False, True):
        process, done = start(), max((int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")), default=0)
        earlier = inodes(tmp_path.glob("unfinished-*"))
        while process.poll() is None:
            if kill_while_writing and not inodes(tmp_path.glob("unfinished-*")) <= earlier:
                break
            if not kill_while_writing and (tmp_path / f"checkpoint-{done + 3}").exists():
                break
            time.sleep(0.0005)
        if not kill_while_writing:
            time.sleep(choose.random() / 20)  # anywhere in the steps that follow
        assert process.poll() is None, "it was alive when it was killed"
        process.kill()
        process.communicate()
    process = start()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(uninterrupted, tmp_path, monkeypatch, capsys, number):
    original = train.training_step

    def step_and_signal(state, batches):
        values = original(state, batches)
        if state.step == 7:
            os.kill(os.getpid(), number)
        return values

    monkeypatch.setattr(train, "training_step", step_and_signal)
    run(tmp_path, **OPTIONS, checkpointing_steps=24)
    assert f"Stopped by {number.name} after step 8" in capsys.readouterr().out
    assert latest(tmp_path) == (tmp_path / "checkpoint-8", 8)
    assert not (tmp_path / "model_index.json").exists()
    monkeypatch.undo()
    run(tmp_path, **OPTIONS, checkpointing_steps=24, resume_from_checkpoint="latest")
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, caplog, harm):
    out = tmp_path / "out"
    run(out, **OPTIONS, checkpointing_steps=8)
    file = out / "checkpoint-24" / ("manifest.json" if harm == "manifest" else "optimizer.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "cut": lambda: file.write_bytes(content[: len(content) // 2]),
        "flip": lambda: file.write_bytes(content),
        "remove": file.unlink,
        "manifest": lambda: file.write_text("{"),
    }[harm]()
    with caplog.at_level("WARNING"):
        assert latest(out) == (out / "checkpoint-16", 16)
    assert "checkpoint-24 is damaged" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-24 is damaged"):
        run(out, **OPTIONS, resume_from_checkpoint="checkpoint-24")
    if harm == "flip":
        run(out, **OPTIONS, checkpointing_steps=24, resume_from_checkpoint="latest")
        assert_same_run(out, uninterrupted)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    run(tmp_path, **{**OPTIONS, "max_train_steps": 2}, checkpointing_steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond: as good as a full disk
    try:
        options = {**OPTIONS, "max_train_steps": 4, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
        with pytest.raises(CheckpointError, match=r"Could not write .*checkpoint-4: .*last good checkpoint is .*-2"):
            run(tmp_path, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest(tmp_path) == (tmp_path / "checkpoint-2", 2)
    assert not list(tmp_path.glob("unfinished-*"))
    DJEPAForPreTraining.from_pretrained(tmp_path / "checkpoint-2")


def test_a_changed_model_or_batch_is_refused(uninterrupted, tmp_path):
    for change, message in (
        ({"hidden_size": 64}, "holds another model: hidden_size is 32, not 64"),
        ({"hidden_dropout_prob": 0.2}, "holds another model: hidden_dropout_prob is 0.1, not 0.2"),
        ({"train_batch_size": 8}, "made with images per step 16, this run has 8"),
        ({"learning_rate": 0.5}, "made with learning_rate 0.0001, this run has 0.5"),
        ({"seed": 3}, "made with seed 0, this run has 3"),
    ):
        options = {**OPTIONS, **change, "resume_from_checkpoint": uninterrupted / "checkpoint-24"}
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **options)


def test_a_streamed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    digits = load_digits("train")
    for i in range(3):
        digits.shard(3, i).to_parquet(tmp_path / f"{i}.parquet")
    streamed = {"dataset_name": "parquet", "data_files": tmp_path / "*.parquet", "streaming": True}
    options = {**OPTIONS, **streamed, "dataloader_num_workers": 2, "max_train_steps": 7, "train_batch_size": 128}
    run(tmp_path / "whole", **options, checkpointing_steps=3)
    assert (tmp_path / "whole" / "checkpoint-3" / "stream_0.json").is_file()
    resume = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3", "checkpointing_steps": 7}
    run(tmp_path / "resumed", **options, **resume)
    weights = load_file(tmp_path / "whole" / "transformer" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "resumed" / "transformer" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    with pytest.raises(ValueError, match="made with processes x workers 1 x 2, this run has 1 x 1"):
        run(tmp_path / "other", **{**options, "dataloader_num_workers": 1}, **resume)
    cut = {"train_batch_size": 64, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="made with images per process and batch 128, this run has 64"):
        run(tmp_path / "other", **{**options, **cut}, **resume)


def test_steps_may_be_cut_up_differently_after_a_resume(tmp_path):
    options = {**OPTIONS, "hidden_dropout_prob": 0.0, "max_train_steps": 6, "checkpointing_steps": 3}
    run(tmp_path / "whole", **options)
    cut = {"train_batch_size": 8, "gradient_accumulation_steps": 2}
    run(tmp_path / "cut", **{**options, **cut, "resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"})
    start, end = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole/checkpoint-3", "cut/checkpoint-6")
    )
    assert not torch.equal(start["djepa.predictor.mask_token"], end["djepa.predictor.mask_token"])


def test_going_back_leaves_the_future_behind(tmp_path):
    run(tmp_path, **{**OPTIONS, "max_train_steps": 6}, checkpointing_steps=2)
    options = {**OPTIONS, "max_train_steps": 4, "checkpointing_steps": 2, "resume_from_checkpoint": "checkpoint-2"}
    run(tmp_path, **options)
    assert latest(tmp_path) == (tmp_path / "checkpoint-4", 4)
    assert {path.name for path in tmp_path.glob("abandoned-*")} == {"abandoned-checkpoint-4", "abandoned-checkpoint-6"}


def test_a_signal_to_all_processes_finds_the_checkpoint_written(tmp_path):
    """Workers that read images get the cluster's signal, too, and must not die of it before the checkpoint is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {**OPTIONS, "max_train_steps": 100_000, "checkpointing_steps": 2, "dataloader_num_workers": 2}
    argv = [sys.executable, train.__file__, *command_line(tmp_path, **options)]
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while not (tmp_path / "checkpoint-4").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert b"Stopped by SIGTERM after step" in output
    latest(tmp_path)
    assert not list(tmp_path.glob("unfinished-*"))


def test_a_run_that_fails_while_workers_read_ends(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {**OPTIONS, "dataloader_num_workers": 1, "learning_rate": 1e30, "lr_warmup_steps": 0}
    argv = [sys.executable, train.__file__, *command_line(tmp_path, **options, max_skipped_steps=2)]
    process = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 1
    assert "were not finite in 2 steps in a row" in process.stderr


def poisoned(tmp_path, bad_steps, **options):
    """A run whose gradients are not numbers in some steps."""
    state = train.prepare(*train.parse_options(command_line(tmp_path, **{**OPTIONS, **options})))
    tmp_path.mkdir(exist_ok=True)

    def poison(gradient):
        return gradient * torch.nan if state.step in bad_steps else gradient

    state.online.djepa.denoiser.output_projection.weight.register_hook(poison)
    return state


def test_steps_that_are_not_finite_change_nothing_and_are_written_down(tmp_path):
    state = poisoned(tmp_path, {2, 3}, max_train_steps=3)
    weights = {}

    def keep(step):
        weights[step] = {name: tensor.clone() for name, tensor in state.online.state_dict().items()}

    original = state.lr_scheduler.step

    def step_and_keep():
        original()
        keep(state.step)

    state.lr_scheduler.step = step_and_keep
    assert train.train(state)
    assert state.history.skipped_steps == 1
    trained = {name: tensor for name, tensor in weights[1].items() if not name.startswith("target.")}
    assert all(torch.equal(weights[2][name], tensor) for name, tensor in trained.items())
    average = {name: tensor for name, tensor in state.online.state_dict().items() if name.startswith("target.")}
    assert all(torch.equal(weights[2][name], tensor) for name, tensor in average.items())
    (line,) = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 3
    assert len(record["images"]) == 16
    assert record["gradient_norm"] == "nan"


def test_too_many_of_them_in_a_row_stop_the_run(tmp_path):
    state = poisoned(tmp_path, range(4, 20), max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match="were not finite in 3 steps in a row"):
        train.train(state)
    folder, step = latest(tmp_path)
    assert step == 7
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / "model.safetensors").values())
    assert len((tmp_path / "skipped_steps.jsonl").read_text().splitlines()) == 3
