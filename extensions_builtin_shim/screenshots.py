"""`python -m extensions_builtin_shim.screenshots [FOLDER]`: pictures of the page, into docs/images without a FOLDER.

They are taken in a headless Chromium, from the committed model and adapters; it needs the `test` extra.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from extensions_builtin_shim import browser
from extensions_builtin_shim.app import App
from extensions_builtin_shim.launch import ADAPTERS, CHECKOUT, launch

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZE = {"width": 1280, "height": 860}
PROMPT = "a red circle on blue"
STEPS = "20"
GRID_ROWS = 5  # as many as fit into the picture


def main(arguments: list[str]) -> int:
    """Exit code 0; 1 without a browser."""
    folder = Path(arguments[0]).absolute() if arguments else CHECKOUT / "docs" / "images"
    program = browser.find()
    if program is None:
        sys.stderr.write(f"{browser.HOW_TO_GET}\n")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    with _served() as address, browser.started(program) as chromium:
        for name, (scheme, scene) in SCENES.items():
            page = chromium.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(address)
            page.locator(".card").first.wait_for()
            page.fill("#steps", STEPS)
            page.fill("#prompt", PROMPT)
            scene(page)
            page.evaluate("scrollTo(0, 0)")
            page.mouse.move(0, 0)
            page.wait_for_timeout(300)  # until what moves stands still
            _save(page.screenshot(animations="disabled"), folder / name)
            page.close()
            sys.stdout.write(f"{folder / name}\n")
    return 0


def _save(png: bytes, path: Path) -> None:
    """In 256 colours: the page has few more, and the file has half the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _generate(page: Page) -> None:
    page.click("#generate")
    page.locator("#results[aria-busy=false]").wait_for(timeout=120_000)


def _with(*names: str) -> Callable[[Page], None]:
    """Four images with these adapters, by clicks on their cards."""

    def scene(page: Page) -> None:
        for name in names:
            page.click(f'.card[data-name="{name}"]')
        page.fill("#count", "4")
        _generate(page)

    return scene


def _a_mistake(page: Page) -> None:
    name = page.locator(".card .name").first.inner_text()
    page.fill("#prompt", f"{PROMPT} <lora:{name}:0.8> <lora:{name[:-1]}:1> <lora:{name}:much>")
    _generate(page)


def _grid(page: Page) -> None:
    page.click("#grid-open")
    boxes = page.locator("#grid-adapters input")
    for index in range(GRID_ROWS, boxes.count()):
        boxes.nth(index).uncheck()
    page.click("#grid")
    page.locator("#status", has_text="A grid of").wait_for(timeout=600_000)


SCENES: dict[str, tuple[str, Callable[[Page], None]]] = {
    "page-light.png": ("light", _with("outline")),
    "page-dark.png": ("dark", _with("dots", "outline")),
    "page-mistake.png": ("light", _a_mistake),
    "page-grid.png": ("dark", _grid),
}


@contextmanager
def _served() -> Iterator[str]:
    os.chdir(
        CHECKOUT
    )  # sentences on the page name the folder as it was given, and nobody's home belongs into a picture
    with launch(lora_dir=ADAPTERS.relative_to(CHECKOUT), make_app=App) as webui:
        from extensions_builtin_shim.page import Server

        server = Server(webui, 0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
