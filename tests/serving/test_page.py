"""The web page as a person meets it: a real browser, the real app, the starter model."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serving.browser import Browser, find_chromium

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
PROMPT = "a photo of a red star on a blue background"
IDLE = "!document.body.classList.contains('running')"
# Keeps what the page asks for and how often a picture changes; `intrude` may answer instead.
WATCH = """
window.asked = [];
window.formed = 0;
window.copied = null;
const real = window.fetch;
window.fetch = async (path, init = {}) => {
  window.asked.push({ path, body: init.body, headers: init.headers, signal: init.signal });
  return (await window.intrude?.(path, init, () => real(path, init))) ?? real(path, init);
};
new MutationObserver((changes) => {
  for (const { addedNodes } of changes) {
    window.formed += [...addedNodes].filter((node) => node.className === "forming").length;
  }
}).observe(document.getElementById("frames"), { childList: true, subtree: true });
navigator.clipboard.writeText = async (text) => { window.copied = text; };
undefined
"""
REFUSE = """
let times = 0;
window.intrude = (path) => {
  if (!path.endsWith("generations") || times++) return null;
  const error = { message: "The queue is full.", type: "t", param: null, code: null };
  const headers = { "Content-Type": "application/json", "Retry-After": "2" };
  return new Response(JSON.stringify({ error }), { status: %d, headers });
};
undefined
"""
PIXELS = """(async (url) => {
  const bitmap = await createImageBitmap(await (await fetch(url)).blob());
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return [width, height, btoa(data.reduce((text, byte) => text + String.fromCharCode(byte), ""))];
})"""


@pytest.fixture
def browser(app_url: str) -> Iterator[Browser]:
    """The page, open, with its models listed."""
    with Browser(str(CHROMIUM)) as opened:
        show(opened, app_url)
        yield opened
        assert opened.problems == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of another shape than the model's, to start from."""
    colours = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(colours).resize((96, 64), Image.Resampling.BICUBIC).save(path)
    return path


def show(browser: Browser, url: str, width: int = 1360, height: int = 900, **how: bool) -> None:
    browser.open(url, width, height, **how)
    browser.wait_for("document.querySelectorAll('#model option').length > 0")
    browser.evaluate(WATCH)


def fill(browser: Browser, **fields: Any) -> None:
    """Sets fields as typing would."""
    for name, value in fields.items():
        browser.evaluate(f"""(() => {{
            const field = document.getElementById("{name}");
            field.value = {json.dumps(str(value))};
            for (const kind of ["input", "change"])
              field.dispatchEvent(new Event(kind, {{ bubbles: true }}));
        }})()""")


def generate(browser: Browser, **fields: Any) -> None:
    """Makes pictures and waits until they are there."""
    before = browser.evaluate("document.querySelectorAll('#shots > li').length")
    fill(browser, **fields)
    browser.click("#generate")
    browser.wait_for(f"{IDLE} && document.querySelectorAll('#shots > li').length > {before}", 120)


def text(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


def pixels(browser: Browser, url: str) -> np.ndarray:
    """A picture of the page as RGBA; `url` is JavaScript."""
    width, height, data = browser.evaluate(f"{PIXELS}({url})")
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)


def shown(browser: Browser) -> np.ndarray:
    return pixels(browser, "document.querySelector('#frames img').src")


def sent(browser: Browser) -> dict[str, str]:
    """The fields of the last request, files left out."""
    return browser.evaluate("""(() => {
        const { body } = asked.filter(({ path }) => path.includes("images")).at(-1);
        if (typeof body === "string") return JSON.parse(body);
        return Object.fromEntries([...body].filter(([, value]) => typeof value === "string"));
    })()""")


def sent_file(browser: Browser, name: str) -> np.ndarray:
    url = f"URL.createObjectURL(asked.findLast(({{ body }}) => body?.get).body.get('{name}'))"
    return pixels(browser, url)


def test_a_picture_forms_from_a_prompt(browser: Browser) -> None:
    assert browser.evaluate("document.querySelectorAll('#sampler option').length") > 3
    generate(browser, prompt=PROMPT, num_inference_steps=8)
    assert browser.evaluate("formed") >= 2, "no partial pictures were shown"
    assert sent(browser)["num_inference_steps"] == 8
    first, seed = shown(browser), text(browser, "#caption .facts span").removeprefix("Seed ")
    assert first.shape == (64, 64, 4)
    assert first.std() > 5
    browser.click("#caption .facts .link")
    assert browser.evaluate("document.getElementById('seed').value") == seed
    generate(browser)
    assert np.abs(shown(browser).astype(int) - first).max() <= 8, "the seed does not repeat it"


def test_several_pictures_each_have_their_seed(browser: Browser) -> None:
    browser.evaluate("document.querySelector('#n [value=\"2\"]').click()")
    generate(browser, prompt=PROMPT, seed=7, num_inference_steps=4)
    seeds = browser.evaluate(
        "[...document.querySelectorAll('#shots .facts')].map((line) => line.innerText)"
    )
    assert ["Seed 8" in seeds[0], "Seed 7" in seeds[1]] == [True, True]
    browser.click("#frames .cell:nth-child(2)")
    assert "Seed 8" in text(browser, "#caption .facts")


def test_starts_from_a_picked_picture(browser: Browser, photo: Path) -> None:
    browser.upload("#file", photo)
    browser.wait_for("!document.getElementById('painter').hidden")
    generate(browser, prompt=PROMPT, strength=0.3, num_inference_steps=8)
    assert sent(browser)["strength"] == "0.3"
    assert sent_file(browser, "image").shape == (64, 96, 4)
    assert not browser.evaluate("asked.findLast(({ body }) => body?.has).body.has('mask')")
    height, width, _ = shown(browser).shape
    assert width > height, "the picture's shape was lost"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_takes_pictures_that_are_dropped_or_pasted(browser: Browser, photo: Path, way: str) -> None:
    data = base64.b64encode(photo.read_bytes()).decode()
    browser.evaluate(f"""(() => {{
        const bytes = Uint8Array.from(atob("{data}"), (letter) => letter.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], "photo.png", {{ type: "image/png" }}));
        const how = {{ bubbles: true, cancelable: true }};
        document.body.dispatchEvent("{way}" === "drop"
          ? new DragEvent("drop", {{ ...how, dataTransfer: files }})
          : new ClipboardEvent("paste", {{ ...how, clipboardData: files }}));
    }})()""")
    browser.wait_for("!document.getElementById('painter').hidden")
    assert text(browser, "#input-name") == "photo.png"
    assert "96 \N{MULTIPLICATION SIGN} 64" in text(browser, "#mask-words")


def test_sends_a_mask_that_is_transparent_where_painted(browser: Browser, photo: Path) -> None:
    browser.upload("#file", photo)
    browser.wait_for("!document.getElementById('painter').hidden")
    left, top, width, height = browser.evaluate("""(() => {
        const box = document.getElementById("film").getBoundingClientRect();
        return [box.left, box.top, box.width, box.height];
    })()""")
    path = [(0.2, 0.5), (0.3, 0.5), (0.4, 0.5)]
    browser.drag([(left + width * x, top + height * y) for x, y in path])
    assert "painted" in text(browser, "#mask-words")
    generate(browser, prompt=PROMPT, num_inference_steps=8)
    alpha = sent_file(browser, "mask")[..., 3]
    assert alpha.shape == (64, 96)
    assert alpha[32, 19:40].max() == 0
    assert alpha[32, 60:].min() == alpha[:10].min() == 255
    assert shown(browser).std() > 5


def test_a_mask_can_be_made_with_the_keyboard(browser: Browser, photo: Path) -> None:
    browser.upload("#file", photo)
    browser.wait_for("!document.getElementById('painter').hidden")
    browser.evaluate("document.getElementById('film').focus()")
    browser.press(" ")
    browser.press("ArrowRight", "shift")
    dab = text(browser, "#mask-words")
    browser.press("z", "control")
    browser.press("z", "control")
    assert "no mask" in text(browser, "#mask-words") != dab
    browser.evaluate("document.getElementById('paint-whole').focus()")
    browser.press("Enter")
    assert "100% painted" in text(browser, "#mask-words")


def test_says_kindly_what_is_wrong_with_a_field(browser: Browser) -> None:
    browser.click("#generate")
    assert text(browser, "#prompt-wrong")
    assert browser.evaluate("document.activeElement.id") == "prompt"
    fill(browser, prompt=PROMPT, size="custom", width=63, height=64)
    browser.click("#generate")
    browser.wait_for("document.getElementById('size-wrong').innerText")
    assert "63" in text(browser, "#size-wrong")
    assert text(browser, "#trouble h2")
    fill(browser, size="auto")
    generate(browser, num_inference_steps=4)
    assert text(browser, "#trouble") == ""


def test_a_full_server_says_when_to_come_again(browser: Browser) -> None:
    browser.evaluate(REFUSE % 429)
    fill(browser, prompt=PROMPT, num_inference_steps=4)
    browser.click("#generate")
    browser.wait_for("document.querySelector('#trouble button')")
    assert "The queue is full." in text(browser, "#trouble")
    assert "Try again in 2 s" in text(browser, "#trouble button")
    browser.wait_for("document.querySelector('#trouble button').innerText === 'Try again'")
    browser.click("#trouble button")
    browser.wait_for("document.querySelectorAll('#shots > li').length === 1")


def test_tells_a_lost_connection_and_keeps_the_settings(browser: Browser) -> None:
    browser.evaluate(
        "window.intrude = () => { throw new TypeError('Failed to fetch'); }; undefined"
    )
    fill(browser, prompt=PROMPT)
    browser.click("#generate")
    browser.wait_for("document.querySelector('#trouble h2')")
    assert "cannot be reached" in text(browser, "#trouble")
    browser.evaluate(
        """window.intrude = () => new Response("event: x\\ndata: {}\\n\\n"); undefined"""
    )
    browser.click("#trouble button")
    browser.wait_for("document.querySelector('#trouble')?.innerText.includes('broke off')")
    assert browser.evaluate("document.getElementById('prompt').value") == PROMPT


def test_asks_for_a_key_and_keeps_it_in_the_tab_only(browser: Browser) -> None:
    browser.evaluate("""window.intrude = (path, { headers }) =>
        headers.Authorization ? null : new Response("{}", { status: 401 }); undefined""")
    fill(browser, prompt=PROMPT, num_inference_steps=4)
    browser.click("#generate")
    browser.wait_for("document.getElementById('key-dialog').open")
    browser.type("open-sesame")
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('#shots > li').length === 1")
    assert browser.evaluate("asked.at(-1).headers.Authorization") == "Bearer open-sesame"
    assert browser.evaluate("sessionStorage.getItem('rayjobs.key')") == "open-sesame"
    assert "open-sesame" not in browser.evaluate("JSON.stringify(localStorage) + document.cookie")
    browser.click("#caption [data-verb=copyCurl]")
    browser.wait_for("copied")
    assert "$RAYJOBS_API_KEY" in browser.evaluate("copied")
    assert "open-sesame" not in browser.evaluate("copied")


def test_works_by_keyboard_alone(browser: Browser) -> None:
    tab_to(browser, "#prompt")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.type(PROMPT)
    tab_to(browser, "#num_inference_steps")
    browser.press("a", "control")
    browser.type("4")
    browser.press("Enter", "control")
    browser.wait_for(f"{IDLE} && document.querySelectorAll('#shots > li').length === 1")
    assert sent(browser)["num_inference_steps"] == 4
    tab_to(browser, "#shots .thumb")
    browser.press("Enter")
    tab_to(browser, "#shots [data-verb=useAsInput]")
    browser.press(" ")
    browser.wait_for("!document.getElementById('painter').hidden")


def tab_to(browser: Browser, selector: str) -> None:
    for _ in range(80):
        browser.press("Tab")
        if browser.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"{selector} is not reached with the Tab key")


def test_cancels(browser: Browser) -> None:
    fill(browser, prompt=PROMPT, num_inference_steps=50)
    browser.evaluate("document.querySelector('#n [value=\"4\"]').click()")
    browser.click("#generate")
    browser.wait_for("document.getElementById('status').innerText.includes('tep')")
    browser.press("Escape")
    browser.wait_for(IDLE, 5)
    assert "Cancelled" in text(browser, "#status")
    assert browser.evaluate("asked.at(-1).signal.aborted")
    browser.evaluate("document.querySelector('#n [value=\"1\"]').click()")
    generate(browser, num_inference_steps=4)


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("verb", ["copyCurl", "copyPython"])
def test_what_it_copies_runs(
    browser: Browser, photo: Path, tmp_path: Path, verb: str, edit: bool
) -> None:
    if edit:
        browser.upload("#file", photo)
        browser.wait_for("!document.getElementById('painter').hidden")
        (tmp_path / "input.png").write_bytes(photo.read_bytes())
    generate(browser, prompt='it\'s a "red" star\nand $HOME', num_inference_steps=4)
    browser.click(f"#caption [data-verb={verb}]")
    browser.wait_for("copied")
    code = browser.evaluate("copied")
    command = ["bash", "-ec", code] if verb == "copyCurl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    made = np.asarray(Image.open(tmp_path / "picture.png").convert("RGBA")).astype(int)
    assert np.abs(made - shown(browser)).max() <= 8


def test_reuses_settings(browser: Browser) -> None:
    generate(browser, prompt=PROMPT, negative_prompt="grey", seed=3, num_inference_steps=4)
    fill(browser, prompt="other", negative_prompt="", seed="", num_inference_steps=9)
    browser.click("#shots [data-verb=reuse]")
    names = ["prompt", "negative_prompt", "seed", "num_inference_steps"]
    values = browser.evaluate(f"{names}.map((name) => document.getElementById(name).value)")
    assert values == [PROMPT, "grey", "3", "4"]


READ_CUT = """(async () => {
  const { events } = await import(new URL("web/stream.js", document.baseURI));
  const text = ': hi\\r\\n\\r\\nevent: a\\r\\ndata: {"a":\\r\\ndata: "né"}\\r\\n\\r\\n' +
    'data:{"b":2}\\n\\ndata: [DONE]\\n\\ndata: {"c":3}\\n\\n';
  const bytes = new TextEncoder().encode(text);
  for (let size = 1; size < bytes.length; size++) {
    const cut = (stream) => {
      for (let at = 0; at < bytes.length; at += size) stream.enqueue(bytes.slice(at, at + size));
      stream.close();
    };
    const found = [];
    for await (const event of events(new ReadableStream({ start: cut }))) found.push(event);
    if (JSON.stringify(found) !== '[{"a":"né"},{"b":2}]') return [size, found];
  }
  return "same";
})()"""


def test_reads_events_however_they_are_cut(browser: Browser) -> None:
    """Chunks end anywhere: in mid-line, in a CRLF, in the middle of a letter."""
    assert browser.evaluate(READ_CUT) == "same"


def test_everything_that_can_be_changed_has_a_name(browser: Browser) -> None:
    nameless = browser.evaluate("""[...document.querySelectorAll("input, select, textarea, button")]
        .filter((field) => !field.labels?.length && !field.ariaLabel && !field.innerText.trim())
        .filter((field) => field.checkVisibility()).map((field) => field.outerHTML)""")
    assert nameless == []


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
def test_looks_right(browser: Browser, app_url: str, tmp_path: Path, name: str) -> None:
    width, height = (390, 844) if name == "phone" else (1360, 900)
    show(browser, app_url, width, height, dark=name == "dark")
    browser.screenshot(tmp_path / f"{name}-empty.png")
    generate(browser, prompt=PROMPT, num_inference_steps=4)
    browser.screenshot(tmp_path / f"{name}-done.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    shades = [int(part) for part in ground.removeprefix("rgb(").rstrip(")").split(",")]
    assert (max(shades) < 60) is (name == "dark")


def test_remembers_the_theme_that_was_chosen(browser: Browser, app_url: str) -> None:
    browser.click("#theme")
    browser.click("#theme")
    show(browser, app_url)
    assert browser.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    assert text(browser, "#theme") == ""
    assert browser.evaluate("document.getElementById('theme').ariaLabel") == "Theme: dark"
