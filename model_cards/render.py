#!/usr/bin/env python
"""Render the cards in this folder: those of the published models, and that of the digits model once it is trained.

python model_cards/render.py
make demo && python model_cards/render.py --digits outputs/digits
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard

from djepa_hf import DDPMTokenScheduler, DJEPAConfig, DJEPAModel, DJEPAPipeline
from djepa_hf.configuration_djepa import PRESETS
from djepa_hf.conversion.sizes import KL16_SCALING_FACTOR
from djepa_hf.model_card import create_model_card, renamed

FOLDER = Path(__file__).parent
OWNER = "your-org"  # whoever uploads: `push_to_hub` puts the real name there


def published_card(preset: str) -> ModelCard:
    """The card of one of the paper's models, as `examples/convert_official_checkpoint.py --published` writes it."""
    config = DJEPAConfig.from_preset(preset, weights="ema", latent_scaling_factor=KL16_SCALING_FACTOR)
    with torch.device("meta"):  # a card needs no weights
        vae = AutoencoderKL(
            latent_channels=config.num_channels, block_out_channels=(32,) * 5, scaling_factor=KL16_SCALING_FACTOR,
            down_block_types=["DownEncoderBlock2D"] * 5, up_block_types=["UpDecoderBlock2D"] * 5,
        )  # fmt: skip
        model = DJEPAModel(config)
    pipe = DJEPAPipeline(model, DDPMTokenScheduler(), vae)
    return create_model_card(pipe, f"{OWNER}/djepa-{preset}", published=preset, self_contained=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="The pipeline that `make demo` trained.")
    args = parser.parse_args()
    for preset in PRESETS:
        published_card(preset).save(FOLDER / f"djepa-{preset}.md")
    if args.digits:
        card = renamed(ModelCard.load(args.digits / "README.md"), f"{OWNER}/djepa-digits")
        card.data.license = "apache-2.0"
        card.save(FOLDER / "djepa-digits.md")


if __name__ == "__main__":
    main()
