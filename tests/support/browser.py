"""A headless Chromium, driven through its DevTools protocol.

Rejected: Playwright, which brings a copy of node for what a socket and a queue do.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
    "--hide-scrollbars", "--force-color-profile=srgb",
]  # fmt: skip


class Tab:
    """One page. `errors` are uncaught exceptions and console errors; `requests` the addresses that were asked for, and
    `opened` those of pages."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse, downloads: Path):
        self._loop, self._socket, self.downloads = loop, socket, downloads
        self._number, self._loaded = 0, False
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.opened: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._number += 1
        number = self._number

        async def call() -> dict[str, Any]:
            await self._socket.send_json({"id": number, "method": method, "params": params})
            while True:
                answer = json.loads((await self._socket.receive(timeout=60)).data)
                if answer.get("id") == number:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']['message']}")
                    return answer["result"]
                self._note(answer)

        return self._loop.run_until_complete(call())

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it is there."""
        self.size(width, height, dark)
        self._loaded = False
        self.opened.append(path.resolve().as_uri())
        self.send("Page.navigate", url=self.opened[-1])
        self.wait(lambda: self._loaded or not self.send("Runtime.evaluate", expression="0"))

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def js(self, expression: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        result = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait(self, true: Any, seconds: float = 30) -> None:
        """Until a function, or an expression of the page, is true."""
        end = time.monotonic() + seconds
        while not (true() if callable(true) else self.js(true)):
            if time.monotonic() > end:
                raise TimeoutError(f"{true} within {seconds} s")
            time.sleep(0.02)

    def frame(self) -> None:
        """Until what was changed has been drawn."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def key(self, key: str, *, shift: bool = False, ctrl: bool = False) -> None:
        """Press and let go of a key as a keyboard does."""
        modifiers = 8 * shift + 2 * ctrl
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9, "Home": 36, "End": 35}
        more: dict[str, Any] = {
            "key": key,
            "modifiers": modifiers,
            "windowsVirtualKeyCode": codes.get(key, ord(key.upper()[0])),
        }
        if len(key) == 1:
            more["text"] = key
        self.send("Input.dispatchKeyEvent", type="keyDown", **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **more)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Select with the mouse from one point to another."""
        common = {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **common)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=end[0], y=end[1], buttons=1, **common)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **common)

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y = self.js(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        self.drag((x, y), (x, y))

    def screenshot(self, path: Path, whole: bool = False) -> None:
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def chromium() -> Iterator[Tab]:
    """A browser with a profile of its own, for as long as the context lasts."""
    assert CHROMIUM is not None
    folder = Path(tempfile.mkdtemp(prefix="selsft-browser-"))
    downloads = folder / "downloads"
    downloads.mkdir()
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"], stdout=log, stderr=log
    )
    loop = asyncio.new_event_loop()
    session = None
    try:
        port = folder / "profile" / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise RuntimeError(f"chromium did not start: {log.read()[-2000:]}")
            time.sleep(0.05)
        number = port.read_text().split("\n")[0]

        async def connect():
            nonlocal session
            session = aiohttp.ClientSession()
            async with session.get(f"http://127.0.0.1:{number}/json") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            return await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

        tab = Tab(loop, loop.run_until_complete(connect()), downloads)
        tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        yield tab
    finally:
        if session is not None:
            loop.run_until_complete(session.close())
        loop.close()
        process.terminate()
        process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
