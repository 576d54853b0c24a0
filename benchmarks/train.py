#!/usr/bin/env python
"""How long a training step takes, and where the time goes.

    python benchmarks/train.py --preset base --train_batch_size 4 --output_path benchmarks/results/train_cpu.json

Every variant is measured in turn, round after round, so that a machine that slows down slows all of them. Figures are
medians. Beside them stands the rate of a plain matrix product on the same machine in the same run: utilisation is the
step's floating-point operations (`djepa_hf.accounting`) over what that product would have done in the time.
"""

import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from machine import clock, device, peak_memory, processor, product_rate
from tqdm.auto import tqdm

from djepa_hf import DJEPAConfig, DJEPAForPreTraining
from djepa_hf.accounting import training_flops
from djepa_hf.arguments import parse_arguments
from djepa_hf.batches import batch_loader
from djepa_hf.draws import draw_training
from djepa_hf.latent_cache import VIEWS, CachedLatents, cache_features, write_index, write_shard
from djepa_hf.latents import latents_of_moments
from djepa_hf.networks import DenoiserLayer, DJEPALayer
from djepa_hf.optimization import parameter_groups

PARTS = ("data", "target encoder", "forward", "backward", "optimizer and EMA")
CACHED_IMAGES = 256


@dataclass
class BenchmarkArguments:
    """What to measure."""

    preset: Literal["base", "large", "huge"] = field(default="base", metadata={"help": "Which model."})
    train_batch_size: int = field(default=4, metadata={"help": "Images per step."})
    rounds: int = field(default=5, metadata={"help": "Steps of each variant, after one that does not count."})
    compile: bool = field(default=False, metadata={"help": "Whether to compile the blocks of the networks."})
    output_path: str = field(default="benchmarks/results/train.json", metadata={"help": "Where the figures go."})


class Steps:
    """Training steps of one model, timed part by part."""

    def __init__(self, args: BenchmarkArguments):
        torch.manual_seed(0)
        self.model = DJEPAForPreTraining(DJEPAConfig.from_preset(args.preset)).to(device()).train()
        if args.compile:
            for layer in (layer for layer in self.model.modules() if isinstance(layer, DJEPALayer | DenoiserLayer)):
                layer.compile(dynamic=True)
        options = {"lr": 8e-4, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.02}
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), fused=True, **options)
        self.cache = TemporaryDirectory()
        self.batches = batch_loader(random_cache(Path(self.cache.name), self.model.config), args.train_batch_size)

    def step(self, seed: int, half: bool) -> dict[str, float]:
        """Seconds of each part of a step, and its loss. The target encoder's time is part of the forward's, too."""
        model, times, target = self.model, [clock()], []
        batch = next(self.batches)
        labels, moments = batch["class_labels"].to(device()), batch["sample"].to(device()).float()
        mean, _ = moments.chunk(2, dim=1)
        sample = latents_of_moments(moments, torch.randn_like(mean), scaling_factor=0.2325)
        draws = draw_training(model.config, model.token_scheduler, len(sample), device(), seed)
        times.append(clock())
        encoder = model.target.encoder
        hooks = [encoder.register_forward_pre_hook(lambda *_: target.append(-clock()))]
        hooks.append(encoder.register_forward_hook(lambda *_: target.append(clock())))
        with torch.autocast(device().type, torch.bfloat16, enabled=half):
            output = model(sample, labels, draws=draws)
        times.append(clock())
        output.loss.backward()
        times.append(clock())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        model.update_target(0.9999)
        times.append(clock())
        for hook in hooks:
            hook.remove()
        drawn, forward, backward, optimizer = (after - before for before, after in itertools.pairwise(times))
        parts = dict(zip(PARTS, (drawn, sum(target), forward, backward, optimizer), strict=True))
        return {**parts, "step": times[-1] - times[0], "loss": output.loss.item()}


def random_cache(folder: Path, config: DJEPAConfig) -> CachedLatents:
    """Cached latents as examples/cache_latents.py writes them, of noise."""
    shape = (2 * config.num_channels, *config.sample_shape)
    features = cache_features([str(i) for i in range(config.num_labels)], shape)
    labels = torch.randint(config.num_labels, (CACHED_IMAGES,)).tolist()
    write_shard(folder / "0.arrow", 0.5 * torch.randn(CACHED_IMAGES, VIEWS, *shape), labels, features)
    write_index(folder, ["0.arrow"], features, {"fingerprint": "noise", "count": CACHED_IMAGES, "shape": shape})
    return CachedLatents(folder)


def main(argv: list[str] | None = None):
    (args,) = parse_arguments(BenchmarkArguments, argv=argv, description=__doc__)
    path = Path(args.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    steps, variants = Steps(args), {"float32": False, "bfloat16 autocast": True}
    seconds = {name: [] for name in variants}
    rates = {"float32": [], "bfloat16 autocast": []}
    for number in tqdm(range(args.rounds + 1), unit="round"):
        for name, half in variants.items():
            rates[name].append(product_rate(torch.bfloat16 if half else torch.float32))
            measured = steps.step(number, half)
            if number > 0:
                seconds[name].append(measured)
    flops = sum(training_flops(steps.model.config).values()) * args.train_batch_size
    results = {}
    for name, rows in seconds.items():
        medians = {part: statistics.median(row[part] for row in rows) for part in (*PARTS, "step")}
        rate = statistics.median(rates[name])
        results[name] = {
            "seconds": {part: round(value, 3) for part, value in medians.items()},
            "seconds_of_all_steps": [round(row["step"], 3) for row in rows],
            "images_per_second": round(args.train_batch_size / medians["step"], 3),
            "matrix_product_gflops_per_second": round(rate / 1e9),
            "model_gflops_per_second": round(flops / medians["step"] / 1e9, 1),
            "utilisation": round(flops / medians["step"] / rate, 3),
            "losses": [round(row["loss"], 5) for row in rows],
        }
    report = {
        "preset": args.preset,
        "compiled": args.compile,
        "train_batch_size": args.train_batch_size,
        "draws_per_token": steps.model.config.diffusion_batch_mul,
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gflops_per_step": round(flops / 1e9, 1),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "results": results,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in results.items():
        print(
            f"{name}: {result['seconds']['step']:.2f} s per step, {result['utilisation']:.0%} of a matrix product at "
            f"{result['matrix_product_gflops_per_second']} GFLOP/s. {result['seconds']}"
        )
    print(f"All figures are in {path}.")


if __name__ == "__main__":
    main()
