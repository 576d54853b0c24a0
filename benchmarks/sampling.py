#!/usr/bin/env python
"""How long sampling takes, where the time goes, and how it compares with a plainly written version of the algorithm.

    python benchmarks/sampling.py --batch_sizes 1 4 --output_path benchmarks/results/sampling_cpu.json

Every variant draws the same images, round after round in turn, so that a machine that slows down slows all of them.
Figures are medians. The plain version goes by masks and computes every embedding in every denoising step, as one
would write it down first; images of both are compared in the same run. Utilisation is the networks' floating-point
operations (`djepa_hf.accounting`) over what a matrix product of the same precision would have done in the time.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from machine import clock, device, processor, product_rate
from tqdm.auto import tqdm

from djepa_hf import DJEPAConfig, DJEPAModel, DJEPAPipeline
from djepa_hf.accounting import sampling_flops
from djepa_hf.arguments import option, parse_arguments
from djepa_hf.masking import num_masked_per_step
from djepa_hf.schedulers import token_scheduler_for

PARTS = ("encoder", "predictor", "denoiser")


@dataclass
class BenchmarkArguments:
    """What to measure."""

    preset: Literal["base", "large", "huge"] = option("base", "Which model, with random weights.")
    objective: Literal["diffusion", "flow_matching"] = option("diffusion", "How tokens are denoised.")
    batch_sizes: list[int] = option([1, 4], "Images at a time.")
    num_inference_steps: int = option(8, "Autoregressive steps.")
    num_denoising_steps: int = option(25, "Denoising steps.")
    guidance_scale: float = option(3.0, "1 does without, at half the cost.")
    dtypes: list[str] = option(["float32", "bfloat16"], "Of the weights.")
    rounds: int = option(3, "Calls of each variant, after one that does not count.")
    with_plain: bool = option(True, "Whether to measure the plain version, too.")
    output_path: str = option("benchmarks/results/sampling.json", "Where the figures go; the plot beside it.")


@torch.no_grad()
def plain_sample(pipe: DJEPAPipeline, labels: torch.Tensor, latents: torch.Tensor, order: torch.Tensor, **options):
    """Algorithm 1, one line after the other; `(B, num_channels, *sample_size)`."""
    model, scheduler, guidance_scale = pipe.transformer, pipe.scheduler, options["guidance_scale"]
    num_tokens, size = model.config.num_tokens, len(labels)
    generator = torch.Generator(latents.device).manual_seed(0)
    scheduler.set_timesteps(options["num_denoising_steps"], device=latents.device)
    ranks = order.argsort(-1)  # when each token is revealed
    tokens = torch.zeros_like(latents)
    num_masked = num_masked_per_step(num_tokens, options["num_inference_steps"])
    null = torch.full_like(labels, model.config.num_labels)
    for before, after in itertools.pairwise(num_masked):
        mask = ranks >= num_tokens - before
        chosen = mask & (ranks < num_tokens - after)
        both = torch.cat([mask, mask])
        context = model.encode(torch.cat([tokens, tokens]), torch.cat([labels, null]), both)
        features = model.predict(context, both)[torch.cat([chosen, chosen])]
        scale = 1 + (guidance_scale - 1) * (num_tokens - max(1, after)) / num_tokens
        # tokens in the order in which they are revealed, as the pipeline's draws of noise go
        x = latents[chosen]
        for timestep in scheduler.timesteps:
            noisy = torch.cat([x, x])
            output = model.denoise(noisy, timestep.expand(len(noisy)), features).float()
            output, null_output = output.chunk(2)
            width = x.shape[-1]
            guided = null_output[:, :width] + scale * (output[:, :width] - null_output[:, :width])
            output = torch.cat([guided, output[:, width:]], dim=-1)
            noise = torch.randn((size, len(x) // size, width), generator=generator, device=x.device)
            noise = noise.gather(1, places_by_rank(ranks, chosen, size).unsqueeze(-1).expand_as(noise)).flatten(0, 1)
            x = scheduler.step(output, timestep, x, temperature=1.0, variance_noise=noise).prev_sample
        tokens[chosen] = x
    return model.unpatchify(tokens)


def places_by_rank(ranks: torch.Tensor, chosen: torch.Tensor, size: int) -> torch.Tensor:
    """The rank among the chosen of each chosen token, in the order of the grid: `(B, n)`."""
    found = ranks[chosen].reshape(size, -1)
    return found - found.amin(1, keepdim=True)


def pipeline_sample(
    pipe: DJEPAPipeline, labels: torch.Tensor, latents: torch.Tensor, order: torch.Tensor, options: dict
) -> torch.Tensor:
    """The same by the pipeline."""
    generator = torch.Generator(latents.device).manual_seed(0)
    inputs = {"latents": latents, "token_order": order, "generator": generator, "temperature": 1.0}
    return pipe(labels, output_type="latent", **inputs, **options).images


class Timers:
    """Seconds in each network, by hooks on its parts."""

    def __init__(self, model: DJEPAModel):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for name in PARTS:
            module = getattr(model, name)
            module.register_forward_pre_hook(lambda *_, name=name: self._add(name, -clock()))
            module.register_forward_hook(lambda *_, name=name: self._add(name, clock()))

    def _add(self, name: str, seconds: float):
        self.seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """What was counted since the last time."""
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


def random_pipeline(args: BenchmarkArguments, dtype: torch.dtype) -> DJEPAPipeline:
    """A pipeline of full size, with weights that do something everywhere."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = DJEPAModel(DJEPAConfig.from_preset(args.preset, objective=args.objective))
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    pipe = DJEPAPipeline(model.to(dtype).eval(), token_scheduler_for(args.objective))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(call: Callable, timers: Timers) -> tuple[dict[str, float], torch.Tensor]:
    timers.take()
    started = clock()
    images = call()
    seconds = clock() - started
    return {**timers.take(), "total": seconds}, images


def plot(results: list[dict], path: Path, title: str):
    """Milliseconds per image of every variant, part by part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(results) + 1.6), layout="constrained")
    axes, names = figure.subplots(), [f"{r['variant']}, {r['dtype']}, batch {r['batch_size']}" for r in results]
    left = [0.0] * len(results)
    for part in (*PARTS, "rest"):
        widths = [1000 * result["seconds"][part] / result["batch_size"] for result in results]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds per image", title=title)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None):
    (args,) = parse_arguments(BenchmarkArguments, argv=argv, description=__doc__)
    path = Path(args.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {name: getattr(args, name) for name in ("num_inference_steps", "num_denoising_steps", "guidance_scale")}
    results = []
    for dtype in args.dtypes:
        pipe = random_pipeline(args, getattr(torch, dtype))
        timers, config = Timers(pipe.transformer), pipe.transformer.config
        for size in args.batch_sizes:
            labels = torch.arange(size, device=device()) * 7 % config.num_labels
            noise = torch.randn(size, config.num_tokens, config.token_size, device=device())
            order = torch.rand(size, config.num_tokens, device=device()).argsort(-1)
            variants = {"pipeline": partial(pipeline_sample, pipe, labels, noise, order, options)}
            if args.with_plain:
                variants["plain"] = partial(plain_sample, pipe, labels, noise, order, **options)
            rows = {name: [] for name in variants}
            images, rates = {}, []
            for number in tqdm(range(args.rounds + 1), unit="round", desc=f"{dtype}, batch {size}"):
                rates.append(product_rate(getattr(torch, dtype)))
                for name, call in variants.items():
                    row, images[name] = measure(call, timers)
                    if number > 0:
                        rows[name].append(row)
            flops = size * sum(sampling_flops(config, **options).values())
            for name in variants:
                seconds = {part: statistics.median(row[part] for row in rows[name]) for part in (*PARTS, "total")}
                seconds["rest"] = max(0.0, seconds["total"] - sum(seconds[part] for part in PARTS))
                rate = statistics.median(rates)
                results.append(
                    {
                        "variant": name,
                        "dtype": dtype,
                        "batch_size": size,
                        "seconds": {part: round(value, 4) for part, value in seconds.items()},
                        "images_per_second": float(f"{size / seconds['total']:.4g}"),
                        "gflops": round(flops / 1e9, 1),
                        "matrix_product_gflops_per_second": round(rate / 1e9),
                        "utilisation": round(flops / seconds["total"] / rate, 3),
                    }
                )
                print(json.dumps(results[-1]))
            if args.with_plain:
                difference = (images["pipeline"] - images["plain"]).norm() / images["plain"].norm()
                results[-1]["relative_difference_of_images"] = results[-2]["relative_difference_of_images"] = float(
                    f"{difference.item():.2g}"
                )
    about = {"preset": args.preset, "objective": args.objective, **options, "device": processor()}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    path.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    title = f"{args.preset}, K = {args.num_inference_steps}, T = {args.num_denoising_steps}, {processor()}"
    plot(results, path.with_suffix(".png"), title)
    print(f"All figures are in {path}, a plot in {path.with_suffix('.png')}.")


if __name__ == "__main__":
    main()
