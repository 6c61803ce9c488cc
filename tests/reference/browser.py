"""Pages opened in headless Chromium, through the DevTools protocol over a pipe: what they say and what they ask for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from time import monotonic
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PATIENCE = 90
"""Seconds: other tests may have the machine."""


class Visit(NamedTuple):
    """What happened while a page was loaded.

    Attributes:
      told: messages on the console, errors of scripts, and what the browser remarks of the page, refusals included.
      requested: addresses that the page asked for, whether it got them or not; its own and inlined data left out.
    """

    told: list[str]
    requested: list[str]


class Browser:
    """One tab. Replies and events come as JSON messages that end with a zero byte."""

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = reading, writing
        self._left, self._number = b"", 0
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = None
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._ask(f"{domain}.enable")

    def open(self, page: Path, width: int = 1280, height: int = 900) -> Visit:
        """Load a file in a window of that size, and wait until everything has arrived or failed."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        address = page.resolve().as_uri()
        self._ask("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        told, requested = [], []
        for event in self._events:
            match event["method"], event.get("params"):
                case "Runtime.consoleAPICalled", {"args": arguments}:
                    told.append(" ".join(str(each.get("value", each.get("description"))) for each in arguments))
                case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                    told.append(f"{details['text']} {details.get('exception', {}).get('description', '')}")
                case "Log.entryAdded", {"entry": entry}:
                    told.append(entry["text"])
                case "Network.requestWillBeSent", {"request": request}:
                    requested.append(request["url"])
        return Visit(told, [each for each in requested if each != address and not each.startswith("data:")])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    @contextmanager
    def printing(self) -> Iterator[None]:
        """The page laid out as for print, as wide as the window."""
        self._ask("Emulation.setEmulatedMedia", media="print")
        try:
            yield
        finally:
            self._ask("Emulation.setEmulatedMedia", media="")

    def pdf(self) -> bytes:
        """The page as it is printed, on A4."""
        return b64decode(
            self._ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)["data"]
        )

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return b64decode(self._ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", None):
            message["sessionId"] = self._session
        contents = json.dumps(message).encode() + b"\0"
        while contents:
            contents = contents[os.write(self._writing, contents) :]
        while (reply := self._next()).get("id") != self._number:
            self._events.append(reply)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def _next(self) -> dict[str, Any]:
        until = monotonic() + PATIENCE
        while b"\0" not in self._left:
            ready, _, _ = select([self._reading], [], [], max(0, until - monotonic()))
            assert ready, f"the browser has said nothing for {PATIENCE} s"
            part = os.read(self._reading, 1 << 20)
            assert part, "the browser has ended"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium without a network; `BROWSER` must not be None."""
    their_reading, writing = os.pipe()
    reading, their_writing = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        on_3_and_4 = f'exec "$@" 3<&{their_reading} 4>&{their_writing}'  # where the protocol wants them
        command = ["bash", "-c", on_3_and_4, "bash", str(BROWSER), *FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, pass_fds=(their_reading, their_writing), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(their_reading)
        os.close(their_writing)
        try:
            yield Browser(reading, writing)
        finally:
            os.close(writing)  # it leaves when nobody speaks to it
            os.close(reading)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
