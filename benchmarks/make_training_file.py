#!/usr/bin/env python
"""Make a file like the authors' training files, with random weights, to measure conversion on.

    python benchmarks/make_training_file.py --preset base --output_path /tmp/djepa_base.pth
    /usr/bin/time -v python examples/convert_official_checkpoint.py --checkpoint_path /tmp/djepa_base.pth \\
        --output_path /tmp/djepa-base

It holds what a training run saves: online weights, EMA weights, AdamW's two moments (zeros, which take no memory to
make), scaler and options.
"""

import argparse
from pathlib import Path

import torch

from djepa_hf import DJEPAConfig, DJEPAForPreTraining
from djepa_hf.configuration_djepa import PRESETS
from djepa_hf.conversion.files import written_whole
from djepa_hf.conversion.names import to_official


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--output_path", type=Path, required=True)
    args = parser.parse_args()
    with torch.device("meta"):
        model = DJEPAForPreTraining(DJEPAConfig.from_preset(args.preset))
    names = {name.removeprefix("djepa."): tensor for name, tensor in model.state_dict().items()}
    shapes = to_official({name: tensor for name, tensor in names.items() if not name.startswith("target.")})
    online, ema = (
        {f"_orig_mod.{name}": torch.empty(tensor.shape).normal_(std=0.02) for name, tensor in shapes.items()}
        for _ in range(2)
    )
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(tensor.shape), "exp_avg_sq": torch.zeros(tensor.shape)}
        for i, tensor in enumerate(online.values())
    }
    optimizer = {"state": state, "param_groups": [{"lr": 8e-4, "betas": (0.9, 0.95), "params": list(state)}]}
    options = argparse.Namespace(model=f"djepa_{args.preset}", img_size=256, vae_stride=16, vae_embed_dim=16)
    content = {"model": online, "model_ema": ema, "optimizer": optimizer, "epoch": 1399, "scaler": {"scale": 65536.0}}
    with written_whole(args.output_path) as unfinished:
        torch.save({**content, "args": options}, unfinished)
    print(f"{args.output_path}: {args.output_path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
