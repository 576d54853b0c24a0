#!/usr/bin/env python
"""Which settings are best, and how few steps suffice: guidance x temperature (paper, Figure 4), then steps (Figure 5).

    python examples/grid_search.py --pipeline outputs/digits --config outputs/digits/sampling.yaml \\
        --reference digits --extractor classifier --classifier_data digits --num_images 1000 --refinements 2

First every guidance scale with every temperature; with `--refinements`, the neighbourhood of the best cell half as far
away, again and again, so that a coarse grid does. Then, with the best of them, curves over autoregressive and over
denoising steps, for every solver. Every cell is an evaluation of its own (see evaluate_pipeline.py), which is not done
twice: a search that was killed goes on, and more values can be added to one that has ended.

Writes `grid.json`, `grid.md`, `grid.png` and `steps.png`.
"""

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate.utils import broadcast_object_list

from djepa_hf.arguments import SamplingArguments, option, parse_arguments
from djepa_hf.engines import start_processes
from djepa_hf.evaluation.arguments import EvaluationArguments
from djepa_hf.evaluation.protocol import Evaluation, Protocol, check_protocol
from djepa_hf.evaluation.report import figures, markdown_table, name_of
from djepa_hf.json_files import write_json


@dataclass
class GridArguments:
    """Where to look."""

    guidance_scales: list[float] = option([1.0, 1.25, 1.5, 2.0, 3.0], "Of the coarse grid.")
    temperatures: list[float] = option([0.9, 0.95, 1.0, 1.05], "Of the coarse grid.")
    refinements: int = option(0, "How often to halve the distances around the best cell.")
    inference_steps: list[int] = option([], "Autoregressive steps to compare; powers of 2 if not given.")
    denoising_steps: list[int] = option([5, 10, 25, 50, 100], "Denoising steps to compare.")
    solvers: list[str] = option([], "Solvers to compare; the pipeline's own if not given.")

    def __post_init__(self):
        for name in ("guidance_scales", "temperatures"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must hold at least one value.")
        if self.refinements < 0:
            raise ValueError(f"`refinements` must not be negative, got {self.refinements}.")


@dataclass
class Search:
    """All that a cell needs, and the cells so far."""

    evaluation: Evaluation
    folder: Path
    protocol: Protocol
    results: dict[str, dict] = field(default_factory=dict)  # by the name of the cell

    def cell(self, **sampling) -> dict:
        """The evaluation with some options changed; on all processes."""
        protocol = self.changed(**sampling)
        options = protocol.sampling
        name = "_".join(f"{short}{options[long]:g}" for short, long in NAMES.items())
        name += f"_{options['solver']}" if options.get("solver") else ""
        folder = self.folder / "cells" / name
        result = self.evaluation.measure(folder, protocol, title=name)
        (result,) = broadcast_object_list([result])
        if self.evaluation.state.is_main_process:
            shutil.rmtree(folder / "batches", ignore_errors=True)  # the result holds what is asked of them
        self.results[name] = result
        return result

    def changed(self, **sampling) -> Protocol:
        """The protocol with some options changed."""
        return replace(self.protocol, sampling={**self.protocol.sampling, **sampling})

    @property
    def num_tokens(self) -> int:
        """Of the model."""
        return self.evaluation.pipe.transformer.config.num_tokens


NAMES = {
    "guidance": "guidance_scale",
    "temperature": "temperature",
    "steps": "num_inference_steps",
    "denoising": "num_denoising_steps",
}


def distance(result: dict) -> float:
    return result["metrics"]["frechet_distance"]


def search_grid(search: Search, args: GridArguments) -> list[dict]:
    """Evaluations of the grid, coarse to fine."""
    cells = {}

    def visit(guidance: float, temperature: float):
        place = round(guidance, 6), round(temperature, 6)
        if place not in cells:
            cells[place] = search.cell(guidance_scale=place[0], temperature=place[1])

    for guidance in args.guidance_scales:
        for temperature in args.temperatures:
            visit(guidance, temperature)
    for _ in range(args.refinements):
        guidance, temperature = min(cells, key=lambda place: distance(cells[place]))
        around = [
            [value, *((value + other) / 2 for other in neighbours(value, {place[axis] for place in cells}))]
            for axis, value in enumerate((guidance, temperature))
        ]
        for other_guidance in around[0]:
            for other_temperature in around[1]:
                visit(other_guidance, other_temperature)
    return [cells[place] for place in sorted(cells)]


def neighbours(value: float, values: set[float]) -> list[float]:
    """The next smaller and the next larger one, where there are such."""
    smaller, larger = [v for v in values if v < value], [v for v in values if v > value]
    return [*([max(smaller)] if smaller else []), *([min(larger)] if larger else [])]


def search_steps(search: Search, args: GridArguments, best: dict) -> dict[str, dict[str, list[dict]]]:
    """Evaluations over each kind of steps, by solver; everything else as in the best cell."""
    sampling = {name: best["protocol"]["sampling"][name] for name in ("guidance_scale", "temperature")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    steps = steps_to_compare(args, search.num_tokens)
    return {
        solver or best["protocol"]["solver"]: {
            name: [
                search.cell(**sampling, **({"solver": solver} if solver else {}), **{name: value}) for value in values
            ]
            for name, values in steps.items()
        }
        for solver in args.solvers or [None]
    }


def steps_to_compare(args: GridArguments, num_tokens: int) -> dict[str, list[int]]:
    """Numbers of each kind of steps."""
    powers = [2**i for i in range(1, int(math.log2(min(num_tokens, 256))) + 1)]
    return {
        "num_inference_steps": sorted(set(args.inference_steps or powers)),
        "num_denoising_steps": sorted(set(args.denoising_steps)),
    }


def check_values(search: Search, args: GridArguments):
    """Raises a `ValueError`, before anything is sampled, for the first value that cannot be right."""
    pipe = search.evaluation.pipe
    values = {"guidance_scale": args.guidance_scales, "temperature": args.temperatures}
    for name, choices in {**values, **steps_to_compare(args, search.num_tokens)}.items():
        for value in choices:
            check_protocol(pipe, search.changed(**{name: value}))
    for solver in args.solvers:
        check_protocol(pipe, search.changed(solver=solver))


def plot_grid(results: list[dict], path: Path, title: str):
    """A heat map for each figure that says how good a cell is, the best cell marked."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    panels = {"frechet_distance": min, "inception_score": max, "class_agreement": max}
    panels = {name: best for name, best in panels.items() if name in results[0]["metrics"]}
    places = [(r["protocol"]["sampling"]["guidance_scale"], r["protocol"]["sampling"]["temperature"]) for r in results]
    columns, rows = (sorted({place[axis] for place in places}) for axis in (0, 1))
    size = (1.2 + 0.62 * len(columns)) * len(panels), 1.6 + 0.36 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    for axes, (name, best) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        values = {place: result["metrics"][name] for place, result in zip(places, results, strict=True)}
        table = [[values.get((column, row), math.nan) for column in columns] for row in rows]
        axes.imshow(table, origin="lower", aspect="auto", cmap="viridis_r" if best is min else "viridis")
        winner = best(values, key=values.get)
        low, high = min(values.values()), max(values.values())
        for (column, row), value in values.items():
            x, y = columns.index(column), rows.index(row)
            share = (value - low) / ((high - low) or 1)
            is_dark = share > 0.6 if best is min else share < 0.4
            axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=7, color="white" if is_dark else "black")
            if (column, row) == winner:
                frame = {"fill": False, "edgecolor": "red", "linewidth": 2, "clip_on": False, "zorder": 3}
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **frame))
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns], rotation=45, fontsize=7)
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows], fontsize=7)
        axes.set(xlabel="guidance scale", ylabel="temperature")
        axes.set_title(name_of(name, results[0]), fontsize=10)
    figure.savefig(path, dpi=120)


LABELS = {
    "num_inference_steps": "autoregressive steps",
    "num_denoising_steps": "denoising steps",
}


def plot_steps(curves: dict[str, dict[str, list[dict]]], path: Path, title: str):
    """Quality against each kind of steps, and seconds per image on a second axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(1, 2), ("num_inference_steps", "num_denoising_steps"), strict=True):
        other = axes.twinx()
        for i, (solver, results) in enumerate(curves.items()):
            steps = [result["protocol"]["sampling"][name] for result in results[name]]
            axes.plot(steps, [distance(r) for r in results[name]], marker="o", color=f"C{i}", label=solver)
            milliseconds = [1000 / result["environment"]["images_per_second"] for result in results[name]]
            other.plot(steps, milliseconds, marker=".", linestyle=":", color=f"C{i}", alpha=0.7)
        axes.set(xlabel=LABELS[name], ylabel=name_of("frechet_distance", results[name][0]), xscale="log")
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
        other.set_ylabel("milliseconds per image (dotted)")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None):
    args, grid, sampling = parse_arguments(
        EvaluationArguments, GridArguments, SamplingArguments, argv=argv, description=__doc__
    )
    state, folder = start_processes(), args.folder("grid")
    pipe = args.load_pipeline(state.device)
    args.reference_images().check()
    extractor = args.load_extractor(pipe)
    reference = args.load_reference(pipe, extractor, state)
    protocol = Protocol(
        num_images=args.num_images,
        sampling=sampling.call_options(pipe.transformer.config.num_tokens),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    search = Search(Evaluation(pipe, args.pipeline, extractor, reference, state), folder, protocol)
    check_values(search, grid)
    cells = search_grid(search, grid)
    best = min(cells, key=distance)
    curves = search_steps(search, grid, best)
    if not state.is_main_process:
        return
    write_json(folder / "grid.json", {"best": best, "cells": cells, "curves": curves})
    (folder / "grid.md").write_text(markdown_table(list(search.results.values())))
    title = f"{Path(args.pipeline).name}, {args.num_images} images against {args.reference}"
    plot_grid(cells, folder / "grid.png", title)
    plot_steps(curves, folder / "steps.png", title)
    found = best["protocol"]["sampling"]
    values = ", ".join(f"{name} {value}" for name, value in figures(best).items())
    print(f"Best: guidance {found['guidance_scale']:g}, temperature {found['temperature']}: {values}.")
    print(f"Look at {folder / 'grid.png'} and {folder / 'steps.png'}.")


if __name__ == "__main__":
    main()
