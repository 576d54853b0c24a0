#!/usr/bin/env python
"""The D-JEPA Space: choose classes, watch the tokens appear, keep the pictures.

python spaces/djepa/app.py --model outputs/digits
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from studio import AXES, RUNS, Limits, Request, Result, Studio, Update

from djepa_hf.pipeline_djepa import GUIDANCE_SCHEDULES, TOKEN_ORDERS
from djepa_hf.profiles import PROFILES

try:
    from spaces import GPU as on_gpu  # ZeroGPU lends a GPU for the time of a call
except ImportError:

    def on_gpu(function):
        return function


HERE = Path(__file__).parent
DEFAULT_MODEL = os.environ.get("DJEPA_MODEL", "outputs/digits")
OWN_SOLVER = "the model's own"
PROGRAM_HEADING = "## From a program\n"
STORED_HOURS = 2  # how long pictures lie in the app's temporary folder
CSS = (HERE / "style.css").read_text()
INTRODUCTION = """# D-JEPA
Images grow token by token, in random order: a transformer predicts a feature for every token that is missing, and a
small network turns that feature into the token. [Paper](https://arxiv.org/abs/2410.03755)"""


_APPS: list["App"] = []


@on_gpu
def _run(number: int, request: Request) -> Iterator[Update | Result]:
    yield from _APPS[number].studio.run(request)


@on_gpu
def _explore(number: int, *args) -> Iterator[tuple]:
    yield from _APPS[number].studio.explore(*args)


class App:
    """
    The page, and what happens on it.

    Args:
        model (`str`): a pipeline folder, or its id on the Hub.
        device (`str`): where it works.
        dtype (`torch.dtype`): of the weights.
        limits ([`Limits`]): of a request.
    """

    def __init__(self, model: str, device: str, dtype: torch.dtype, limits: Limits | None = None):
        self.model, self.device, self.dtype, self.limits = model, device, dtype, limits or Limits()
        self.folder = Path(tempfile.mkdtemp(prefix="djepa_space_"))
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(self.folder / "examples")  # which are of this model alone
        self._studio: Studio | None = None
        self._loading = threading.Lock()
        self.number = len(_APPS)
        _APPS.append(self)

    @property
    def studio(self) -> Studio:
        """The model, loaded when it is first needed; a load that failed is tried again."""
        with self._loading:
            try:
                self._studio = self._studio or Studio(self.model, self.device, self.dtype, self.limits)
            except Exception as error:
                message = f"The model {self.model} could not be loaded: {error}"
                raise gr.Error(message, duration=None, print_exception=False) from error
        return self._studio

    # --- what buttons do

    def fill(self) -> tuple:
        """Classes and defaults of the model, for the page as it opens; or why there are none."""
        try:
            held = self._held(self.studio)
        except gr.Error as error:
            return (gr.Markdown(f"⚠️ {error.message}", visible=True), *[gr.skip()] * len(self.fields))
        return gr.Markdown(visible=False), *(type(field)(**held[name]) for name, field in self.fields.items())

    def _held(self, studio: Studio) -> dict[str, dict[str, Any]]:
        """What the fields that depend on the model hold."""
        d, tokens = studio.defaults, studio.config.num_tokens
        down, across = grid_values(next(iter(AXES)), d, tokens)
        return {
            "classes": {"choices": studio.choices, "value": [0]},
            "profile": {"value": d["profile"]},
            "inference_steps": {"maximum": tokens, "value": d["num_inference_steps"]},
            "denoising_steps": {"value": d["num_denoising_steps"]},
            "guidance": {"value": d["guidance_scale"]},
            "schedule": {"value": d["guidance_schedule"]},
            "temperature": {"value": d["temperature"]},
            "solver": {"choices": [OWN_SOLVER, *studio.solvers], "value": d["solver"] or OWN_SOLVER},
            "order": {"value": d["token_order"] or "random"},
            "label": {"choices": studio.choices, "value": 0},
            "down": {"value": down},
            "across": {"value": across},
        }

    def draw(
        self,
        classes: list[int],
        images_per_class: int,
        seed: int,
        profile: str,
        inference_steps: int,
        denoising_steps: int,
        guidance_scale: float,
        guidance_schedule: str,
        temperature: float,
        solver: str,
        token_order: str,
    ) -> Iterator[dict]:
        """Draws for the page: the picture on the way, then everything that can be kept."""
        options = {
            "num_inference_steps": int(inference_steps),
            "num_denoising_steps": int(denoising_steps),
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "profile": profile,
            "solver": None if solver == OWN_SOLVER else solver,
            "token_order": token_order,
        }
        request = Request(classes or [], int(images_per_class), int(seed or 0), options)
        yield self._begun()
        for update in self._run(request):
            if isinstance(update, Update):
                shown = {self.status: progress(update)}
                if update.sheet is not None:
                    shown[self.live] = update.sheet
                yield shown
            else:
                yield self._finished(update)

    def draw_example(self, classes: list[int], images_per_class: int, seed: int, profile: str) -> tuple:
        """Draws an example: once, then it is kept."""
        *_, result = self._run(Request(classes, int(images_per_class), int(seed), {"profile": profile}))
        shown = self._finished(result)
        kept = [shown[part] for part in (self.gallery, self.archive, self.animation, self.settings, self.snippet)]
        return shown[self.status].partition(" Drag")[0], result.frames[-1], *kept

    def _begun(self) -> dict:
        return {
            self.status: progress(None),
            self.results: gr.Column(visible=False),
            self.scrub: gr.Slider(visible=False),
            self.cancel: gr.Button(interactive=True),
        }

    def _finished(self, result: Result) -> dict:
        folder = self._new_folder()
        paths, animation, archive = result.save(folder)
        frames = []
        for i, frame in enumerate(result.frames):
            frames.append(str(folder / f"frame_{i:02d}.png"))
            frame.save(frames[-1])
        count = len(result.images)
        told = (
            f"{count} image{'s' * (count > 1)} in {result.seconds:.1f} s. Drag the slider to see how they came about."
        )
        return {
            self.status: told,
            self.live: gr.Image(result.frames[-1]),
            self.frames: frames,
            self.scrub: gr.Slider(maximum=len(frames) - 1, value=len(frames) - 1, visible=True),
            self.results: gr.Column(visible=True),
            self.gallery: [(str(path), caption) for path, caption in zip(paths, result.captions, strict=True)],
            self.archive: str(archive),
            self.animation: str(animation),
            self.settings: json.dumps(result.settings, indent=2, ensure_ascii=False),
            self.snippet: result.snippet,
            self.cancel: gr.Button(interactive=False),
        }

    def _run(self, request: Request) -> Iterator[Update | Result]:
        """A run whose failures are messages on the page."""
        run = self._run_on_gpu(request)
        try:
            yield from run
        except (ValueError, RuntimeError) as error:
            raise friendly(error) from error
        finally:
            run.close()

    def explore(self, label: int, seed: int, axes: str, down: str, across: str) -> Iterator[dict]:
        """Draws a grid for the page, cell by cell."""
        try:
            values = tuple(numbers(text, name) for text, name in zip((down, across), AXES[axes], strict=True))
            yield {self.explore_status: progress(None), self.explore_cancel: gr.Button(interactive=True)}
            for done, count, picture in self._explore_on_gpu(label, int(seed or 0), AXES[axes], values):
                told = f"{done} of {count} cells" if done < count else "Done."
                yield {self.explore_status: told} | ({} if picture is None else {self.grid: picture})
        except (ValueError, RuntimeError) as error:
            raise friendly(error) from error
        yield {self.explore_cancel: gr.Button(interactive=False)}

    # On ZeroGPU, what is decorated runs in a copy of the process that has a GPU. The model, loaded before the page was
    # served, is there already: only the request travels.

    def _run_on_gpu(self, request: Request) -> Iterator[Update | Result]:
        self.studio  # noqa: B018  loaded here, if not before
        yield from _run(self.number, request)

    def _explore_on_gpu(self, *args) -> Iterator[tuple]:
        self.studio  # noqa: B018
        yield from _explore(self.number, *args)

    # --- for programs

    def api_generate(
        self, classes: list[Any], images_per_class: int = 1, seed: int = 0, options: dict[str, Any] | None = None
    ) -> tuple[list[str], dict[str, Any], str]:
        """Images of classes (ids or names) as PNG files, the settings, and a Python program that makes them again."""
        classes = classes if isinstance(classes, list) else [classes]
        *_, result = self._run(Request(classes, images_per_class, seed, options or {}))
        paths, _, _ = result.save(self._new_folder())
        return [str(path) for path in paths], result.settings, result.snippet

    def _new_folder(self) -> Path:
        """For the pictures of a run; those of runs long past go."""
        for folder in self.folder.glob("run_*"):
            if time.time() - folder.stat().st_mtime > 3600 * STORED_HOURS:
                shutil.rmtree(folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix="run_", dir=self.folder))

    def api_classes(self) -> list[str]:
        """Names of all classes, in the order of their ids."""
        return [self.studio.config.id2label[i] for i in range(self.studio.config.num_labels)]

    # --- the page

    def build(self) -> gr.Blocks:
        """The page; `launch` it."""
        with gr.Blocks(title="D-JEPA", analytics_enabled=False, delete_cache=(3600, 3600 * STORED_HOURS)) as page:
            gr.Markdown(INTRODUCTION, elem_id="introduction")
            trouble = gr.Markdown(visible=False, elem_id="trouble")
            try:
                held = self._held(self.studio)
            except gr.Error:  # told, and tried again, when somebody opens the page
                held = defaultdict(dict)
            with gr.Tab("Generate", id="generate"):
                self.fields = self._build_generate(held)
            with gr.Tab("Explore", id="explore"):
                self.fields |= self._build_explore(held)
            with gr.Tab("Use it from a program", id="api"):
                self._build_api()
            if not held:
                page.load(self.fill, None, [trouble, *self.fields.values()], api_visibility="private")
        page.queue(max_size=32, default_concurrency_limit=RUNS)
        return page

    def _build_generate(self, held: dict[str, dict]) -> dict[str, gr.components.Component]:
        limits, choices = self.limits, held["classes"].get("choices", [])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                classes = gr.Dropdown(
                    **held["classes"],
                    label="Classes",
                    info="Type a name or a number; several are fine.",
                    multiselect=True,
                    elem_id="classes",
                )
                count = gr.Slider(1, limits.images, 1, step=1, label="Images per class", elem_id="count")
                with gr.Row(equal_height=True):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
                    dice = gr.Button("⚄ Another", elem_id="dice", min_width=100)
                profile = gr.Radio(
                    list(PROFILES),
                    **{"value": "exact", **held["profile"]},
                    label="Profile",
                    info="How much of the work is really done: hardly a difference to be seen, but to be felt.",
                    elem_id="profile",
                )
                with gr.Accordion("All options", open=False, elem_id="options"):
                    inference_steps = gr.Slider(
                        1, **{"maximum": 64, **held["inference_steps"]}, step=1, label="Autoregressive steps"
                    )
                    denoising_steps = gr.Slider(
                        1, limits.denoising_steps, **held["denoising_steps"], step=1, label="Denoising steps"
                    )
                    guidance = gr.Slider(0, 10, **held["guidance"], step=0.05, label="Guidance", info="1 does without.")
                    schedule = gr.Radio(list(GUIDANCE_SCHEDULES), **held["schedule"], label="Guidance schedule")
                    temperature = gr.Slider(0, 1.5, **held["temperature"], step=0.01, label="Temperature")
                    solver = gr.Dropdown(**held["solver"], label="Solver")
                    order = gr.Radio(list(TOKEN_ORDERS), **held["order"], label="Token order")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
            with gr.Column(scale=3, min_width=300):
                self.status = gr.Markdown("Choose, and press Generate.", elem_id="status", container=True)
                self.live = gr.Image(
                    label="As the tokens appear",
                    type="pil",
                    format="png",
                    interactive=False,
                    elem_id="live",
                    buttons=["fullscreen", "download"],
                    alt_text="The images as far as their tokens are there",
                    height=420,
                )
                self.scrub = gr.Slider(0, 1, 1, step=1, label="Step by step", visible=False, elem_id="scrub")
                self.frames = gr.State([])
                with gr.Column(visible=False, elem_id="results") as self.results:
                    self.gallery = gr.Gallery(
                        label="Images",
                        format="png",
                        columns=4,
                        fit_columns=False,
                        height="auto",
                        object_fit="contain",
                        buttons=["fullscreen", "download"],
                        elem_id="gallery",
                        interactive=False,
                    )
                    with gr.Row():
                        self.archive = gr.DownloadButton("Images and settings (ZIP)", elem_id="archive")
                        self.animation = gr.DownloadButton("Animation (WebP)", elem_id="animation")
                    with gr.Accordion("Make them again", open=False):
                        self.snippet = gr.Code(language="python", label="Python", elem_id="snippet")
                        self.settings = gr.Code(language="json", label="Settings", elem_id="settings")
        if choices:
            last, kept = len(choices) - 1, [self.archive, self.animation, self.settings, self.snippet]
            examples = gr.Examples(
                [[[0], 4, 0, "fast"], [[last, 0], 4, 7, "balanced"]],
                [classes, count, seed, profile],
                [self.status, self.live, self.gallery, *kept],
                self.draw_example,
                cache_examples=True,
                cache_mode="lazy",
                api_visibility="private",
            )
            examples.load_input_event.then(
                lambda: (gr.Slider(visible=False), gr.Column(visible=True)),
                None,
                [self.scrub, self.results],
                api_visibility="private",
            )
        options = [inference_steps, denoising_steps, guidance, schedule, temperature, solver, order]
        outputs = [self.status, self.live, self.scrub, self.frames, self.results, self.gallery, self.archive]
        outputs += [self.animation, self.settings, self.snippet, self.cancel]
        run = go.click(
            self.draw,
            [classes, count, seed, profile, *options],
            outputs,
            show_progress="hidden",
            concurrency_id="model",
            concurrency_limit=RUNS,
            api_visibility="private",
        )
        self._can_be_stopped(run, self.status, self.cancel)
        dice.click(lambda: random.randrange(2**31), None, seed, queue=False, api_visibility="private")
        self.scrub.input(
            lambda frames, i: frames[int(i)],
            [self.frames, self.scrub],
            self.live,
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
        names = ("inference_steps", "denoising_steps", "guidance", "schedule", "temperature", "solver", "order")
        return {"classes": classes, "profile": profile, **dict(zip(names, options, strict=True))}

    @staticmethod
    def _can_be_stopped(run: gr.events.Dependency, status: gr.Markdown, cancel: gr.Button):
        """A run that fails, or is cancelled, says so."""

        def stopped() -> tuple:
            return "Stopped; nothing was kept.", gr.Button(interactive=False)

        run.failure(stopped, None, [status, cancel], api_visibility="private")
        cancel.click(stopped, None, [status, cancel], cancels=[run], queue=False, api_visibility="private")

    def _build_explore(self, held: dict[str, dict]) -> dict[str, gr.components.Component]:
        gr.Markdown("One class, one seed, two options.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                label = gr.Dropdown(**held["label"], label="Class", elem_id="explore_class")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="explore_seed")
                axes = gr.Radio(list(AXES), value=next(iter(AXES)), label="Options", elem_id="axes")
                down = gr.Textbox(**held["down"], label="Values downwards", elem_id="down")
                across = gr.Textbox(**held["across"], label="Values across", elem_id="across")
                with gr.Row():
                    go = gr.Button("Explore", variant="primary", elem_id="explore_go")
                    self.explore_cancel = gr.Button("Cancel", variant="stop", interactive=False)
            with gr.Column(scale=3, min_width=300):
                self.explore_status = gr.Markdown("", elem_id="explore_status")
                self.grid = gr.Image(
                    label="Grid",
                    type="pil",
                    format="png",
                    interactive=False,
                    elem_id="grid",
                    buttons=["fullscreen", "download"],
                    alt_text="One image for every pair of values",
                )
        outputs = [self.explore_status, self.grid, self.explore_cancel]
        run = go.click(
            self.explore,
            [label, seed, axes, down, across],
            outputs,
            show_progress="hidden",
            concurrency_id="model",
            api_visibility="private",
        )
        self._can_be_stopped(run, self.explore_status, self.explore_cancel)
        axes.change(
            lambda name: grid_values(name, self.studio.defaults, self.studio.config.num_tokens),
            axes,
            [down, across],
            api_visibility="private",
        )
        return {"label": label, "down": down, "across": across}

    def _build_api(self):
        gr.Markdown((HERE / "README.md").read_text().partition(PROGRAM_HEADING)[2])
        with gr.Row(visible=False):
            classes, count, seed = gr.JSON(), gr.Number(1, precision=0), gr.Number(0, precision=0)
            options, files = gr.JSON({}), gr.File(label="files", file_count="multiple")
            settings, program = gr.JSON(label="settings"), gr.Textbox(label="program")
            names, generate, list_classes = gr.JSON(label="names"), gr.Button(), gr.Button()
        generate.click(
            self.api_generate,
            [classes, count, seed, options],
            [files, settings, program],
            api_name="generate",
            concurrency_id="model",
        )
        list_classes.click(self.api_classes, None, names, api_name="classes")

    def close(self):
        """Removes the app's temporary folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def friendly(error: ValueError | RuntimeError) -> gr.Error:
    """What went wrong, for people."""
    if isinstance(error, ValueError):
        return gr.Error(str(error), title="That cannot be drawn", print_exception=False)
    torch.cuda.empty_cache()
    if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):  # the CPU's allocator has no class for it
        return gr.Error("Ask for fewer images.", title="Out of memory", print_exception=False)
    return gr.Error(f"The run failed: {error}", title="Sorry")


def progress(update: Update | None) -> str:
    """How far a run is, as a line and a bar."""
    if update is None:
        return "Waiting for the model …"
    left = f"{update.seconds_left:.0f} s left" if update.step < update.steps else "finishing"
    bar = f'<progress value="{update.step}" max="{update.steps}" aria-label="autoregressive steps"></progress>'
    return f"Step {update.step} of {update.steps}, {left}\n\n{bar}"


def numbers(text: str, name: str) -> list[float]:
    """
    Numbers separated by commas or spaces.

    Raises:
        ValueError: naming what is no number.
    """
    values = []
    for word in text.replace(",", " ").split():
        try:
            values.append(float(word))
        except ValueError:
            raise ValueError(f"{name.replace('_', ' ')}: {word!r} is no number.") from None
    return [int(value) if name.startswith("num_") and value.is_integer() else value for value in values]


def grid_values(axes: str, defaults: dict[str, Any], num_tokens: int) -> tuple[str, str]:
    """Values to begin with, around the model's defaults."""
    if AXES[axes][0] == "guidance_scale":
        guidance = defaults["guidance_scale"]
        scales = [1.0, *(round(1 + share * max(1.0, guidance - 1), 2) for share in (0.5, 1, 2))]
        return ", ".join(f"{scale:g}" for scale in scales), "0.8, 0.9, 1, 1.1"
    steps = [max(1, num_tokens // part) for part in (16, 8, 4, 1)] if num_tokens < 64 else [8, 16, 32, 64]
    return ", ".join(map(str, dict.fromkeys(steps))), "4, 8, 16, 32"


def best_device() -> str:
    """The fastest kind of device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="A pipeline folder, or its id on the Hub.")
    parser.add_argument("--device", default=best_device(), help="cuda, mps or cpu; the best there is if not given.")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="Of the weights."
    )
    parser.add_argument("--port", type=int, default=None, help="7860 or the next free one if not given.")
    args = parser.parse_args(argv)
    app = App(args.model, args.device, getattr(torch, args.dtype))
    try:
        launch(app.build(), app, server_port=args.port)
    finally:
        app.close()


def launch(page: gr.Blocks, app: App, **options):
    """Serves the page; files but those that the app wrote stay out of reach."""
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(theme=theme, css=CSS, allowed_paths=[str(app.folder)], show_error=True, **options)


if __name__ == "__main__":
    main()
