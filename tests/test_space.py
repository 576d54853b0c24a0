"""The Space without a browser: runs, their files, limits, messages, and its endpoints."""

import ast
import json
import os
import threading
import zipfile
from pathlib import Path

import app as space
import gradio
import gradio_client
import httpx
import pytest
import torch
import yaml
from conftest import tiny_pipeline
from gradio_client.exceptions import AppError
from PIL import Image
from studio import Limits, Request, Result, Studio, Update, snippet

from djepa_hf import DJEPAPipeline

README = Path(space.__file__).with_name("README.md").read_text()
CARD = """# A model
```python
image = pipe("hen", num_inference_steps=8, num_denoising_steps=5, guidance_scale=1.5, final_denoising_steps=3).images[0]
```
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("space") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return str(folder)


@pytest.fixture(scope="module")
def studio(model) -> Studio:
    return Studio(model)


@pytest.fixture(scope="module")
def served(model):
    """The app as it is served, and its address."""
    app = space.App(model, "cpu", torch.float32)
    page = app.build()
    _, url, _ = space.launch(page, app, prevent_thread_lock=True, quiet=True)
    yield app, url
    page.close()
    app.close()


def test_defaults_come_from_the_card(studio):
    assert studio.defaults == {
        "num_inference_steps": 8,
        "num_denoising_steps": 5,
        "guidance_scale": 1.5,
        "guidance_schedule": "linear",
        "temperature": 0.98,
        "profile": "exact",
        "solver": None,
        "token_order": None,
        "final_denoising_steps": 3,
        "null_refresh_interval": 1,
    }
    assert studio.choices[3] == ("3 · hen", 3)
    assert studio.solvers == ["euler", "heun", "midpoint"]


def test_a_run_shows_its_steps_and_gives_the_pipelines_images(studio, tmp_path):
    request = Request(["hen", 1], images_per_class=2, seed=7, options={"profile": "fast", "solver": "heun"})
    *updates, result = studio.run(request)
    assert [update.step for update in updates] == list(range(1, 9))
    assert all(update.steps == 8 and update.sheet is not None and update.seconds_left >= 0 for update in updates)
    assert updates[-1].seconds_left == 0
    assert len(result.frames) == 9
    assert len({frame.tobytes() for frame in result.frames}) == 9  # every step shows something new
    assert result.captions == ["hen", "hen", "goldfish", "goldfish"]

    pipe = DJEPAPipeline.from_pretrained(studio.model)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(7, 11)]
    expected = pipe([3, 3, 1, 1], generator=seeds, **{**studio.defaults, **request.options}).images
    paths, animation, archive = result.save(tmp_path / "kept")
    assert [path.name for path in paths][:2] == ["00_hen_seed7.png", "01_hen_seed8.png"]
    for path, image in zip(paths, expected, strict=True):
        with Image.open(path) as saved:
            assert saved.tobytes() == image.tobytes()
    with Image.open(animation) as frames:
        assert frames.n_frames == 9
    with zipfile.ZipFile(archive) as file:
        assert {path.name for path in paths} < set(file.namelist())
        assert json.loads(file.read("settings.json"))["options"]["solver"] == "heun"
        program = file.read("reproduce.py").decode()
    again = {}
    exec(program, again)
    assert [image.tobytes() for image in again["images"]] == [image.tobytes() for image in expected]


def test_a_run_that_is_closed_stops(studio, monkeypatch):
    steps, decode = [], DJEPAPipeline.decode_tokens
    monkeypatch.setattr(DJEPAPipeline, "decode_tokens", lambda *args, **kw: steps.append(1) or decode(*args, **kw))
    before = set(threading.enumerate())
    run = studio.run(Request([0], options={"num_inference_steps": 16, "num_denoising_steps": 200}))
    assert next(run).step == 1
    worker = (set(threading.enumerate()) - before).pop()
    run.close()
    worker.join(timeout=30)
    assert not worker.is_alive()
    assert len(steps) < 10


def test_runs_that_were_given_up_keep_their_turn(studio):
    request = Request([0], options={"num_inference_steps": 16, "num_denoising_steps": 100})
    before = threading.active_count()
    for _ in range(6):
        run = studio.run(request)
        next(run, None)
        run.close()
    at_work = [thread for thread in threading.enumerate() if thread.name.startswith("Thread-") and thread.is_alive()]
    for thread in at_work:
        thread.join(timeout=30)
    assert threading.active_count() <= before + 1
    assert studio._turns.acquire(blocking=False)
    studio._turns.release()


def test_two_runs_at_once_get_their_own_images(studio):
    requests = [Request([0], seed=1), Request([4], seed=2, options={"num_inference_steps": 5})]
    alone = [list(studio.run(request))[-1].images[0].tobytes() for request in requests]
    first, second = (studio.run(request) for request in requests)
    together = [None, None]
    for _ in range(9):
        for i, run in enumerate((first, second)):
            update = next(run, None)
            if isinstance(update, Result):
                together[i] = update.images[0].tobytes()
    assert together == alone


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "Choose at least one class"),
        (Request(["hem"]), "Unknown class 'hem'. The closest names are: hen"),
        (Request([0, 1], images_per_class=9), "At most 16 images at a time, not 18"),
        (Request([0], images_per_class=0), "Images per class must be a whole number from 1 on, not 0"),
        (Request([0], images_per_class="many"), "Images per class must be a whole number from 1 on, not 'many'"),
        (Request([0], images_per_class=10**9), "At most 16 images at a time, not 1000000000"),
        (Request([[0]]), "Classes are a list of ids and names"),
        (Request([0], options=["fast"]), r"Options are names with values, not \['fast'\]"),
        (Request([0], options={"final_denoising_steps": 300}), "At most 250 denoising steps, not 300"),
        (Request([0], options={"null_refresh_interval": True}), "True is no value for null_refresh_interval"),
        (Request([0], seed=-1), "The seed must be a whole number between 0 and 4294967295, not -1"),
        (Request([0], options={"steps": 3}), "There is no option 'steps'; there are num_inference_steps"),
        (Request([0], options={"num_denoising_steps": "ten"}), "'ten' is no value for num_denoising_steps"),
        (Request([0], options={"num_denoising_steps": 251}), "At most 250 denoising steps, not 251"),
        (Request([0], options={"num_inference_steps": 17}), "`num_inference_steps` must lie in 1..16"),
        (Request([0], options={"solver": "ddim"}), "are euler, heun, midpoint, got 'ddim'"),
    ],
)
def test_what_cannot_be_drawn_is_told(studio, request_, message):
    with pytest.raises(ValueError, match=message):
        next(studio.run(request_))


def test_a_grid_has_a_cell_for_every_pair_of_values(studio):
    values = ([1, 2.5], [0.5, 0.9, 1])
    seen = list(studio.explore("hen", 3, ("guidance_scale", "temperature"), values))
    assert sum(picture is not None for _, _, picture in seen) == 6
    done, count, picture = seen[-1]
    assert (done, count) == (6, 6)
    options = {"guidance_scale": 2.5, "temperature": 0.9}
    *_, result = studio.run(Request(["hen"], 1, 3, options))
    cell = result.images[0].convert("RGB")
    zoom = -(-640 // 3 // 8) if 640 // 3 % 8 else 640 // 3 // 8
    tile = cell.resize((8 * zoom, 8 * zoom), Image.Resampling.NEAREST)
    gap = max(2, 8 * zoom // 24)
    found = [
        (x, y)
        for x in range(picture.width - tile.width + 1)
        for y in [picture.height - tile.height - gap]
        if picture.crop((x, y, x + tile.width, y + tile.height)).tobytes() == tile.tobytes()
    ]
    assert len(found) == 1  # in the last row, where guidance is 2.5
    with pytest.raises(ValueError, match="A grid has 1 to 4 cells, not 6"):
        next(Studio(studio.model, limits=Limits(cells=4)).explore(0, 0, ("guidance_scale", "temperature"), values))


def test_numbers_are_read_from_text():
    assert space.numbers("1, 2.5 4", "guidance_scale") == [1, 2.5, 4]
    assert space.numbers("8 16", "num_inference_steps") == [8, 16]
    with pytest.raises(ValueError, match="guidance scale: 'x' is no number"):
        space.numbers("1, x", "guidance_scale")


def test_failures_are_told_and_survived(model, monkeypatch):
    app = space.App(model, "cpu", torch.float32)
    call = DJEPAPipeline.__call__
    monkeypatch.setattr(DJEPAPipeline, "__call__", lambda *args, **kw: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(gradio.Error, match="Ask for fewer images") as error:
        app.api_generate([0])
    assert error.value.title == "Out of memory"
    monkeypatch.setattr(DJEPAPipeline, "__call__", call)
    files, _, _ = app.api_generate([0])
    assert Path(files[0]).is_file()
    old = Path(files[0]).parent
    os.utime(old, (0, 0))  # made long ago
    files, _, _ = app.api_generate([0])
    assert not old.exists()
    app.close()
    assert not Path(files[0]).exists()


def test_a_model_that_cannot_be_loaded_is_tried_again(model, tmp_path):
    app = space.App(str(tmp_path / "later"), "cpu", torch.float32)
    app.build()
    assert len(app.fill()) == 1 + len(app.fields)
    assert "could not be loaded" in app.fill()[0].value
    with pytest.raises(gradio.Error, match=r"The model .*later could not be loaded"):
        app.api_classes()
    (tmp_path / "later").symlink_to(model)
    assert app.api_classes()[3] == "hen"
    trouble, classes, *others = app.fill()
    assert not trouble.visible
    assert classes.choices[3] == ("3 · hen", 3)
    assert len(others) == len(app.fields) - 1
    app.close()


def test_endpoints_serve_programs(served):
    app, url = served
    client = gradio_client.Client(url, verbose=False)
    assert client.predict(api_name="/classes")[1] == "goldfish"
    options = {"classes": ["hen", 1], "images_per_class": 1, "seed": 4, "options": {"num_denoising_steps": 2}}
    files, settings, program = client.predict(**options, api_name="/generate")
    assert settings["classes"] == [3, 1]
    assert program == snippet(settings)
    *_, result = app.studio.run(Request([3, 1], seed=4, options={"num_denoising_steps": 2}))
    for path, image in zip(files, result.images, strict=True):
        with Image.open(path) as served_image:
            assert served_image.tobytes() == image.tobytes()
    with pytest.raises(AppError, match="Class id 9 is out of range"):
        client.predict(classes=[9], images_per_class=1, seed=0, options={}, api_name="/generate")
    with pytest.raises(AppError, match="Choose at least one class"):
        client.predict(classes=[], images_per_class=1, seed=0, options={}, api_name="/generate")


def test_the_readmes_programs_work(served, tmp_path, monkeypatch):
    _, url = served
    python = README.split("```python\n")[1].split("```")[0]
    tree = ast.parse(python.replace("http://127.0.0.1:7860/", url).replace("http://127.0.0.1:7860", url.rstrip("/")))
    found = {}
    exec(compile(tree, "README", "exec"), found)
    assert len(found["files"]) == 2
    assert len(found["names"]) == 5
    answer = httpx.post(f"{url}gradio_api/call/generate", json={"data": [[3, 1], 1, 0, {"profile": "fast"}]})
    event = answer.json()["event_id"]
    text = httpx.get(f"{url}gradio_api/call/generate/{event}", timeout=60).text
    assert "event: complete" in text
    assert "01_goldfish_seed1.png" in text


def test_no_other_file_is_served(served):
    _, url = served
    for path in ("/etc/passwd", str(Path(__file__)), str(Path(space.__file__))):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code == 403


def test_the_page_is_a_space():
    about = yaml.safe_load(README.split("---")[1])
    folder = Path(space.__file__).parent
    assert about["sdk"] == "gradio"
    assert about["sdk_version"] == gradio.__version__
    assert (folder / about["app_file"]).is_file()
    assert (folder / about["thumbnail"]).is_file()
    assert len(about["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {about["colorFrom"], about["colorTo"]} <= colours
    assert f"gradio=={gradio.__version__}" in (folder / "requirements.txt").read_text().splitlines()


def test_a_run_without_pictures_in_every_step(model, monkeypatch):
    monkeypatch.setattr("studio.FRAMES", 3)
    *updates, result = Studio(model).run(Request([0], options={"num_inference_steps": 16}))
    assert [update.step for update in updates if update.sheet is not None] == [6, 12, 16]
    assert all(isinstance(update, Update) for update in updates)
    assert len(result.frames) == 4
