"""Pictures that people look at: grids of samples and loss curves. Loss curves need the `train` extra."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MIN_TILE = 48  # pixels: a grid of digits can be read


def labelled_grid(
    rows: list[tuple[str, list[Image.Image]]], columns: list[str] | None = None, min_tile: int = MIN_TILE
) -> Image.Image:
    """
    Images in rows, each with its label in front.

    Args:
        rows (`list[tuple[str, list[PIL.Image.Image]]]`): label and images of each row; all images of one size.
        columns (`list[str]`, *optional*): labels above the columns.
        min_tile (`int`): smaller images are enlarged to this many pixels, by whole factors.
    """
    width, height = rows[0][1][0].size
    zoom = max(1, -(-min_tile // min(width, height)))
    width, height, gap = width * zoom, height * zoom, max(2, width * zoom // 24)
    font = ImageFont.load_default(size=max(12, min(28, height // 3)))
    margin = gap + max(round(font.getlength(label)) for label, _ in rows) + 2 * gap
    head = 0 if columns is None else gap + round(1.5 * font.size)
    column_width = width + gap
    if columns is not None:
        column_width = max(column_width, *(round(font.getlength(label)) + 2 * gap for label in columns))
    count = max(len(images) for _, images in rows)
    grid = Image.new("RGB", (margin + count * column_width, head + gap + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(columns or []):
        draw.text((margin + column * column_width + width // 2, head), label, fill="black", font=font, anchor="mb")
    for row, (label, images) in enumerate(rows):
        top = head + gap + row * (height + gap)
        draw.text((margin - 2 * gap, top + height // 2), label, fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            image = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(image, (margin + column * column_width, top))
    return grid


def film_strip(folder: Path) -> Image.Image:
    """
    How pictures changed over training: a row per step, in order.

    Args:
        folder (`Path`): with pictures called `STEP-NUMBER.png`.
    """
    frames: dict[str, list[Image.Image]] = {}
    for path in sorted(folder.glob("*.png")):
        frames.setdefault(str(int(path.stem.split("-")[0])), []).append(Image.open(path))
    return labelled_grid(list(frames.items()))


def plot_losses(steps: list[int], losses: dict[str, list[float]], path: str | Path, title: str):
    """
    Loss curves, raw and smoothed, one panel each, to an image file.

    Args:
        steps (`list[int]`): optimizer steps.
        losses (`dict[str, list[float]]`): a value per step for each loss.
        path (`str` or `Path`): where the picture goes.
        title (`str`): what was trained.
    """
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    figure = Figure(figsize=(4.5 * len(losses), 3.2), layout="constrained")
    figure.suptitle(title)
    for axes, (name, values) in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses.items(), strict=True):
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(values), color="tab:blue", linewidth=1.6)
        axes.set(xlabel="optimizer step", title=name, yscale="log" if min(values) > 0 else "linear")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_noise_levels(steps: list[int], losses: dict[float, list[float]], path: str | Path, title: str):
    """
    The loss at single noise levels over training, one curve each, to an image file.

    Args:
        steps (`list[int]`): optimizer steps at which it was measured.
        losses (`dict[float, list[float]]`): a value per step for each noise level.
        path (`str` or `Path`): where the picture goes.
        title (`str`): what was trained.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for level, values in losses.items():
        axes.plot(steps, values, marker="o", markersize=3, color=colormaps["viridis"](level), label=f"noise {level}")
    axes.set(xlabel="optimizer step", ylabel="diffusion loss", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Moving average without the bias of its start."""
    average, smoothed = 0.0, []
    for step, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**step))
    return smoothed
