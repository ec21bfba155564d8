"""Pictures to follow, on the page: in a real browser, with engines that tell what is asked."""

import base64
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayjobs.diffusion.weights import STARTER
from serve.config import ServeConfig
from serve.protocol import ControlUse, Event, ImagesRequest
from serve.registry import Registry
from tests.serving.browser import Browser, find_chromium
from tests.serving.in_process import QuickEngines, serving

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
IDLE = "!document.body.classList.contains('running')"
MADE = "document.querySelectorAll('#shots > li').length"
LISTED = "document.querySelectorAll('#model option').length > 0"
EDGES, DEPTH = "[aria-label=edges]", "[aria-label=depth]"
CONTROLS = [
    {"name": "edges", "uri": "nets/edges"},
    {"name": "depth", "uri": "nets/depth", "base": "starter"},
    {"name": "far", "uri": "nets/far", "base": "second"},
]
MODELS = [{"name": name, "uri": "starter"} for name in ("starter", "second")]
PROMPT = 'it\'s a "red" star\nfor $HOME, `ls` and \\n'
# Drops a file there; `{0}` is a selector, `{1}` a name and `{2}` its bytes in base64.
DROP = """(() => {{
  const bytes = Uint8Array.from(atob("{2}"), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "{1}", {{ type: "image/png" }}));
  const how = {{ bubbles: true, cancelable: true, dataTransfer }};
  for (const kind of ["dragover", "drop"])
    document.querySelector("{0}").dispatchEvent(new DragEvent(kind, how));
}})()"""
SAVED = """new Promise((done) => {
  const files = [];
  HTMLAnchorElement.prototype.click = function () { files.push(this.download); };
  document.querySelector("#caption [data-action=saveInput]").click();
  setTimeout(() => done(files), 200);
})"""
COPY = "navigator.clipboard.writeText = async (text) => { window.copied = text; }; undefined"


@pytest.fixture(scope="module")
def engines() -> QuickEngines:
    return QuickEngines()


@pytest.fixture(scope="module")
def url(engines: QuickEngines) -> Iterator[str]:
    with serving(engines, models=MODELS, controls=CONTROLS) as found:
        yield found


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with Browser(str(CHROMIUM)) as browser:
        yield browser


@pytest.fixture
def browser(opened: Browser, url: str) -> Iterator[Browser]:
    show(opened, url)
    yield opened
    opened.evaluate("sessionStorage.clear()")
    assert opened.problems == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return noise(tmp_path / "photo.png", 96, 64)


def noise(path: Path, width: int, height: int) -> Path:
    """A picture whose file is as large as its pixels."""
    colours = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(colours).save(path)
    return path


def show(browser: Browser, url: str, width: int = 1360, height: int = 900, **how: bool) -> None:
    browser.open("about:blank")
    browser.open(f"{url}/", width, height, **how)
    browser.wait_for(LISTED)
    browser.evaluate(COPY)


def generate(browser: Browser, **fields: Any) -> None:
    before = browser.evaluate(MADE)
    browser.fill(**{"prompt": PROMPT} | fields)
    browser.click("#generate")
    browser.wait_for(f"{IDLE} && {MADE} > {before}", 60)


def drop(browser: Browser, selector: str, photo: Path) -> None:
    data = base64.b64encode(photo.read_bytes()).decode()
    browser.evaluate(DROP.format(selector, photo.name, data))


def choose(browser: Browser, photo: Path, row: str = EDGES) -> None:
    browser.upload(f"{row} [type=file]", photo)
    browser.wait_for(f"document.querySelector('{row} img').src")


def asked(engines: QuickEngines) -> list[tuple[str, float, str | None]]:
    """The controls of the last request."""
    return [(use.name, use.scale, use.preprocess) for use in engines.asked[-1].controls]


def pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()


def test_controls_of_the_model_follow_pictures(
    browser: Browser, engines: QuickEngines, photo: Path, url: str
) -> None:
    names = "[...document.querySelectorAll('#controls b')].map((name) => name.innerText)"
    assert browser.evaluate(names) == ["edges", "depth"]
    generate(browser)
    assert asked(engines) == []
    choose(browser, photo)
    browser.evaluate(f"""(() => {{
        const scale = document.querySelector('{EDGES} [type=range]');
        scale.value = 0.7;
        scale.dispatchEvent(new Event("input"));
    }})()""")
    browser.click(f"{EDGES} [type=checkbox]")
    generate(browser)
    assert asked(engines) == [("edges", 0.7, "canny")]
    (use,) = engines.asked[-1].controls
    assert isinstance(use, ControlUse)
    assert use.pixels.data == pixels(photo)

    browser.fill(model="second")
    assert browser.evaluate(names) == ["edges", "far"]
    browser.fill(model="starter")
    assert "photo.png, 96 \N{MULTIPLICATION SIGN} 64" in browser.text(EDGES)

    show(browser, url)  # pictures are lost, the rest of the form is not
    assert "Drop or choose" in browser.text(EDGES)
    generate(browser)
    assert asked(engines) == []
    choose(browser, photo)
    generate(browser)
    assert asked(engines) == [("edges", 0.7, "canny")]


def test_a_picture_dropped_on_a_control_goes_there_only(
    browser: Browser, engines: QuickEngines, photo: Path, tmp_path: Path
) -> None:
    drop(browser, DEPTH, photo)
    browser.wait_for(f"document.querySelector('{DEPTH} img').src")
    assert not browser.evaluate("document.body.classList.contains('dropping')")
    assert browser.evaluate("document.getElementById('input-card').hidden")
    start = noise(tmp_path / "start.png", 64, 64)
    drop(browser, "#controls-box > legend", start)  # on anything else it is to start from
    browser.wait_for("!document.getElementById('input-card').hidden")
    generate(browser)
    request = engines.asked[-1]
    assert asked(engines) == [("depth", 1.0, None)]
    assert request.controls[0].pixels.data == pixels(photo)
    assert request.init is not None
    assert request.init.data != request.controls[0].pixels.data


def test_settings_that_are_reused_bring_the_picture_back(
    browser: Browser, engines: QuickEngines, photo: Path
) -> None:
    choose(browser, photo, DEPTH)
    generate(browser, seed=3)
    browser.evaluate(f"document.querySelector('{DEPTH} button').focus()")
    browser.press("Enter")
    assert browser.evaluate(f"document.activeElement.matches('{DEPTH} [type=file]')")
    choose(browser, photo)
    generate(browser, seed=4)
    assert asked(engines) == [("edges", 1.0, None)]
    browser.click("#shots > li:last-child [data-action=reuse]")
    browser.wait_for("document.getElementById('seed').value === '3'")
    generate(browser)
    assert asked(engines) == [("depth", 1.0, None)]
    assert engines.asked[-1].controls[0].pixels.data == pixels(photo)


def test_mistakes_are_told_beside_the_controls(
    browser: Browser, photo: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "photo.heic"
    broken.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    browser.upload(f"{EDGES} [type=file]", broken)
    browser.wait_for("document.getElementById('controls-wrong').innerText")
    assert "PNG, JPEG or WebP" in browser.text("#controls-wrong")
    choose(browser, photo)
    assert browser.text("#controls-wrong") == ""
    browser.evaluate(f"document.querySelector('{EDGES} [type=number]').value = 9")
    browser.fill(prompt=PROMPT)
    browser.click("#generate")
    browser.wait_for("document.getElementById('controls-wrong').innerText")
    assert "at most 4" in browser.text("#controls-wrong")
    invalid = f"document.activeElement.matches('{EDGES} [aria-invalid]')"
    assert browser.evaluate(invalid)


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("action", ["copyCurl", "copyPython"])
def test_what_is_copied_runs_with_the_saved_files(
    browser: Browser, engines: QuickEngines, tmp_path: Path, action: str, edit: bool
) -> None:
    large = noise(tmp_path / "control-depth.png", 700, 600)  # more than a shell's argument holds
    choose(browser, large, DEPTH)
    browser.click(f"{DEPTH} [type=checkbox]")
    if edit:
        browser.upload("#file", noise(tmp_path / "input.png", 64, 48))
        browser.wait_for("!document.getElementById('painter').hidden")
    generate(browser, seed=5)
    before = engines.asked[-1]
    browser.click(f"#caption [data-action={action}]")
    browser.wait_for("copied")
    assert set(browser.evaluate(SAVED)) == {
        "control-depth.png",
        *(["input.png"] if edit else []),
    }
    code = browser.evaluate("copied")
    command = ["bash", "-ec", code] if action == "copyCurl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    again = engines.asked[-1]
    assert again is not before
    assert again.prompt == PROMPT
    assert again.seeds == before.seeds == (5,)
    assert asdict(again)["controls"] == asdict(before)["controls"]
    assert (again.init is not None) == edit
    assert asdict(again)["init"] == asdict(before)["init"]


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_controls_fit_the_page(
    browser: Browser, url: str, photo: Path, tmp_path: Path, name: str
) -> None:
    width, height = (390, 844) if name == "phone" else (1360, 900)
    show(browser, url, width, height, dark=name == "dark")
    choose(browser, photo)
    browser.evaluate("document.getElementById('controls-box').scrollIntoView({block: 'center'})")
    browser.screenshot(tmp_path / f"{name}.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    nameless = """[...document.querySelectorAll("#controls :is(input, button)")]
        .filter((field) => !field.labels?.length && !field.ariaLabel && !field.innerText.trim())
        .map((field) => field.outerHTML)"""
    assert json.loads(browser.evaluate(f"JSON.stringify({nameless})")) == []
    browser.tab_to(f"{EDGES} [type=file]")
    browser.tab_to(f"{EDGES} button")


class RealEngines(QuickEngines):
    """The engine itself, beside the API."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = ServeConfig.model_validate(config)

    async def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]:
        from serve.engine.loop import EngineLoop

        engine = EngineLoop(self.config.engine, Registry(self.config))
        try:
            async for event in engine.generate(request):
                yield event
        finally:
            await engine.close()


def test_a_picture_is_made_that_follows_another(
    opened: Browser, tmp_path: Path, photo: Path
) -> None:
    from tests.controls import save_controlnets

    (net,) = save_controlnets(STARTER, tmp_path, 1, channels=(8, 8, 16))
    keys = {"models": MODELS[:1], "controls": [{"name": "edges", "uri": net}]}
    with serving(RealEngines(keys), **keys) as url:
        show(opened, url)
        generate(opened, prompt="a photo of a red star", seed=1, num_inference_steps=2)
        choose(opened, photo)
        generate(opened)
        opened.click(f"{EDGES} [type=checkbox]")
        generate(opened)
        plain, followed, edges = (made(opened, place) for place in (3, 2, 1))
    assert not np.array_equal(plain, followed)
    assert not np.array_equal(followed, edges)


def made(browser: Browser, place: int) -> np.ndarray:
    """A picture of the gallery, of which 1 is the newest."""
    image = f"document.querySelector('#shots > li:nth-child({place}) img').src"
    width, height, data = browser.pixels(image)
    return np.frombuffer(data, np.uint8).reshape(height, width, 4)
