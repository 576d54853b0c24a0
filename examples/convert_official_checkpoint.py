#!/usr/bin/env python
"""Convert the authors' files to a pipeline folder, or ours to their layout.

    python examples/convert_official_checkpoint.py --checkpoint_path djepa_base.pth --vae kl16.ckpt \\
        --output_path outputs/djepa-base
    python examples/convert_official_checkpoint.py --vae kl16.ckpt --output_path outputs/vae-kl16
    python examples/convert_official_checkpoint.py --reverse --checkpoint_path outputs/djepa-base \\
        --output_path djepa_base.pth

The output gets its name only once it is complete. Of a training file only the weights asked for are read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from djepa_hf import DJEPAForPreTraining, DJEPAPipeline
from djepa_hf.arguments import parse_arguments
from djepa_hf.conversion import save_official_checkpoint
from djepa_hf.conversion.files import written_whole
from djepa_hf.conversion.sizes import preset_name
from djepa_hf.hub import check_token, upload_pipeline
from djepa_hf.loading import load_model, load_vae
from djepa_hf.model_card import create_model_card, renamed

SIZES = ("num_attention_heads", "predictor_num_attention_heads", "sample_size", "patch_size", "num_channels")


@dataclass
class ConversionArguments:
    """What to convert."""

    output_path: str = field(metadata={"help": "The new folder; with --reverse the new file."})
    checkpoint_path: str | None = field(
        default=None, metadata={"help": "A .pth file, on disk or on the Hub; with --reverse a folder of ours."}
    )
    vae: str | None = field(
        default=None, metadata={"help": "kl16.ckpt, or an AutoencoderKL (folder or id). Alone, it is converted alone."}
    )
    vae_scaling_factor: float | None = field(
        default=None, metadata={"help": "Put right the scaling factor of a VAE that says another than the model's."}
    )
    weights: Literal["ema", "online"] = field(default="ema", metadata={"help": "Which copy of the network to take."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default=None, metadata={"help": "As stored if not given."})
    variant: str | None = field(default=None, metadata={"help": "Part of the weights' file names, such as fp16."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Weights larger than this are split."})
    self_contained: bool = field(
        default=False, metadata={"help": "Write the code, too, so that diffusers alone can load the folder."}
    )
    published: bool = field(
        default=False, metadata={"help": "It is the authors' own file: their figures go into the model card."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to; the output's name if not given."})
    reverse: bool = field(default=False, metadata={"help": "From our layout to the authors'."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Where the file does not tell."})
    predictor_num_attention_heads: int | None = field(default=None, metadata={"help": "Where the file does not tell."})
    sample_size: int | None = field(default=None, metadata={"help": "Where the file does not tell."})
    patch_size: int | None = field(default=None, metadata={"help": "Where the file does not tell."})
    num_channels: int | None = field(default=None, metadata={"help": "Where the file does not tell."})

    def __post_init__(self):
        if self.checkpoint_path is None and (self.reverse or self.vae is None):
            raise ValueError("Say what to convert: `checkpoint_path`, or `vae` alone.")
        if self.reverse:
            unused = (
                "vae",
                "vae_scaling_factor",
                "dtype",
                "variant",
                "self_contained",
                "published",
                "push_to_hub",
                *SIZES,
            )
            for name in unused:
                if getattr(self, name):
                    raise ValueError(f"`{name}` has no meaning with `reverse`: leave it out.")
        if self.push_to_hub:
            check_token(None)


def described(model: torch.nn.Module) -> str:
    """Its numbers of tensors and parameters, and their type."""
    tensors = model.state_dict().values()
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    return f"{len(tensors)} tensors, {sum(map(torch.numel, tensors)):,} parameters, {', '.join(dtypes)}"


def convert_pipeline(args: ConversionArguments) -> dict[str, str]:
    """One of the authors' training files to a pipeline folder, and its summary."""
    with written_whole(args.output_path) as folder:
        vae = load_vae(args.vae, args.vae_scaling_factor) if args.vae else None
        config = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
        dtype = getattr(torch, args.dtype) if args.dtype else None
        pipe = DJEPAPipeline.from_single_file(args.checkpoint_path, vae, args.weights, dtype, config)
        if vae is not None and dtype is not None:
            vae.to(dtype)
        config = pipe.transformer.config
        preset = preset_name(config)
        repo_id = args.hub_model_id or str(Path(args.output_path))
        if args.published and preset is None:
            raise ValueError("`published`: the authors published base, large and huge; this file has other sizes.")
        published = preset if args.published else None
        card = create_model_card(pipe, repo_id, published=published, self_contained=args.self_contained)
        pipe.save_pretrained(
            folder, variant=args.variant, max_shard_size=args.max_shard_size, self_contained=args.self_contained
        )
        card.save(folder / "README.md")
    summary = {
        "model": described(pipe.transformer),
        "weights": {"ema": "EMA", "online": "online"}[args.weights],
        "preset": preset or "none of the paper's",
        "objective": config.objective,
        "labels": f"{config.num_labels:,}: {config.id2label[0]} ... {config.id2label[config.num_labels - 1]}",
        "VAE": "none" if vae is None else f"{described(vae)}, scaling factor {vae.config.scaling_factor}",
    }
    if args.push_to_hub:
        repo_id = args.hub_model_id or Path(args.output_path).resolve().name
        summary["uploaded"] = upload_pipeline(pipe, args.output_path, repo_id, model_card=renamed(card, repo_id))
    return summary


def convert_vae(args: ConversionArguments) -> dict[str, str]:
    """The authors' autoencoder to a folder of its own, and its summary."""
    with written_whole(args.output_path) as folder:
        vae = load_vae(args.vae, args.vae_scaling_factor)
        if args.dtype:
            vae.to(getattr(torch, args.dtype))
        vae.save_pretrained(folder, variant=args.variant)
    summary = {"VAE": described(vae), "scaling factor": str(vae.config.scaling_factor)}
    if args.push_to_hub:
        summary["uploaded"] = vae.push_to_hub(args.hub_model_id or Path(args.output_path).resolve().name)
    return summary


def convert_back(args: ConversionArguments) -> dict[str, str]:
    """A model of ours to the authors' layout, and its summary."""
    model = load_model(args.checkpoint_path)
    save_official_checkpoint(model, args.output_path)
    training = isinstance(model, DJEPAForPreTraining)
    copies = "`model` is the online, `model_ema` the EMA copy" if training else "`model` and `model_ema` are the same"
    return {"model": described(model), "copies": copies, "preset": preset_name(model.config) or "none of the paper's"}


def main(argv: list[str] | None = None):
    (args,) = parse_arguments(ConversionArguments, argv=argv, description=__doc__)
    if args.reverse:
        summary = convert_back(args)
    elif args.checkpoint_path is None:
        summary = convert_vae(args)
    else:
        summary = convert_pipeline(args)
    summary["written to"] = args.output_path
    width = max(map(len, summary))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in summary.items()))


if __name__ == "__main__":
    main()
