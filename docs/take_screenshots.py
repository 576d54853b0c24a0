"""Pictures of the Space as it runs: docs/space*.png and its thumbnail. Needs Debian's chromium and playwright.

python docs/take_screenshots.py --model outputs/digits
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "spaces" / "djepa"))
import app as space  # noqa: E402

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def choose(page: Page, numbers: list[int]):
    """Chooses classes."""
    page.locator("#classes .token-remove").first.click()
    for number in numbers:
        page.locator("#classes input").fill(str(number))
        page.get_by_role("option", name=f"{number} ·").first.click()
    page.keyboard.press("Escape")


def generate(page: Page):
    """Four images of each of two classes."""
    choose(page, [3, 8])
    page.locator("#count input[type=number]").fill("4")
    page.locator("#count input[type=number]").blur()
    page.locator("#go").click()
    page.locator("#gallery img").first.wait_for()
    page.wait_for_timeout(1000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/digits", help="A pipeline folder.")
    args = parser.parse_args()
    app = space.App(args.model, "cpu", torch.float32)
    page = app.build()
    _, url, _ = space.launch(page, app, prevent_thread_lock=True, quiet=True)
    docs = ROOT / "docs"
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)

        def open_page(width: int, height: int, scheme: str) -> Page:
            tab = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
            tab.goto(url)
            tab.locator("#classes .token-remove").first.wait_for()
            return tab

        laptop = open_page(1280, 860, "light")
        generate(laptop)
        slider = laptop.locator("#scrub input[type=range]")
        slider.focus()
        for _ in range(6):
            laptop.keyboard.press("ArrowLeft")
        laptop.wait_for_timeout(500)
        laptop.screenshot(path=docs / "space.png")
        thumbnail = Image.open(docs / "space.png").convert("RGB").resize((640, 430), Image.Resampling.LANCZOS)
        thumbnail.save(ROOT / "spaces" / "djepa" / "thumbnail.png")

        phone = open_page(390, 844, "dark")
        generate(phone)
        phone.evaluate("document.querySelector('#status').scrollIntoView()")
        phone.wait_for_timeout(300)
        phone.screenshot(path=docs / "space_phone.png")

        laptop.evaluate("window.scrollTo(0, 0)")
        laptop.get_by_role("tab", name="Explore").click()
        laptop.locator("#explore_go").click()
        laptop.get_by_text("Done.").wait_for()
        laptop.wait_for_timeout(1000)
        laptop.screenshot(path=docs / "space_explore.png")
        browser.close()
    page.close()
    app.close()


if __name__ == "__main__":
    main()
