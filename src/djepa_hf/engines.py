"""What differs between the engines that Accelerate drives: DDP, FSDP2 and DeepSpeed's ZeRO.

All of them do the same here. Weights, their moving average and the optimizer work in float32, and autocast alone
decides what is computed in half precision, so that one process and many, whole weights and spread ones, agree.
"""

import copy
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from .modeling_djepa import DJEPAForPreTraining, DJEPAModel


def start_processes() -> PartialState:
    """The processes of `accelerate launch` or `torchrun`, for scripts that train nothing; `device` is this one's."""
    # PartialState does not read the variable by itself; and processes that are done wait long for the one that measures
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=1))


def start_engine(accelerator: Accelerator, accumulation_steps: int) -> str:
    """
    Checks the engine and its settings, and makes ready for the model to be built.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the run.
        accumulation_steps (`int`): batches per optimizer step that the run makes.

    Returns:
        `str`: the mixed precision, `"no"`, `"fp16"` or `"bf16"`. Under DeepSpeed the accelerator forgets it later.

    Raises:
        ValueError: if the engine or its settings would not train what is asked for.
    """
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    if kind == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM is not supported: use FSDP2 (examples/accelerate/fsdp2.yaml).")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported: set `fsdp_version: 2`, as in examples/accelerate/fsdp2.yaml.")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and any((parallelism.tp_enabled, parallelism.cp_enabled, parallelism.sp_enabled)):
        raise ValueError(
            "Tensor, context and sequence parallelism are not supported: use `dp_replicate_size` and `dp_shard_size` "
            "(examples/accelerate/fsdp2_hybrid.yaml)."
        )
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
        accelerator.gradient_accumulation_steps = _of_deepspeed(accelerator, accumulation_steps)
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise ValueError(
            f"The accelerate configuration accumulates {accelerator.gradient_accumulation_steps} batches per step, "
            f"this run {accumulation_steps}: leave it out there, or give the same `gradient_accumulation_steps`."
        )
    if kind == DistributedType.DEEPSPEED:
        from transformers.integrations import unset_hf_deepspeed_config

        if precision == "fp16":
            raise ValueError("`mixed_precision` 'fp16' is not supported with DeepSpeed: use 'bf16'.")
        unset_hf_deepspeed_config()  # or transformers would build models in pieces, before the average is a copy
    return precision


def prepare_engine(
    accelerator: Accelerator,
    model: DJEPAForPreTraining,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    max_grad_norm: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """
    `accelerator.prepare` for model and optimizer.

    Args:
        accelerator ([`~accelerate.Accelerator`]): that [`start_engine`] approved of.
        model ([`DJEPAForPreTraining`]), optimizer (`torch.optim.Optimizer`): to train.
        batch_size (`int`): per process and forward.
        max_grad_norm (`float`): that gradients are clipped to.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()  # it would cast timesteps, too
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.prepare(model, optimizer)
    if accelerator.mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config |= {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": batch_size}
    config["gradient_clipping"] = max_grad_norm
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # in the precision they have
    return accelerator.prepare(model, optimizer)


@torch.no_grad()
def update_average(accelerator: Accelerator, model: DJEPAForPreTraining, decay: float):
    """[`DJEPAForPreTraining.update_target`], wherever the weights are."""
    if not _is_zero3(accelerator):
        model.update_target(decay)
        return
    for average, online in zip(model.target.parameters(), model.djepa.parameters(), strict=True):
        average.ds_tensor.lerp_(online.ds_tensor, 1 - decay)
    _complete_small_parameters(model.target)


def average_as_model(accelerator: Accelerator, model: nn.Module) -> DJEPAModel | None:
    """
    The moving average as the model to sample from. All processes must call this; where the weights are spread over
    them, only the main process gets it.

    Args:
        accelerator ([`~accelerate.Accelerator`]): of the run.
        model (`nn.Module`): as [`prepare_engine`] returned it.
    """
    training = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not (accelerator.distributed_type == DistributedType.FSDP or _is_zero3(accelerator)):
        return training.export("ema")
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    average = DJEPAModel(copy.deepcopy(training.config))
    average.config.weights = "ema"
    average.load_state_dict({name: weights[f"target.{name}"] for name in average.state_dict()})
    return average.to(accelerator.device).eval()


def load_state(accelerator: Accelerator, model: DJEPAForPreTraining, folder: str):
    """`accelerator.load_state`."""
    accelerator.load_state(folder)
    if _is_zero3(accelerator):
        _complete_small_parameters(model.target)


# What DeepSpeed can do besides, and what would not be trained as asked for then: the moving average would miss weights
# that are kept elsewhere or in pieces of pieces, and learning rates would come from two places.
_NOT_SUPPORTED = {
    "scheduler": "the learning rate has a schedule already (`lr_scheduler`)",
    "optimizer": "the optimizer is AdamW already",
    "zero_optimization.offload_optimizer.device": "offloading is not supported",
    "zero_optimization.offload_param.device": "offloading is not supported",
    "zero_optimization.zero_hpz_partition_size": "secondary partitions are not supported",
    "zero_optimization.zero_quantized_weights": "quantized weights are not supported",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantized weights are not supported",
    "tensor_parallel.autotp_size": "tensor parallelism is not supported",
}


def _check_deepspeed(config: dict):
    for key, reason in _NOT_SUPPORTED.items():
        value = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, False, 0, 1, "none", {}):
            raise ValueError(f"The DeepSpeed configuration sets `{key}` ({value}): {reason}, take it out.")
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise ValueError(f"The DeepSpeed configuration sets ZeRO stage {stage}: use 1, 2 or 3, or DDP instead.")


def _of_deepspeed(accelerator: Accelerator, accumulation_steps: int) -> int:
    """How many batches DeepSpeed accumulates: its own configuration, where that says so, goes before everything."""
    steps = accelerator.state.deepspeed_plugin.deepspeed_config.get("gradient_accumulation_steps", "auto")
    return accumulation_steps if steps == "auto" else steps


def _is_zero3(accelerator: Accelerator) -> bool:
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    return accelerator.deepspeed_config["zero_optimization"]["stage"] == 3


def _complete_small_parameters(module: nn.Module):
    """ZeRO-3 keeps small parameters whole, too, on every process; who changes the pieces must renew those."""
    small = [parameter for parameter in module.parameters() if parameter.ds_persist]
    for parameter in small:
        parameter.partition()
    if small:
        small[0].all_gather(small)
