"""What the page says and does, in a real browser, with engines that need no model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serve.protocol import Event, Failed, Finished, ImagesRequest, Waiting
from tests.serving.browser import Browser, find_chromium
from tests.serving.in_process import QuickEngines, serving

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
IDLE = "!document.body.classList.contains('running')"
LISTED = "document.querySelectorAll('#model option').length > 0"
PHONE = (390, 780)
HINTS = ["a red star", "a blue ring", "a green heart", "two crosses", "a fifth"]


class Told(QuickEngines):
    """Answers by the prompt: `full`, `half` and then nothing, `slow`, else an image."""

    async def states(self) -> dict[str, dict[str, Any]]:
        load = {"starter": (2, 1)}
        return {"one": {"facts": {}, "names": ["starter", "plain"], "load": load}}

    async def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]:
        if request.prompt == "full":
            yield Failed("busy", "too many requests are waiting", None, 2.0)
            return
        async for event in super().events(request, streamed):
            if request.prompt == "slow":
                yield Waiting(0, 0.1)
                await asyncio.sleep(60)
            yield event
            if request.prompt == "half" and isinstance(event, Finished):
                await asyncio.sleep(1)  # so that it arrives
                raise RuntimeError("the replica is lost")
            if request.prompt == "none":
                raise RuntimeError("the replica is lost")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    models = [{"name": "starter", "uri": "starter", "hint": HINTS}]
    with serving(Told(), models=[*models, {"name": "plain", "uri": "starter"}]) as found:
        yield found


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with Browser(str(CHROMIUM)) as browser:
        yield browser


@pytest.fixture
def browser(opened: Browser, url: str) -> Browser:
    show(opened, url)
    return opened


def show(browser: Browser, url: str, width: int = 1360, height: int = 900) -> None:
    browser.open("about:blank")
    browser.open(f"{url}/", width, height)
    browser.evaluate("sessionStorage.clear()")
    browser.open("about:blank")
    browser.open(f"{url}/", width, height)
    browser.wait_for(LISTED)


def ask(browser: Browser, prompt: str, n: int = 1) -> None:
    browser.fill(prompt=prompt)
    browser.evaluate(f"document.querySelector('#n [value=\"{n}\"]').click()")
    browser.click("#generate")


def test_on_a_phone_the_picture_is_in_view(opened: Browser, url: str) -> None:
    show(opened, url, *PHONE)
    for _ in range(2):
        ask(opened, "a star")
        opened.wait_for(f"{IDLE} && document.querySelector('#frames img')")
        place = "document.getElementById('mat').getBoundingClientRect()"
        top, bottom = opened.evaluate(f"[{place}.top, {place}.bottom]")
        assert top >= 0
        assert bottom <= PHONE[1]


def test_what_a_model_can_draw_is_shown(browser: Browser) -> None:
    chips = "[...document.querySelectorAll('#hint .chip')].map((chip) => chip.innerText)"
    assert browser.evaluate(chips) == HINTS[:4]
    browser.click("#hint .chip:nth-of-type(2)")
    assert browser.evaluate("document.getElementById('prompt').value") == HINTS[1]
    browser.fill(model="plain")
    assert len(browser.evaluate(chips)) == 4


def test_the_load_of_the_chosen_model_is_told(browser: Browser) -> None:
    browser.wait_for("document.getElementById('load').innerText")
    assert browser.text("#load") == "2 pictures in progress, 1 waiting, 1 replica"
    browser.fill(model="plain")
    browser.wait_for("document.getElementById('load').innerText.startsWith('Idle')")


def test_a_full_server_is_told_of_once(browser: Browser) -> None:
    ask(browser, "full")
    browser.wait_for("document.querySelector('#error h2')")
    assert browser.text("#error").lower().count("too many") == 1


@pytest.mark.parametrize(("prompt", "is_there"), [("half", True), ("none", False)])
def test_what_broke_off_is_told_as_it_was(browser: Browser, prompt: str, is_there: bool) -> None:
    ask(browser, prompt, n=2)
    browser.wait_for("document.querySelector('#error h2')")
    assert ("is in the gallery" in browser.text("#error")) == is_there


def test_a_size_has_the_server_s_bounds(browser: Browser) -> None:
    browser.fill(size="custom", width=2048, height=2048)
    ask(browser, "a star")
    assert "makes up to 2359296" in browser.text("#size-wrong")
    browser.fill(width=2056, height=64)
    ask(browser, "a star")
    assert "from 8 to 2048" in browser.text("#size-wrong")
    browser.fill(width=8, height=2048)
    ask(browser, "a star")
    browser.wait_for(f"{IDLE} && document.querySelector('#shots li')")


def test_a_long_first_step_is_called_so(browser: Browser) -> None:
    ask(browser, "slow")
    browser.wait_for("document.getElementById('status').innerText.includes('so far')")
    assert "Making the first step" in browser.text("#status")
    browser.press("Escape")
    browser.wait_for(IDLE)


def test_a_picture_that_no_browser_reads_is_told(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    browser.upload("#file", path)
    browser.wait_for("document.getElementById('image-wrong').innerText")
    assert "PNG, JPEG or WebP" in browser.text("#image-wrong")


def test_a_mask_is_painted_from_the_keyboard_alone(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (96, 64), "red").save(path)
    browser.upload("#file", path)
    browser.wait_for("!document.getElementById('painter').hidden")
    browser.tab_to("#mask-open")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.id") == "film"
    assert "space paints" in browser.text("#caption")
    browser.press(" ")
    assert "painted" in browser.text("#mask-words")
