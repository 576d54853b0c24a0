#!/usr/bin/env python
"""Draw docs/architecture.png: D-JEPA in training, and the order in which sampling reveals tokens.

python docs/draw_architecture.py
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from djepa_hf.masking import num_masked_per_step, random_token_order

SIDE, STEPS = 6, 6
VISIBLE, HIDDEN, NEW = "#4c78a8", "#e4e4e4", "#f58518"
ONLINE, AVERAGE, LOSS = "#dce8f5", "#eaeaea", "#fde3c8"


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.7, height: float = 0.8):
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=style, fc=colour, ec="#555"))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple, end: tuple, text: str = "", dashed: bool = False, head: bool = True):
    style = {"arrowstyle": "-|>" if head else "-", "mutation_scale": 11, "color": "#333"}
    style["linestyle"] = "--" if dashed else "-"
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        offset = (0.06, 0) if start[0] == end[0] else (0, 0.12)
        align = "left" if start[0] == end[0] else "center"
        axes.text(middle[0] + offset[0], middle[1] + offset[1], text, ha=align, va="center", fontsize=8, color="#333")


def grid(axes: Axes, x: float, y: float, colours: list[str], size: float):
    cell = size / SIDE
    for i, colour in enumerate(colours):
        row, column = divmod(i, SIDE)
        corner = (x + column * cell, y + size - (row + 1) * cell)
        axes.add_patch(Rectangle(corner, cell, cell, fc=colour, ec="white", lw=0.8))


def draw_training(axes: Axes, hidden: list[bool]):
    grid(axes, 0.1, 1.55, [HIDDEN if h else VISIBLE for h in hidden], 1.2)
    axes.text(0.7, 2.95, "tokens, 70–100% hidden", ha="center", fontsize=8)
    box(axes, 2.75, 2.15, "context encoder φ", ONLINE)
    axes.text(2.75, 3.35, "buffer tokens\n+ class", ha="center", fontsize=8)
    arrow(axes, (2.75, 3.2), (2.75, 2.58))
    arrow(axes, (1.35, 2.15), (1.88, 2.15), "visible")
    box(axes, 5.15, 2.15, "feature predictor γ", ONLINE)
    axes.text(5.15, 3.5, "mask tokens", ha="center", fontsize=8)
    arrow(axes, (5.15, 3.4), (5.15, 2.58))
    arrow(axes, (3.62, 2.15), (4.28, 2.15))
    box(axes, 7.75, 2.75, "denoising MLP $ε_θ$\n(per token)", ONLINE)
    box(axes, 7.75, 1.45, "head $u_θ$", ONLINE, height=0.6)
    arrow(axes, (6.02, 2.3), (6.88, 2.7), "z")
    arrow(axes, (6.02, 2.0), (6.88, 1.5))
    axes.text(7.75, 3.75, "noisy hidden token, t", ha="center", fontsize=8)
    arrow(axes, (7.75, 3.65), (7.75, 3.18))
    box(axes, 10.2, 2.75, "$L_d$: diffusion or\nflow matching", LOSS)
    arrow(axes, (8.62, 2.75), (9.33, 2.75))
    box(axes, 10.2, 1.45, "$L_p$: smooth L1", LOSS, height=0.6)
    arrow(axes, (8.62, 1.45), (9.33, 1.45))
    box(axes, 2.75, 0.5, "target encoder φ̄", AVERAGE, height=0.6)
    arrow(axes, (0.7, 1.5), (0.7, 0.5), head=False)
    arrow(axes, (0.7, 0.5), (1.88, 0.5), "all tokens")
    arrow(axes, (2.75, 1.73), (2.75, 0.82), "moving average", dashed=True)
    arrow(axes, (3.62, 0.5), (10.2, 0.5), "target features, no gradient", head=False)
    arrow(axes, (10.2, 0.5), (10.2, 1.13))
    axes.set(xlim=(0, 11.2), ylim=(0.05, 4.0), aspect="equal")
    axes.set_title("Training", loc="left", fontsize=11, fontweight="bold")


def draw_sampling(axes: Axes, order: list[int], masked: list[int]):
    for step in range(STEPS + 1):
        done = SIDE**2 - masked[step]
        before = SIDE**2 - masked[max(0, step - 1)]
        colours = [HIDDEN] * SIDE**2
        for place, token in enumerate(order[:done]):
            colours[token] = VISIBLE if place < before else NEW
        x = 0.2 + step * 1.58
        grid(axes, x, 0.45, colours, 1.15)
        text = "all hidden" if step == 0 else f"step {step}: {done - before} new"
        axes.text(x + 0.575, 0.2, text, ha="center", fontsize=8)
        if step:
            arrow(axes, (x - 0.4, 1.02), (x - 0.06, 1.02))
    axes.set(xlim=(0, 11.2), ylim=(0.05, 1.75), aspect="equal")
    title = f"Sampling: {STEPS} autoregressive steps, random order, cosine schedule"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")


def main():
    order = random_token_order(1, SIDE**2, generator=torch.Generator().manual_seed(4))[0].tolist()
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    training, sampling = figure.subplots(2, 1, height_ratios=(3.95, 1.7))
    visible = set(order[:8])
    draw_training(training, [i not in visible for i in range(SIDE**2)])
    draw_sampling(sampling, order, num_masked_per_step(SIDE**2, STEPS))
    for axes in (training, sampling):
        axes.axis("off")
    figure.savefig(Path(__file__).parent / "architecture.png", dpi=110)


if __name__ == "__main__":
    main()
