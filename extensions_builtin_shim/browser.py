"""A headless Chromium, for the tests of the page and for its screenshots. Needs the `test` extra (playwright)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOW_TO_GET = (
    "no Chromium was found: install one (on Debian: apt-get install chromium), or name one in the environment variable "
    "LOCON_CHROMIUM"
)


def find() -> str | None:
    """The browser's program, if there is one."""
    return os.environ.get("LOCON_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started(program: str) -> Iterator[Browser]:
    """The running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()
