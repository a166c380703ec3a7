"""A headless Chromium, driven by the DevTools protocol."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    def __init__(self, socket):
        self.socket, self.count = socket, 0

    def call(self, method, **given):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": given}))
        while (found := json.loads(self.socket.recv(30))).get("id") != self.count:
            pass
        assert "error" not in found, found
        return found["result"]

    def js(self, expression):
        """The value of an expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression, seconds=30):
        end = time.time() + seconds
        while not (value := self.js(expression)):
            assert time.time() < end, expression
            time.sleep(0.05)
        return value

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, modifiers=0):
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      modifiers=modifiers, **(text if kind == "keyDown" else {}))  # fmt: skip

    def picture(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def opened(address, width=900, height=700):
    """A page at `address`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--lang=en-US",
             f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            file, end = Path(profile, "DevToolsActivePort"), time.time() + 60
            while not file.exists() or len(file.read_text().split()) < 2:
                assert process.poll() is None, "Chromium has ended"
                assert time.time() < end, "Chromium does not begin"
                time.sleep(0.05)
            port = file.read_text().split()[0]
            tabs = httpx.get(f"http://127.0.0.1:{port}/json").json()
            socket = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with connect(socket, max_size=None) as connection:
                page = Page(connection)
                page.call("Page.enable")
                page.call("Page.navigate", url=address)
                page.until("document.readyState === 'complete'")
                yield page
        finally:
            process.kill()
            process.wait()
