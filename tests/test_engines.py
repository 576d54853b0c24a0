"""Engines: however many processes share the work, and however the weights are spread over them, the result is one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.commands.config.config_args as config_args
import pytest
import torch
import train
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_training import DIGITS, command_line, run

from djepa_hf import DJEPAForPreTraining, DJEPAPipeline
from djepa_hf.engines import start_engine

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


ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where its build tools are
}


def launch(output_dir, engine=None, **options):
    """The training script on two processes, under DDP or an engine."""
    launcher = [] if engine is None else [str(HERE / "engine_on_cpu.py")]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *launcher, train.__file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(engine or {})}
    argv = [sys.executable, *command, *command_line(output_dir, **{**OPTIONS, "train_batch_size": 4, **options})]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)


def on_two_processes(output_dir, engine=None, **options):
    result = launch(output_dir, engine, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module", params=[2, 3])
def zero(request, tmp_path_factory):
    """DeepSpeed's ZeRO with weights whole (2) or spread, all but the smallest (3)."""
    pytest.importorskip("deepspeed")
    path = tmp_path_factory.mktemp("zero") / "config.json"
    stage = {"stage": request.param, "stage3_param_persistence_threshold": 100}
    kept = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    path.write_text(json.dumps({"zero_optimization": stage, **dict.fromkeys(kept, "auto")}))
    return {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


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
    on_two_processes(tmp_path / "whole", FSDP2, checkpointing_steps=3)
    assert_same_result(tmp_path / "whole", one_process)
    pieces = list((tmp_path / "whole" / "checkpoint-3" / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert len(pieces) == 2, "the EMA copy is part of the sharded state"
    resume = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3", "checkpointing_steps": 3}
    output = on_two_processes(tmp_path / "resumed", FSDP2, **resume)
    assert "Resuming after step 3" in output
    assert_same_result(tmp_path / "resumed", tmp_path / "whole")


def test_compiled_blocks_do_so_too(one_process, tmp_path, monkeypatch):
    for name, value in {"BACKEND": "inductor", "USE_DYNAMIC": "true", "USE_REGIONAL_COMPILATION": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    run(tmp_path, **{**OPTIONS, "train_batch_size": 8}, checkpointing_steps=6)
    assert_same_result(tmp_path, one_process)
    DJEPAForPreTraining.from_pretrained(tmp_path / "checkpoint-6")


def test_half_precision_is_the_same_with_spread_weights(tmp_path):
    options = {"mixed_precision": "bf16", "checkpointing_steps": 6}
    on_two_processes(tmp_path / "spread", FSDP2, **options)
    run(tmp_path / "one", **{**OPTIONS, "train_batch_size": 8}, **options)
    spread, one = (losses_of(tmp_path / name / "checkpoint-6") for name in ("spread", "one"))
    for name, losses in one.items():
        assert spread[name] == pytest.approx(losses, rel=2e-3), "no draws, timesteps or losses were rounded"


def test_deepspeed_does_what_one_process_does_and_resumes(zero, one_process, tmp_path):
    output = on_two_processes(tmp_path / "whole", zero, checkpointing_steps=3)
    assert "6 steps of 16 images on 2 x cpu" in output
    assert_same_result(tmp_path / "whole", one_process)
    resume = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3", "checkpointing_steps": 3}
    output = on_two_processes(tmp_path / "resumed", zero, **resume)
    assert "Resuming after step 3" in output
    assert_same_result(tmp_path / "resumed", tmp_path / "whole")


def test_deepspeed_skips_steps_that_are_not_finite(zero, tmp_path):
    options = {"mixed_precision": "bf16", "learning_rate": 1e30, "lr_warmup_steps": 0, "max_skipped_steps": 3}
    result = launch(tmp_path, zero, **options, checkpointing_steps=1)
    assert "were not finite in 3 steps in a row" in result.stderr
    assert (tmp_path / "checkpoint-4").is_dir(), "the first step was taken, three were skipped"
    average = [load_piece(tmp_path / f"checkpoint-{step}") for step in (1, 4)]
    assert torch.equal(*average)


def load_piece(checkpoint):
    """The moving average of a small parameter in a checkpoint of DeepSpeed, as far as the first process holds it."""
    path, *_ = sorted((checkpoint / "pytorch_model").glob("*_model_states.pt"))
    state = torch.load(path, weights_only=False)
    return (state["frozen_param_fragments"] or state["module"])["target.predictor.mask_token"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("distributed_type", DistributedType.MEGATRON_LM, "Megatron-LM is not supported"),
        ("distributed_type", DistributedType.FSDP, "set `fsdp_version: 2`"),
        ("parallelism_config", ParallelismConfig(tp_size=2), "Tensor, context and sequence parallelism"),
        ("gradient_accumulation_steps", 4, "accumulates 4 batches per step, this run 1"),
    ],
)
def test_engines_that_would_train_something_else_are_refused(name, config, message):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO, mixed_precision="no", is_fsdp2=False, parallelism_config=None
    )
    accelerator.gradient_accumulation_steps = 1
    setattr(accelerator, name, config)
    with pytest.raises(ValueError, match=message):
        start_engine(accelerator, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "sets `scheduler` .*: the learning rate has a schedule already"),
        ({"zero_optimization": {"stage": 0}}, "sets ZeRO stage 0: use 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device` .nvme."),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer.device` ",
        ),
        ({"gradient_accumulation_steps": 1}, "accumulates 1 batches per step, this run 2"),
    ],
)
def test_what_deepspeed_would_do_otherwise_is_refused(change, message):
    config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto", **change}
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, mixed_precision="bf16")
    accelerator.parallelism_config, accelerator.gradient_accumulation_steps = None, 2
    accelerator.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    with pytest.raises(ValueError, match=message):
        start_engine(accelerator, 2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = config_args.load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.distributed_type.value in ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED")
