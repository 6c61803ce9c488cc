"""Pages opened in the system's headless Chromium through Playwright: what they say and what they ask for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")
PATIENCE = 90_000
"""Milliseconds: other tests may have the machine."""


class Visit(NamedTuple):
    """What happened while a page was loaded.

    Attributes:
      told: messages on the console, errors of scripts, and what the browser remarks of the page, refusals included.
      requested: addresses that the page asked for, whether it got them or not; its own and inlined data left out.
    """

    told: list[str]
    requested: list[str]


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a network; `BROWSER` must not be None."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS, timeout=PATIENCE)
        try:
            yield opened
        finally:
            opened.close()


def visit(tab: Page, page: Path, width: int = 1280, height: int = 900) -> Visit:
    """Load a file in a window of that size, and wait until everything has arrived or failed."""
    found, address = Visit([], []), page.resolve().as_uri()
    tab.on("console", lambda message: found.told.append(message.text))
    tab.on("pageerror", lambda error: found.told.append(f"Uncaught {error.stack or error}"))
    tab.on("request", lambda request: found.requested.append(request.url))
    tab.set_default_timeout(PATIENCE)
    tab.set_viewport_size({"width": width, "height": height})
    tab.goto(address, wait_until="load")
    tab.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    return Visit(found.told, [each for each in found.requested if each != address and not each.startswith("data:")])
