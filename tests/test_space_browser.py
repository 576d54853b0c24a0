"""The Space in a real browser, as people use it."""

import io
import re
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_space import model, served  # noqa: F401  fixtures

from djepa_hf import DJEPAPipeline

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
expect = playwright.expect
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, served):  # noqa: F811
    """Opens pages, each with a session of its own; in the end none may have complained or asked another host."""
    _, url = served
    complaints, pages = [], []

    def open_page(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url) else None)
        page.goto(url)
        expect(page.locator("#classes").get_by_text("0 · tench", exact=False).first).to_be_visible()
        return page

    def is_foreign(address):
        return address.startswith(("http", "ws")) and address.split("/")[2] != url.split("/")[2]

    yield open_page
    for page in pages:
        page.context.close()
    assert complaints == []


def choose(page, text, name):
    """Replaces the chosen classes by one, which is found by typing."""
    box = page.locator("#classes input")
    while page.locator("#classes .token-remove:not(.remove-all)").count():
        page.locator("#classes .token-remove:not(.remove-all)").first.click()
    box.fill(text)
    page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")


def set_number(page, place, value):
    box = page.locator(f"{place} input[type=number]")
    box.fill(str(value))
    box.blur()


def open_options(page, **steps):
    page.locator("#options button").first.click()
    for label, value in steps.items():
        page.get_by_label(f"number input for {label.replace('_', ' ')}").fill(str(value))
        page.get_by_label(f"number input for {label.replace('_', ' ')}").blur()


def live_source(page):
    image = page.locator("#live img")
    return image.get_attribute("src") if image.count() else None


def test_choose_watch_scrub_and_keep(visit, model, tmp_path):  # noqa: F811
    page = visit()
    choose(page, "gold", "1 · goldfish")
    set_number(page, "#seed", 11)
    set_number(page, "#count", 2)
    open_options(page, Autoregressive_steps=16, Denoising_steps=60)
    page.locator("#go").click()
    seen = set()
    while page.locator("#gallery img").count() < 2 or not page.locator("#results").is_visible():
        seen.add(live_source(page))
        page.wait_for_timeout(20)
        assert len(seen) < 100
    assert len(seen - {None}) >= 3  # partial pictures came before the end
    expect(page.locator("#status")).to_contain_text(re.compile(r"2 images in [\d.]+ s"))

    last = live_source(page)
    slider = page.locator("#scrub input[type=range]")
    assert slider.get_attribute("max") == "16"
    slider.focus()
    for _ in range(5):  # by keyboard
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#scrub input[type=number]")).to_have_value("11")
    page.wait_for_function("last => document.querySelector('#live img').src !== last", arg=last)

    with page.expect_download() as download:
        page.locator("#archive").click()
    files = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    pipe = DJEPAPipeline.from_pretrained(model)
    options = {"num_inference_steps": 16, "num_denoising_steps": 60, "guidance_scale": 1.5, "final_denoising_steps": 3}
    seeds = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    for i, image in enumerate(pipe([1, 1], generator=seeds, **options).images):
        with Image.open(io.BytesIO(files.read(f"{i:02d}_goldfish_seed{11 + i}.png"))) as kept:
            assert kept.tobytes() == image.tobytes()
    with page.expect_download() as download:
        page.locator("#animation").click()
    with Image.open(download.value.path()) as frames:
        assert frames.n_frames == 17
    page.get_by_text("Make them again").click()
    expect(page.locator("#snippet")).to_contain_text("DJEPAPipeline.from_pretrained")


def test_cancel_works_at_once_and_the_page_goes_on(visit):
    page = visit()
    set_number(page, "#count", 16)
    open_options(page, Autoregressive_steps=16, Denoising_steps=250)
    page.locator("#go").click()
    expect(page.locator("#status progress")).to_be_visible()
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("Stopped", timeout=3000)
    page.wait_for_timeout(500)
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#results")).to_be_hidden()
    set_number(page, "#count", 1)
    page.get_by_label("number input for Denoising steps").fill("3")
    page.get_by_label("number input for Denoising steps").blur()
    page.locator("#go").click()
    expect(page.locator("#status")).to_contain_text("1 image in")


def test_what_cannot_be_drawn_is_told(visit):
    page = visit()
    page.locator("#classes .token-remove").first.click()
    page.locator("#go").click()
    expect(page.get_by_text("Choose at least one class.")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("Stopped; nothing was kept")
    page.get_by_role("tab", name="Explore").click()
    page.locator("#across textarea, #across input").fill("0.5, warm")
    page.locator("#explore_go").click()
    expect(page.get_by_text("temperature: 'warm' is no number.")).to_be_visible()


def test_an_example_shows_its_own_files(visit):
    page = visit()
    choose(page, "gold", "1 · goldfish")
    page.locator("#go").click()
    expect(page.locator("#status")).to_contain_text("1 image in")
    page.get_by_role("row").filter(has_text="0 · tench").first.click()
    expect(page.locator("#status")).to_contain_text("4 images in")
    with page.expect_download() as download:
        page.locator("#archive").click()
    names = zipfile.ZipFile(Path(download.value.path())).namelist()
    assert [name for name in names if name.endswith(".png")] == [f"{i:02d}_tench_seed{i}.png" for i in range(4)]


def test_two_sessions_get_their_own_images(visit):
    pages = [visit(), visit()]
    for page, (text, name, seed) in zip(pages, [("3", "3 · hen", 1), ("ostr", "4 · ostrich", 2)], strict=True):
        choose(page, text, name)
        set_number(page, "#seed", seed)
    for page in pages:
        page.locator("#go").click()
    for page, name in zip(pages, ("hen", "ostrich"), strict=True):
        expect(page.locator("#results")).to_be_visible()
        expect(page.locator("#gallery")).to_contain_text(name)
        page.get_by_text("Make them again").click()
        expect(page.locator("#settings")).to_contain_text(f'"{name}"')


def test_a_grid_is_explored(visit):
    page = visit()
    page.get_by_role("tab", name="Explore").click()
    page.locator("#down textarea, #down input").fill("1 2")
    page.locator("#across textarea, #across input").fill("0.5, 1")
    page.locator("#explore_go").click()
    expect(page.locator("#explore_status")).to_contain_text("Done.")
    expect(page.locator("#grid img")).to_have_attribute("alt", "One image for every pair of values")


def test_narrow_and_dark(visit):
    page = visit(width=390, height=844, color_scheme="dark")
    page.locator("#go").click()
    expect(page.locator("#results")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#live img").get_attribute("alt") == "The images as far as their tokens are there"
    seed = page.locator("#seed input").input_value()
    page.locator("#dice").click()
    page.wait_for_function("seed => document.querySelector('#seed input').value !== seed", arg=seed)
