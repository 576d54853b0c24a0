#!/usr/bin/env python
"""What cheaper sampling costs in quality: Fréchet distance over the networks' work, for every way to save some.

    python benchmarks/quality.py --pipeline outputs/digits --config outputs/digits/sampling.yaml --reference digits \\
        --extractor classifier --classifier_data digits --num_images 1000 --num_denoising_steps 50 \\
        --output_dir outputs/quality_digits --output_path benchmarks/results/quality_digits.json

The options of the command line are the reference, by which work is measured; each setting changes some of them. All
settings draw the same noise for a seed, so that their differences say more than the spread over seeds. A run that was
killed goes on. Work are the floating-point operations of `djepa_hf.accounting`.
"""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from machine import processor
from tqdm.auto import tqdm

from djepa_hf import DJEPAPipeline
from djepa_hf.accounting import sampling_flops
from djepa_hf.arguments import SamplingArguments, option, parse_arguments
from djepa_hf.engines import start_processes
from djepa_hf.evaluation.arguments import EvaluationArguments
from djepa_hf.evaluation.protocol import PROFILED, Evaluation, Protocol, check_protocol
from djepa_hf.profiles import PROFILES
from djepa_hf.schedulers import SOLVERS

SHARES = (0.5, 0.25, 0.16, 0.12, 0.08)  # of the denoising steps
REFERENCE = "reference"


@dataclass
class QualityArguments:
    """How often to measure, and where figures go."""

    seeds: list[int] = option([0, 1, 2], "Each gives a sample of its own.")
    output_path: str = option("benchmarks/results/quality.json", "Where the figures go; the plot beside it.")


def settings(objective: str, sampling: dict) -> Iterator[tuple[str, str, dict]]:
    """Kind, name and changed options of every setting."""
    inference_steps, denoising_steps = sampling["num_inference_steps"], sampling["num_denoising_steps"]
    yield REFERENCE, REFERENCE, {}
    for solver in SOLVERS[objective]:
        for steps in sorted({max(2, round(share * denoising_steps)) for share in SHARES}, reverse=True):
            yield solver, f"{steps} steps", {"solver": solver, "num_denoising_steps": steps}
    for share in (0.5, 0.2, 0.1):
        last = max(1, round(share * denoising_steps))
        yield "shrinking steps", f"{denoising_steps} to {last}", {"final_denoising_steps": last}
    for interval in (2, 3, 5):
        yield "null class now and then", f"every {interval}", {"null_refresh_interval": interval}
    for share in (0.75, 0.5, 0.25):
        steps = max(1, round(share * inference_steps))
        for order in ("random", "checkerboard"):
            changes = {"num_inference_steps": steps, "token_order": order}
            yield f"fewer autoregressive steps, {order}", f"{steps}", changes
    yield "checkerboard", f"{inference_steps}", {"token_order": "checkerboard"}
    for profile in PROFILES:
        if profile != "exact":
            yield "profiles", profile, {"profile": profile}


def work(pipe: DJEPAPipeline, sampling: dict) -> float:
    """Floating-point operations of the networks for one image."""
    asked = {name: sampling[name] for name in PROFILED if name in sampling}
    done = pipe.expand_profile(sampling.get("profile", "exact"), **asked)
    del done["solver"]
    return sum(sampling_flops(pipe.transformer.config, guidance_scale=sampling["guidance_scale"], **done).values())


def plot(rows: list[dict], path: Path, title: str):
    """Distance over work, a colour for each kind of saving."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, kinds = figure.subplots(), list(dict.fromkeys(row["kind"] for row in rows))
    for number, kind in enumerate(kinds):
        some = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["work"])
        style = {"marker": "o", "color": f"C{number}"} if kind != REFERENCE else {"marker": "*", "color": "black"}
        style |= {"markersize": 12} if kind in (REFERENCE, "profiles") else {"linewidth": 1}
        style |= {"linestyle": "none", "marker": "P"} if kind == "profiles" else {}
        axes.plot([row["work"] for row in some], [row["frechet_distance"] for row in some], label=kind, **style)
        for row in some:
            place = (row["work"], row["frechet_distance"])
            axes.annotate(row["name"], place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.axhline(rows[0]["frechet_distance"], color="grey", linewidth=0.5)
    axes.set(xscale="log", xlabel="work, as a share of the reference's", ylabel="Fréchet distance", title=title)
    axes.set_xticks(ticks := [0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(0.9 * min(row["work"] for row in rows), 1.3))
    axes.set(ylim=(None, 2 * rows[0]["frechet_distance"]))  # what is worse than that needs no second look
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None):
    args, quality, sampling = parse_arguments(
        EvaluationArguments, QualityArguments, SamplingArguments, argv=argv, description=__doc__
    )
    state, folder, path = start_processes(), args.folder("quality"), Path(quality.output_path)
    pipe = args.load_pipeline(state.device)
    base = sampling.call_options(pipe.transformer.config.num_tokens)
    cells = []
    for kind, name, changes in settings(pipe.transformer.config.objective, base):
        cells.append((kind, name, {**base, **changes}))
        check_protocol(pipe, Protocol(args.num_images, cells[-1][2], batch_size=args.batch_size))
    args.reference_images().check()
    extractor = args.load_extractor(pipe)
    evaluation = Evaluation(pipe, args.pipeline, extractor, args.load_reference(pipe, extractor, state), state)
    rows, results = [], {}
    for kind, name, options in tqdm(cells, unit="setting"):
        measured = []
        for seed in quality.seeds:
            protocol = Protocol(args.num_images, options, seed=seed, batch_size=args.batch_size)
            place = folder / f"{kind}_{name}_{seed}".replace(" ", "_").replace(",", "")
            measured.append(evaluation.measure(place, protocol, title=f"{kind}, {name}, seed {seed}"))
        if not state.is_main_process:
            continue
        metrics = [result["metrics"] for result in measured]
        row = {"kind": kind, "name": name, "options": options, "work": work(pipe, options) / work(pipe, base)}
        for figure in ("frechet_distance", "class_agreement"):
            if figure in metrics[0]:
                row[figure] = round(statistics.mean(each[figure] for each in metrics), 4)
        distances = [each["frechet_distance"] for each in metrics]
        row["frechet_distance_std"] = round(statistics.stdev(distances), 4) if len(distances) > 1 else None
        results[kind, name] = distances
        differences = [a / b - 1 for a, b in zip(distances, results[REFERENCE, REFERENCE], strict=True)]
        row["change_from_reference"] = round(statistics.mean(differences), 4)
        rows.append({**row, "work": round(row["work"], 4)})
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            name: measured[0]["protocol"][name] for name in ("pipeline", "weights_sha256", "objective", "extractor")
        }
        about |= {"num_images": args.num_images, "seeds": quality.seeds, "device": processor()}
        path.write_text(json.dumps({**about, "date": time.strftime("%Y-%m-%d"), "results": rows}, indent=2) + "\n")
        plot(
            rows,
            path.with_suffix(".png"),
            f"{Path(args.pipeline).name}, {len(quality.seeds)} x {args.num_images} images",
        )
        print(f"All figures are in {path}, a plot in {path.with_suffix('.png')}.")


if __name__ == "__main__":
    main()
