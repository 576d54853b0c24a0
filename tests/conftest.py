"""Shared parts: the official algorithm's golden files, and tiny real models, autoencoders and pipelines."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from djepa_hf import DJEPAConfig, DJEPAForPreTraining, DJEPAModel, DJEPAPipeline, load_official_checkpoint
from djepa_hf.schedulers import token_scheduler_for

GOLDEN = Path(__file__).parent / "golden"
OBJECTIVES = {"ddpm": "diffusion", "flow": "flow_matching"}

torch.set_num_threads(1)  # models this small only lose by waiting for each other


@pytest.fixture(autouse=True)
def _seed_and_logs():
    """Every test starts from the same random state, and can see the libraries' logs in `caplog`."""
    torch.manual_seed(0)
    transformers.utils.logging.enable_propagation()
    diffusers.utils.logging.enable_propagation()
    yield
    transformers.utils.logging.disable_propagation()
    diffusers.utils.logging.disable_propagation()


def golden_config(kw: dict, objective: str) -> DJEPAConfig:
    return DJEPAConfig(
        sample_size=kw["img_size"] // kw["vae_stride"],
        patch_size=kw["patch_size"],
        num_channels=kw["vae_embed_dim"],
        num_labels=kw["class_num"],
        num_buffer_tokens=kw["buffer_size"],
        qk_norm=kw["qk_norm"],
        hidden_size=kw["encoder_embed_dim"],
        num_hidden_layers=kw["encoder_depth"],
        num_attention_heads=kw["encoder_num_heads"],
        denoiser_hidden_size=kw["diffloss_w"],
        denoiser_num_hidden_layers=kw["diffloss_d"],
        objective=objective,
    )


@pytest.fixture(scope="session", params=["ddpm", "flow"])
def golden(request) -> SimpleNamespace:
    """A checkpoint in the official format, loaded, with what the official algorithm computed from it."""
    name = f"official_{request.param}"
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    config = golden_config(meta["kw"], OBJECTIVES[request.param])
    path = GOLDEN / f"{name}.pth"
    return SimpleNamespace(
        meta=meta,
        path=path,
        config=config,
        flow=request.param == "flow",
        model=load_official_checkpoint(path, config=config),
        tensors=load_file(GOLDEN / f"{name}.safetensors"),
    )


def tiny_config(**overrides) -> DJEPAConfig:
    """16 tokens of 2x2 grey pixels, 5 classes, no dropout: forward passes in milliseconds."""
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "id2label": {0: "tench, Tinca tinca", 1: "goldfish", 2: "great_white shark", 3: "hen", 4: "ostrich"},
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_buffer_tokens": 3,
        "denoiser_hidden_size": 32,
        "denoiser_num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "objective": "flow_matching",
    }
    return DJEPAConfig(**{**sizes, **overrides})


@torch.no_grad()
def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere: fresh models start with zeros that would hide half of what is tested."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_model(**overrides) -> DJEPAModel:
    return randomized(DJEPAModel(tiny_config(**overrides))).eval()


def tiny_pretraining(**overrides) -> DJEPAForPreTraining:
    model = DJEPAForPreTraining(tiny_config(**overrides))
    randomized(model.djepa, 0)
    randomized(model.target, 1)
    randomized(model.prediction_head, 2) if model.prediction_head is not None else None
    return model


def tiny_vae(latent_channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


def tiny_pipeline(vae: AutoencoderKL | None = None, **overrides) -> DJEPAPipeline:
    model = tiny_model(**overrides)
    pipe = DJEPAPipeline(model, token_scheduler_for(model.config.objective), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def relative_error(ours: torch.Tensor, official: torch.Tensor) -> float:
    ours, official = ours.double().flatten(), official.double().flatten()
    return float((ours - official).norm() / official.norm())
