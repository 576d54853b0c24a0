"""Engines: however many processes share the work, and however the weights are spread over them, the result is one."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate.commands.config.config_args as config_args
import pytest
import torch
import train
from safetensors.torch import load_file
from test_training import DIGITS, command_line, run

from djepa_hf import DJEPAPipeline

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parent / "examples" / "accelerate").glob("*.yaml"))
OPTIONS = {**DIGITS, "max_train_steps": 6, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPTIONS |= {"random_flip": True, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DJEPALayer,DenoiserLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def on_two_processes(output_dir, launcher=(), environment=None, **options):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *launcher, train.__file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(environment or {})}
    argv = [sys.executable, *command, *command_line(output_dir, **{**OPTIONS, "train_batch_size": 4, **options})]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), **{**OPTIONS, "train_batch_size": 8}, checkpointing_steps=6)


def losses_of(folder):
    return torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)["losses"]


def assert_same_result(output_dir, expected):
    ours, theirs = losses_of(output_dir / "checkpoint-6"), losses_of(expected / "checkpoint-6")
    for name, losses in theirs.items():
        assert ours[name] == pytest.approx(losses, rel=1e-4)
    ours, theirs = (load_file(folder / "transformer" / "model.safetensors") for folder in (output_dir, expected))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5)


def test_two_processes_do_what_one_does(one_process, tmp_path):
    output = on_two_processes(tmp_path, checkpointing_steps=6)
    assert "6 steps of 16 images on 2 x cpu" in output
    assert_same_result(tmp_path, one_process)
    assert len(list((tmp_path / "checkpoint-6").glob("random_states_*.pkl"))) == 2
    assert DJEPAPipeline.from_pretrained(tmp_path).transformer.config.weights == "ema"


def test_weights_spread_over_two_processes_do_so_too_and_resume(one_process, tmp_path):
    launcher = [str(HERE / "fsdp_on_cpu.py")]
    on_two_processes(tmp_path / "whole", launcher, FSDP2, checkpointing_steps=3)
    assert_same_result(tmp_path / "whole", one_process)
    pieces = list((tmp_path / "whole" / "checkpoint-3" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(pieces) == 2, "the EMA copy is part of the sharded state"
    resume = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3", "checkpointing_steps": 3}
    output = on_two_processes(tmp_path / "resumed", launcher, FSDP2, **resume)
    assert "Resuming after step 3" in output
    assert_same_result(tmp_path / "resumed", tmp_path / "whole")


def test_half_precision_is_the_same_with_spread_weights(tmp_path):
    options = {"mixed_precision": "bf16", "checkpointing_steps": 6}
    on_two_processes(tmp_path / "spread", [str(HERE / "fsdp_on_cpu.py")], FSDP2, **options)
    run(tmp_path / "one", **{**OPTIONS, "train_batch_size": 8}, **options)
    spread, one = (losses_of(tmp_path / name / "checkpoint-6") for name in ("spread", "one"))
    for name, losses in one.items():
        assert spread[name] == pytest.approx(losses, rel=2e-3), "no draws, timesteps or losses were rounded"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = config_args.load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.distributed_type.value in ("NO", "MULTI_GPU", "FSDP")
