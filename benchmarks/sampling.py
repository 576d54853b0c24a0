#!/usr/bin/env python
"""How long sampling takes, where the time goes, and how it compares with a plainly written version of the algorithm.

    python benchmarks/sampling.py --batch_sizes 1 4 --output_path benchmarks/results/sampling_cpu.json
    python benchmarks/sampling.py --config benchmarks/configs/sampling_gpu_latency.yaml

Every combination of preset, type, steps, guidance and batch size is measured for every profile, for the compiled
pipeline and for the plain version, which goes by masks and computes every embedding in every denoising step, as one
would write it down first. All draw the same noise, round after round in turn, so that a machine that slows down slows
all of them; the exact profile's images are compared with the plain ones. Figures are medians of calls that nothing
interrupts; a further call tells the parts. Utilisation is the networks' floating-point operations
(`djepa_hf.accounting`) over what a matrix product of the same precision would have done in the time.
"""

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from machine import clock, device, peak_memory, processor, product_rate
from tqdm.auto import tqdm

from djepa_hf import DJEPAConfig, DJEPAModel, DJEPAPipeline
from djepa_hf.accounting import sampling_flops
from djepa_hf.arguments import option, parse_arguments
from djepa_hf.configuration_djepa import PRESETS
from djepa_hf.conversion.ldm_vae import KL16_SIZES
from djepa_hf.masking import num_masked_per_step
from djepa_hf.profiles import PROFILES, find_profile
from djepa_hf.schedulers import token_scheduler_for

PLAIN, COMPILED = "plain", "compiled"


@dataclass
class BenchmarkArguments:
    """What to measure."""

    presets: list[str] = option(["base"], "Which models (base, large, huge), with random weights.")
    objective: Literal["diffusion", "flow_matching"] = option("diffusion", "How tokens are denoised.")
    batch_sizes: list[int] = option([1, 4], "Images at a time.")
    num_inference_steps: list[int] = option([8], "Autoregressive steps.")
    num_denoising_steps: list[int] = option([25], "Denoising steps.")
    guidance_scales: list[float] = option([3.0], "1 does without, at half the cost.")
    dtypes: list[str] = option(["float32", "bfloat16"], "Of the weights.")
    profiles: list[str] = option(["exact"], "Of the pipeline.")
    with_compiled: bool = option(False, "Whether to measure each profile after `pipe.compile()`, too.")
    with_plain: bool = option(True, "Whether to measure the plain version, too.")
    with_vae: bool = option(True, "Whether to measure the autoencoder, too.")
    rounds: int = option(3, "Calls of each variant, after one that does not count.")
    output_path: str = option("benchmarks/results/sampling.json", "Where the figures go; the plot beside it.")

    def __post_init__(self):
        for kind in fields(self):
            if kind.name.endswith("s") and isinstance(getattr(self, kind.name), list) and not getattr(self, kind.name):
                raise ValueError(f"`{kind.name}` must hold at least one value.")
        for name in self.profiles:
            find_profile(name, self.objective)
        unknown = [name for name in self.presets if name not in PRESETS]
        if unknown:
            raise ValueError(f"`presets` must be in {list(PRESETS)}, got {unknown}.")
        if min(*self.batch_sizes, *self.num_inference_steps, *self.num_denoising_steps, self.rounds) < 1:
            raise ValueError("Batch sizes, steps and rounds must be at least 1.")


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
    is_guided, copies = (False, 1) if guidance_scale == 1.0 else (True, 2)
    for before, after in itertools.pairwise(num_masked):
        mask = ranks >= num_tokens - before
        chosen = mask & (ranks < num_tokens - after)
        null = torch.full_like(labels, model.config.num_labels)
        classes = torch.cat([labels, null]) if is_guided else labels
        both = mask.repeat(copies, 1)
        context = model.encode(tokens.repeat(copies, 1, 1), classes, both)
        features = model.predict(context, both)[chosen.repeat(copies, 1)]
        scale = 1 + (guidance_scale - 1) * (num_tokens - max(1, after)) / num_tokens
        # tokens in the order in which they are revealed, as the pipeline's draws of noise go
        x = latents[chosen]
        for timestep in scheduler.timesteps:
            noisy = x.repeat(copies, 1)
            output = model.denoise(noisy, timestep.expand(len(noisy)), features).float()
            width = x.shape[-1]
            if is_guided:
                output, null_output = output.chunk(2)
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
    pipe: DJEPAPipeline, labels: torch.Tensor, latents: torch.Tensor, order: torch.Tensor, **options
) -> torch.Tensor:
    """The same by the pipeline."""
    generator = torch.Generator(latents.device).manual_seed(0)
    inputs = {"latents": latents, "token_order": order, "generator": generator, "temperature": 1.0}
    return pipe(labels, output_type="latent", **inputs, **options).images


def timed(call: Callable) -> tuple[float, torch.Tensor]:
    """Seconds, and what was returned."""
    started = clock()
    result = call()
    return clock() - started, result


def measure_parts(model: DJEPAModel, call: Callable) -> dict[str, float]:
    """
    Seconds in the encoder and in the predictor. All else is denoising. The clock waits for the device, which makes the
    whole slower.
    """
    seconds = {"encoder": 0.0, "predictor": 0.0}

    def watch(part: str, function: Callable):
        def watched(*args, **kwargs):
            duration, result = timed(lambda: function(*args, **kwargs))
            seconds[part] += duration
            return result

        return watched

    model.encode, model.predict = watch("encoder", model.encode), watch("predictor", model.predict)
    try:
        total, _ = timed(call)
    finally:
        del model.encode, model.predict
    return {**seconds, "denoiser": total - sum(seconds.values())}


def random_pipeline(preset: str, objective: str, dtype: torch.dtype) -> DJEPAPipeline:
    """A pipeline of full size, with weights that do something everywhere."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = DJEPAModel(DJEPAConfig.from_preset(preset, objective=objective))
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return quiet(DJEPAPipeline(model.to(dtype).eval(), token_scheduler_for(objective)))


def quiet(pipe: DJEPAPipeline) -> DJEPAPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compiled_pipeline(preset: str, objective: str, dtype: torch.dtype) -> DJEPAPipeline:
    torch._dynamo.reset()  # programs of other presets and types count towards a limit
    pipe = random_pipeline(preset, objective, dtype)
    pipe.compile()
    return pipe


def measure_vae(dtype: torch.dtype, size: int, rounds: int) -> float:
    """Seconds in which the autoencoder decodes a batch of latents, 64 at a time."""
    with torch.device(device()):
        vae = AutoencoderKL(**KL16_SIZES).to(dtype).eval()
        latents = torch.randn(size, 16, 16, 16, dtype=dtype)
    with torch.no_grad():
        times = [timed(lambda: [vae.decode(some).sample for some in latents.split(64)])[0] for _ in range(rounds + 1)]
    return statistics.median(times[1:])


def measure_setting(
    args: BenchmarkArguments, pipes: dict[str, DJEPAPipeline], about: dict, options: dict
) -> list[dict]:
    """A row for each variant of one preset, type, batch size, number of steps and guidance."""
    config, dtype, size = pipes[""].transformer.config, getattr(torch, about["dtype"]), about["batch_size"]
    labels = torch.arange(size, device=device()) * 7 % config.num_labels
    noise = torch.randn(size, config.num_tokens, config.token_size, device=device())
    inputs = labels, noise, torch.rand(size, config.num_tokens, device=device()).argsort(-1)
    variants = {
        f"{profile}{', ' if kind else ''}{kind}": partial(pipeline_sample, pipe, *inputs, **options, profile=profile)
        for kind, pipe in pipes.items()
        for profile in args.profiles
    }
    if args.with_plain:
        variants[PLAIN] = partial(plain_sample, pipes[""], *inputs, **options)
    seconds, images, rates = {name: [] for name in variants}, {}, []
    for number in tqdm(range(args.rounds + 1), unit="round", desc=", ".join(map(str, about.values()))):
        rates.append(product_rate(dtype))
        for name, call in variants.items():
            duration, images[name] = timed(call)
            if number > 0:
                seconds[name].append(duration)
    rows, rate = [], statistics.median(rates)
    vae = measure_vae(dtype, size, args.rounds) if args.with_vae else None
    for name, call in variants.items():
        profile, _, kind = name.partition(", ")
        steps = [options["num_inference_steps"], options["num_denoising_steps"]]
        done = pipes[""].expand_profile(profile if profile in PROFILES else "exact", *steps)
        del done["solver"]
        flops = sampling_flops(config, guidance_scale=options["guidance_scale"], **done)
        total, flops = statistics.median(seconds[name]), size * sum(flops.values())
        parts = measure_parts(pipes[kind].transformer, call) | ({} if vae is None else {"vae": vae})
        row = {
            "variant": name,
            **about,
            **options,
            "seconds": total,
            "seconds_of_parts": parts,
            "milliseconds_per_image": 1000 * total / size,
            "images_per_second": size / total,
            "gflops_per_image": flops / size / 1e9,
            "matrix_product_gflops_per_second": rate / 1e9,
            "utilisation": flops / total / rate,
        }
        if args.with_plain:
            row["times_as_fast_as_plain"] = statistics.median(seconds[PLAIN]) / total
            if profile in ("exact", PLAIN):
                difference = (images[name] - images[PLAIN]).norm() / images[PLAIN].norm()
                row["relative_difference_from_plain"] = difference.item()
        rows.append(rounded(row))
        print(json.dumps(rows[-1]))
    return rows


def rounded(row: dict) -> dict:
    """Four significant digits."""
    return {
        name: rounded(value)
        if isinstance(value, dict)
        else float(f"{value:.4g}")
        if isinstance(value, float)
        else value
        for name, value in row.items()
    }


def plot(rows: list[dict], path: Path, title: str):
    """Milliseconds per image of every variant, part by part. The parts' shares are those of the call that told them."""
    from matplotlib.figure import Figure

    names = ("variant", "preset", "dtype", "batch_size", "num_inference_steps", "num_denoising_steps", "guidance_scale")
    changing = [name for name in names if len({row[name] for row in rows}) > 1]
    short = {"batch_size": "batch {}", "num_inference_steps": "K = {}", "num_denoising_steps": "T = {}"}
    short |= {"guidance_scale": "guidance {}"}
    labels = [", ".join(short.get(name, "{}").format(row[name]) for name in changing) for row in rows]
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.6), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(rows)
    for part in rows[0]["seconds_of_parts"]:
        widths = []
        for row in rows:
            parts = dict(row["seconds_of_parts"])
            vae = parts.pop("vae", 0.0)
            share = vae if part == "vae" else parts[part] / sum(parts.values()) * row["seconds"]
            widths.append(1000 * share / row["batch_size"])
        axes.barh(range(len(rows)), widths, left=left, label={"vae": "autoencoder"}.get(part, part))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="milliseconds per image", title=title, yticks=range(len(rows)), yticklabels=labels)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None):
    (args,) = parse_arguments(BenchmarkArguments, argv=argv, description=__doc__)
    path = Path(args.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    machine |= {"objective": args.objective, "date": time.strftime("%Y-%m-%d")}
    rows = []
    for preset, dtype in itertools.product(args.presets, args.dtypes):
        kind = preset, args.objective, getattr(torch, dtype)
        pipes = {"": random_pipeline(*kind)} | ({COMPILED: compiled_pipeline(*kind)} if args.with_compiled else {})
        settings = args.num_inference_steps, args.num_denoising_steps, args.guidance_scales, args.batch_sizes
        for inference_steps, denoising_steps, guidance_scale, size in itertools.product(*settings):
            options = {"num_inference_steps": inference_steps, "num_denoising_steps": denoising_steps}
            options["guidance_scale"] = guidance_scale
            about = {"preset": preset, "dtype": dtype, "batch_size": size}
            rows += measure_setting(args, pipes, about, options)
            # after every setting: what is measured is not lost with the rest
            report = {**machine, "peak_memory_gib": round(peak_memory() / 2**30, 2), "results": rows}
            path.write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, path.with_suffix(".png"), processor())
    print(f"All figures are in {path}, a plot in {path.with_suffix('.png')}.")


if __name__ == "__main__":
    main()
