"""Headless Chromium, driven over its DevTools socket: the few commands that tests of a page need."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 60.0
"""Seconds until a start, a page load or an answer of the browser times out."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab: sends commands and collects events."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._numbers, self._session = loop, socket, itertools.count(1), None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer; events that arrive meanwhile are stored."""
        number = next(self._numbers)
        message = {
            "id": number,
            "method": method,
            "params": parameters,
            **({"sessionId": self._session} if self._session else {}),
        }
        self._loop.run_until_complete(self._socket.send_json(message))
        answer = self._until(lambda told: told.get("id") == number)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _until(self, wanted: Any) -> dict[str, Any]:
        async def next_message() -> dict[str, Any]:
            return await self._socket.receive_json(timeout=PATIENCE)

        while True:
            told = self._loop.run_until_complete(next_message())
            if "method" in told:
                self.events.append(told)
            if wanted(told):
                return told

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Load a file and wait until it and its images are loaded."""
        self.call("Page.navigate", url=path.as_uri())
        if not self.told("Page.loadEventFired"):
            self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def told(self, method: str) -> list[dict[str, Any]]:
        """Return all events of a kind so far."""
        return [event["params"] for event in self.events if event["method"] == method]

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, which may be a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key in the focused element."""
        codes = {"Enter": (13, "\r"), "Tab": (9, "")}
        code, text = codes[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(
        self, path: Path, *, width: int = 1280, height: int = 900, whole: bool = False, dark: bool = False
    ) -> None:
        """Save an image of the visible part, or of the whole page."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """Start a browser with a new profile in a folder, yield a page of it, and stop it."""
    assert CHROMIUM
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], stdout=log, stderr=log
        )
    loop = asyncio.new_event_loop()

    async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
        port, path = _address(folder, process).split()
        session = aiohttp.ClientSession()
        return session, await session.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0)

    try:
        session, socket = loop.run_until_complete(connect())
        try:
            page = Page(loop, socket)
            page.attach()
            yield page
        finally:
            loop.run_until_complete(socket.close())
            loop.run_until_complete(session.close())
    finally:
        loop.close()
        process.terminate()
        process.wait(timeout=PATIENCE)


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait until the browser has written port and path of the DevTools socket, and return them."""
    told = folder / "DevToolsActivePort"
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        if told.exists() and len(told.read_text().split()) == 2:
            return told.read_text()
        time.sleep(0.1)
    msg = f"chromium did not start: {(folder / 'chromium.log').read_text(errors='replace')[-2000:]}"
    raise RuntimeError(msg)
