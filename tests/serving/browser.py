"""A small driver for a real browser: Chromium, over its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP *.test 127.0.0.1",
)
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
KEYS |= {"ArrowUp": 38, "ArrowDown": 40}
MODIFIERS = {"alt": 1, "control": 2, "meta": 4, "shift": 8}
PIXELS = """(async (url) => {
  const image = Object.assign(new Image(), { src: url });
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(image, 0, 0);
  const bytes = context.getImageData(0, 0, width, height).data;
  return [width, height, btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""))];
})"""


def find_chromium() -> str | None:
    """The path of a browser of the Chromium family, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class PageError(AssertionError):
    """What the page's own JavaScript says went wrong, or what never came true."""


class Browser:
    """One tab of a Chromium of its own, which ends with the `with` block."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.problems: list[str] = []
        """Exceptions nobody caught in the page."""
        self._last_id = 0

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
            self._folder = Path(undo.enter_context(folder))
            command = [self.program, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
            undo.callback(self._end)
            self._socket = undo.enter_context(self._connect())
            self._attach()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ConnectionClosed):
            # Asked to close, it takes its own children along.
            self._socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self._undo.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _connect(self) -> AbstractContextManager[ClientConnection]:
        told = self._folder / "DevToolsActivePort"
        for _ in range(300):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.program} ended with {self._process.returncode}")
            if told.exists() and len(told.read_text().splitlines()) == 2:
                port, path = told.read_text().splitlines()
                url = f"ws://127.0.0.1:{port}{path}"
                return connect(url, max_size=None, proxy=None, compression=None)
            time.sleep(0.1)
        raise RuntimeError(f"{self.program} never told its port")

    def _attach(self) -> None:
        self._session = None
        targets = self._send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        answer = self._send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "DOM"):
            self._send(f"{domain}.enable")

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        letter = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            letter["sessionId"] = self._session
        self._socket.send(json.dumps(letter))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._last_id:
                break
            self._note(answer)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _note(self, event: Mapping[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(_words(event["params"]["exceptionDetails"]))

    def open(self, url: str, width: int = 1360, height: int = 900, dark: bool = False) -> None:
        """Opens a page and waits until it is loaded."""
        self.resize(width, height, dark)
        self._send("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)})")
        self.wait_for("document.readyState === 'complete'")

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """The window's size, a phone's when it is narrow, and the system's colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        self._send("Emulation.setTouchEmulationEnabled", enabled=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = self._send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise PageError(_words(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 30) -> None:
        """Returns once an expression is true, as JavaScript sees it."""
        end = time.monotonic() + timeout
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                text = self.evaluate("document.body?.innerText.slice(0, 2000)")
                wrong = "\n".join([expression, *self.problems])
                raise PageError(f"not true in {timeout} s: {wrong}\nThe page says:\n{text}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def pixels(self, url: str) -> tuple[int, int, bytes]:
        """Width, height and RGBA bytes of a picture; `url` is JavaScript."""
        width, height, data = self.evaluate(f"{PIXELS}({url})")
        return width, height, base64.b64decode(data)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or with `whole` of the whole page."""
        answer = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def upload(self, selector: str, path: Path) -> None:
        """Picks a file in an <input type="file">."""
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        found = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._send("DOM.setFileInputFiles", nodeId=found, files=[str(path)])

    def click(self, selector: str) -> None:
        """A mouse click on the middle of an element, scrolled into view."""
        x, y = self._middle(selector)
        self.drag([(x, y)])

    def _middle(self, selector: str) -> tuple[float, float]:
        name = json.dumps(selector)
        script = f"""(() => {{
            const element = document.querySelector({name});
            element.scrollIntoView({{ block: "nearest" }});
            const box = element.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];
        }})()"""
        x, y = self.evaluate(script)
        return x, y

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Presses the mouse at the first point, moves it over the others, and lets go."""
        held = {"button": "left", "clickCount": 1}
        self._mouse("mouseMoved", *points[0])
        self._mouse("mousePressed", *points[0], buttons=1, **held)
        for x, y in points[1:]:
            self._mouse("mouseMoved", x, y, buttons=1)
        self._mouse("mouseReleased", *points[-1], **held)

    def _mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def type(self, text: str) -> None:
        """Writes where the focus is."""
        self._send("Input.insertText", text=text)

    def fill(self, **fields: Any) -> None:
        """Sets fields, by id, with the events that typing makes."""
        for name, value in fields.items():
            self.evaluate(f"""(() => {{
                const field = document.getElementById("{name}");
                field.value = {json.dumps(str(value))};
                for (const kind of ["input", "change"])
                    field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
            }})()""")

    def tab_to(self, selector: str) -> None:
        """Presses Tab until an element has the focus."""
        for _ in range(80):
            self.press("Tab")
            if self.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
        raise PageError(f"{selector} is not reached with the Tab key")

    def press(self, key: str, *held: str) -> None:
        """A key, with "control", "shift", "alt" or "meta" held."""
        text = {"Enter": "\r", " ": " "}.get(key) or (key if len(key) == 1 else "")
        event = {
            "key": key,
            "code": {" ": "Space"}.get(key, key),
            "windowsVirtualKeyCode": KEYS.get(key) or ord(key.upper()),
            "modifiers": sum(MODIFIERS[name] for name in held),
        }
        writes = text and not set(held) & {"control", "alt", "meta"}
        down = {"type": "keyDown", "text": text} if writes else {"type": "rawKeyDown"}
        self._send("Input.dispatchKeyEvent", **event, **down)
        self._send("Input.dispatchKeyEvent", **event, type="keyUp")


def _words(details: Mapping[str, Any]) -> str:
    thrown = details.get("exception", {})
    return thrown.get("description") or str(thrown.get("value") or details.get("text"))
