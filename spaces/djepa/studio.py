"""What the app does with a pipeline, apart from how it looks: defaults and limits, runs that show pictures on the way,
and what they leave behind."""

import ast
import inspect
import json
import math
import queue
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from PIL import Image

import djepa_hf
from djepa_hf import DJEPAPipeline
from djepa_hf.latents import vae_stride
from djepa_hf.schedulers import SOLVERS
from djepa_hf.visualization import labelled_grid

# options of the pipeline's call that a request, or the model's card, may set
_TYPES = {
    "num_inference_steps": int,
    "num_denoising_steps": int,
    "final_denoising_steps": int,
    "guidance_scale": (int, float),
    "guidance_schedule": str,
    "temperature": (int, float),
    "profile": str,
    "solver": str,
    "token_order": str,
    "null_refresh_interval": int,
}
OPTIONS = {name: inspect.signature(DJEPAPipeline.__call__).parameters[name].default for name in _TYPES}
RUNS = 2  # at once
THREADS = torch.get_num_threads()  # which another thread does not know by itself, and rounds otherwise with
FRAMES = 24  # pictures on the way, at most
SHEET_SIZE = 640  # pixels along the longer side of a sheet of pictures, at least
AXES = {
    "guidance × temperature": ("guidance_scale", "temperature"),
    "autoregressive × denoising steps": ("num_inference_steps", "num_denoising_steps"),
}


@dataclass(frozen=True)
class Limits:
    """
    What one request may ask for.

    Args:
        images (`int`): at a time.
        denoising_steps (`int`): per token.
        cells (`int`): of a grid.
    """

    images: int = 16
    denoising_steps: int = 250
    cells: int = 25


@dataclass
class Request:
    """
    What to draw.

    Args:
        classes (`list[int | str]`): ids or names, one row of images each.
        images_per_class (`int`): in each row.
        seed (`int`): image `i` is drawn from the seed `seed + i`.
        options (`dict`): of the pipeline's call, see `OPTIONS`.
    """

    classes: list[int | str]
    images_per_class: int = 1
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Update:
    """
    How far a run is.

    Args:
        step, steps (`int`): autoregressive steps done, and in all.
        seconds_left (`float`): estimated.
        sheet (`PIL.Image.Image`, *optional*): all images as far as they are there; not after every step.
    """

    step: int
    steps: int
    seconds_left: float
    sheet: Image.Image | None


@dataclass
class Result:
    """
    What a run made.

    Args:
        images (`list[PIL.Image.Image]`): as the pipeline gave them.
        captions (`list[str]`): the name of each one's class.
        frames (`list[PIL.Image.Image]`): sheets on the way, the last one complete.
        settings (`dict`): all that the images depend on.
        snippet (`str`): a Python program that makes them again.
        seconds (`float`): that it took.
    """

    images: list[Image.Image]
    captions: list[str]
    frames: list[Image.Image]
    settings: dict[str, Any]
    snippet: str
    seconds: float

    def save(self, folder: Path) -> tuple[list[Path], Path, Path]:
        """Writes images, an animation and an archive of everything into a folder; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i, (image, caption) in enumerate(zip(self.images, self.captions, strict=True)):
            name = "".join(c if c.isalnum() else "_" for c in caption)
            paths.append(folder / f"{i:02d}_{name}_seed{self.settings['seed'] + i}.png")
            image.save(paths[-1])
        animation = folder / "tokens.webp"
        durations = [180] * (len(self.frames) - 1) + [2000]
        self.frames[0].save(
            animation, save_all=True, append_images=self.frames[1:], duration=durations, loop=0, lossless=True
        )
        archive = folder / "djepa.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in [*paths, animation]:
                file.write(path, path.name)
            file.writestr("settings.json", json.dumps(self.settings, indent=2))
            file.writestr("reproduce.py", self.snippet)
        return paths, animation, archive


class Studio:
    """
    A pipeline for many users at once: each run has a pipeline object of its own around the same weights.

    Args:
        model (`str`): a pipeline folder, or its id on the Hub.
        device (`str`): where it works.
        dtype (`torch.dtype`): of the weights.
        limits ([`Limits`]): of a request.

    Raises:
        OSError or ValueError: if the pipeline cannot be loaded.
    """

    def __init__(
        self, model: str, device: str = "cpu", dtype: torch.dtype = torch.float32, limits: Limits | None = None
    ):
        self.model, self.limits = model, limits or Limits()
        self.pipe = DJEPAPipeline.from_pretrained(model, dtype=dtype).to(device)
        self.config = self.pipe.transformer.config
        if len(self.config.sample_shape) != 2:
            raise ValueError(f"{model} makes samples of rank {len(self.config.sample_shape)}, which are no pictures.")
        stride = 1 if self.pipe.vae is None else vae_stride(self.pipe.vae)
        self.size = tuple(stride * side for side in reversed(self.config.sample_shape))  # width, height
        self.names = [self.config.id2label[i].split(",")[0] for i in range(self.config.num_labels)]
        self.defaults = self._defaults()
        self._turns = threading.Semaphore(RUNS)  # a run that was given up keeps its turn until it has really stopped

    @property
    def choices(self) -> list[tuple[str, int]]:
        """Every class as a picker shows it, with its id."""
        return [(f"{i} · {self.config.id2label[i]}", i) for i in range(self.config.num_labels)]

    @property
    def solvers(self) -> list[str]:
        """Those that the model's objective has."""
        return list(SOLVERS[self.config.objective])

    def _defaults(self) -> dict[str, Any]:
        options = {**OPTIONS, **_options_of_card(_read_card(self.model))}
        options["num_inference_steps"] = min(options["num_inference_steps"], self.config.num_tokens)
        options["num_denoising_steps"] = min(options["num_denoising_steps"], self.limits.denoising_steps)
        return options

    def check(self, request: Request) -> list[int]:
        """
        The class of every image.

        Raises:
            ValueError: if something is asked for that cannot be, or that is too much.
        """
        if not request.classes:
            raise ValueError("Choose at least one class.")
        if any(isinstance(label, list | dict) for label in request.classes):
            raise ValueError("Classes are a list of ids and names.")
        if not isinstance(request.options, dict):
            raise ValueError(f"Options are names with values, not {request.options!r}.")
        count, seed = request.images_per_class, request.seed
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Images per class must be a whole number from 1 on, not {count!r}.")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"The seed must be a whole number between 0 and {2**32 - 1}, not {seed!r}.")
        for name, value in request.options.items():
            if name not in OPTIONS:
                raise ValueError(f"There is no option {name!r}; there are {', '.join(OPTIONS)}.")
            if (not isinstance(value, _TYPES[name]) or isinstance(value, bool)) and value is not OPTIONS[name]:
                raise ValueError(f"{value!r} is no value for {name}.")
        if len(request.classes) * count > self.limits.images:
            raise ValueError(f"At most {self.limits.images} images at a time, not {len(request.classes) * count}.")
        ids = [i for i in self.pipe.get_label_ids(list(request.classes)) for _ in range(count)]
        options = {**self.defaults, **request.options}
        most = max(options["num_denoising_steps"], options["final_denoising_steps"] or 0)
        if most > self.limits.denoising_steps:
            raise ValueError(f"At most {self.limits.denoising_steps} denoising steps, not {most}.")
        self.pipe.check_inputs(len(ids), num_images_per_label=1, **options)
        return ids

    def run(self, request: Request) -> Iterator[Update | Result]:
        """
        Draws, and tells on the way how far it is. The last that it gives is the result. Closing the iterator stops the
        run after the current step.

        Raises:
            ValueError: see [`~Studio.check`].
        """
        ids = self.check(request)
        options = {**self.defaults, **request.options}
        pipe = DJEPAPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        updates: queue.Queue = queue.Queue()
        is_over, started = threading.Event(), time.monotonic()
        frames = [self.sheet(ids, [Image.new("RGB", self.size, "grey")] * len(ids))]

        def watch(pipe: DJEPAPipeline, step: int, num_hidden: int, tensors: dict) -> dict:
            pipe._interrupt = is_over.is_set()
            steps, done = pipe.num_timesteps, step + 1
            sheet = None
            if not is_over.is_set() and (done % math.ceil(steps / FRAMES) == 0 or done == steps):
                sheet = self.sheet(ids, pipe.decode_tokens(tensors["latents"], "pil", tensors["mask"]))
                frames.append(sheet)
            seconds = time.monotonic() - started
            updates.put(Update(done, steps, seconds / done * (steps - done), sheet))
            return tensors

        def work():
            torch.set_num_threads(THREADS)
            try:
                seeds = [torch.Generator().manual_seed(request.seed + i) for i in range(len(ids))]
                watched = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["latents", "mask"]}
                with self._turns:
                    updates.put([] if is_over.is_set() else pipe(ids, generator=seeds, **options, **watched).images)
            except Exception as error:  # it belongs to whoever waits for the updates
                updates.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while isinstance(update := updates.get(), Update):
                yield update
            if isinstance(update, Exception):
                raise update
            captions = [self.names[i] for i in ids]
            settings = self.settings(ids, request.seed, options)
            seconds = time.monotonic() - started
            yield Result(update, captions, frames, settings, snippet(settings), seconds)
        finally:
            is_over.set()

    def explore(
        self, label: int | str, seed: int, axes: tuple[str, str], values: tuple[list[float], list[float]]
    ) -> Iterator[tuple[int, int, Image.Image | None]]:
        """
        One image over two options: after every step the number of cells done and in all; after every cell the picture
        so far, too.

        Args:
            label (`int` or `str`): a class.
            seed (`int`): the same for all cells.
            axes (`tuple[str, str]`): names of the options, down and across.
            values (`tuple[list, list]`): of each.

        Raises:
            ValueError: if a value cannot be, or there are too many cells.
        """
        count = len(values[0]) * len(values[1])
        if not 1 <= count <= self.limits.cells:
            raise ValueError(f"A grid has 1 to {self.limits.cells} cells, not {count}.")
        cells = [(row, column) for row in values[0] for column in values[1]]
        requests = [Request([label], 1, seed, dict(zip(axes, cell, strict=True))) for cell in cells]
        for request in requests:
            self.check(request)
        images = [Image.new("RGB", self.size, "lightgrey")] * count
        short = [name.removeprefix("num_").replace("_", " ") for name in axes]
        for i, request in enumerate(requests):
            for update in self.run(request):
                if isinstance(update, Update):
                    yield i, count, None
                else:
                    images = [*images[:i], update.images[0], *images[i + 1 :]]
            width = len(values[1])
            rows = [(f"{short[0]} {value:g}", images[j * width : (j + 1) * width]) for j, value in enumerate(values[0])]
            columns = [f"{short[1]} {value:g}" for value in values[1]]
            yield i + 1, count, labelled_grid(rows, columns, min_tile=SHEET_SIZE // max(len(rows), width))

    def settings(self, ids: list[int], seed: int, options: dict[str, Any]) -> dict[str, Any]:
        """All that images depend on."""
        about = {"model": self.model, "classes": ids, "names": [self.names[i] for i in ids], "seed": seed}
        types = {"dtype": str(self.pipe.transformer.dtype).removeprefix("torch."), "device": self.pipe.device.type}
        versions = {module.__name__: module.__version__ for module in (djepa_hf, torch)}
        return {**about, "options": options, **types, "versions": versions}

    def sheet(self, ids: list[int], images: list[Image.Image]) -> Image.Image:
        """All images in one picture, a row for each class."""
        rows: list[tuple[str, list[Image.Image]]] = []
        for place, (i, image) in enumerate(zip(ids, images, strict=True)):
            if place == 0 or i != ids[place - 1]:
                rows.append((self.names[i], []))
            rows[-1][1].append(image)
        return labelled_grid(rows, min_tile=SHEET_SIZE // max(len(rows), *(len(row) for _, row in rows)))


def snippet(settings: dict[str, Any]) -> str:
    """A Python program that makes images again from their settings."""
    count, seed = len(settings["classes"]), settings["seed"]
    options = "".join(f"    {name}={value!r},\n" for name, value in settings["options"].items())
    return (
        "import torch\n"
        "from djepa_hf import DJEPAPipeline\n\n"
        f"pipe = DJEPAPipeline.from_pretrained({settings['model']!r}, dtype=torch.{settings['dtype']})\n"
        f"pipe.to({settings['device']!r})\n"
        "images = pipe(\n"
        f"    {settings['classes']},  # {', '.join(dict.fromkeys(settings['names']))}\n"
        f"{options}"
        f"    generator=[torch.Generator().manual_seed(seed) for seed in range({seed}, {seed + count})],\n"
        ").images\n"
    )


def _read_card(model: str) -> str:
    path = Path(model) / "README.md"
    if not Path(model).is_dir():
        try:
            path = Path(huggingface_hub.hf_hub_download(model, "README.md"))
        except (OSError, huggingface_hub.errors.HfHubHTTPError):
            return ""
    return path.read_text() if path.is_file() else ""


def _options_of_card(card: str) -> dict[str, Any]:
    """What the example on a model card passes to the pipeline."""
    for block in card.split("```python\n")[1:]:
        try:
            tree = ast.parse(block.split("```")[0])
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "pipe":
                known = {word.arg: word.value for word in node.keywords if word.arg in OPTIONS}
                return {name: value.value for name, value in known.items() if isinstance(value, ast.Constant)}
    return {}
