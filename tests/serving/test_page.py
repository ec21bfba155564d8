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
COUNT = "document.querySelector('#n [value=\"%d\"]').click()"
PAINTING = "!document.getElementById('painter').hidden"
MADE = "document.querySelectorAll('#shots > li').length"
ONE = f"{MADE} === 1"
IDLE = "!document.body.classList.contains('running')"
# Keeps what the page asks for and how often a picture changes; `intrude` may answer instead.
WATCH = """
window.asked = [];
window.formed = 0;
window.copied = null;
const real = window.fetch;
window.fetch = async (path, init = {}) => {
  window.asked.push({ path, body: init.body, headers: init.headers, signal: init.signal });
  return (await window.intrude?.(path, init)) ?? real(path, init);
};
new MutationObserver((changes) => {
  for (const { addedNodes } of changes) {
    window.formed += [...addedNodes].filter((node) => node.className === "forming").length;
  }
}).observe(document.getElementById("frames"), { childList: true, subtree: true });
navigator.clipboard.writeText = async (text) => { window.copied = text; };
undefined
"""
# The first time, and then no more.
REFUSE = """
window.intrude = (path) => {
  window.intrude = null;
  const error = { message: "The queue is full." };
  return Response.json({ error }, { status: 429, headers: { "Retry-After": "2" } });
};
undefined
"""


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


def generate(browser: Browser, **fields: Any) -> None:
    """Makes pictures and waits until they are there."""
    before = browser.evaluate(MADE)
    browser.fill(**fields)
    browser.click("#generate")
    browser.wait_for(f"{IDLE} && {MADE} > {before}", 120)


def picture(browser: Browser, url: str) -> np.ndarray:
    """A picture of the page as RGBA; `url` is JavaScript."""
    width, height, data = browser.pixels(url)
    return np.frombuffer(data, np.uint8).reshape(height, width, 4)


def start_from(browser: Browser, photo: Path) -> None:
    browser.upload("#file", photo)
    browser.wait_for(PAINTING)


def shown(browser: Browser) -> np.ndarray:
    return picture(browser, "document.querySelector('#frames img').src")


def sent(browser: Browser) -> dict[str, str]:
    """The fields of the last request, files left out."""
    return browser.evaluate("""(() => {
        const { body } = asked.filter(({ path }) => path.includes("images")).at(-1);
        if (typeof body === "string") return JSON.parse(body);
        return Object.fromEntries([...body].filter(([, value]) => typeof value === "string"));
    })()""")


def sent_file(browser: Browser, name: str) -> np.ndarray:
    url = f"URL.createObjectURL(asked.findLast(({{ body }}) => body?.get).body.get('{name}'))"
    return picture(browser, url)


def test_a_picture_forms_from_a_prompt(browser: Browser) -> None:
    assert browser.evaluate("document.querySelectorAll('#sampler option').length") > 3
    generate(browser, prompt=PROMPT, num_inference_steps=8)
    assert browser.evaluate("formed") >= 2, "no partial pictures were shown"
    assert sent(browser)["num_inference_steps"] == 8
    first, seed = shown(browser), browser.text("#caption .facts span").removeprefix("Seed ")
    assert first.shape == (64, 64, 4)
    assert first.std() > 5
    browser.click("#caption .facts .link")
    assert browser.evaluate("document.getElementById('seed').value") == seed
    generate(browser)
    assert np.abs(shown(browser).astype(int) - first).max() <= 8, "the seed does not repeat it"


def test_several_pictures_each_have_their_seed(browser: Browser) -> None:
    browser.evaluate(COUNT % 2)
    generate(browser, prompt=PROMPT, seed=7, num_inference_steps=4)
    assert "Seed 8" in browser.text("#shots li:first-child .facts")  # the newest is first
    assert "Seed 7" in browser.text("#shots li:last-child .facts")
    browser.click("#frames .cell:nth-child(2)")
    assert "Seed 8" in browser.text("#caption .facts")


def test_starts_from_a_picked_picture(browser: Browser, photo: Path) -> None:
    start_from(browser, photo)
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
    browser.wait_for(PAINTING)
    assert browser.text("#input-name") == "photo.png"
    assert "96 \N{MULTIPLICATION SIGN} 64" in browser.text("#mask-words")


def test_sends_a_mask_that_is_transparent_where_painted(browser: Browser, photo: Path) -> None:
    start_from(browser, photo)
    box = browser.evaluate("document.getElementById('film').getBoundingClientRect().toJSON()")
    middle = box["top"] + box["height"] / 2
    browser.drag([(box["left"] + box["width"] * share, middle) for share in (0.2, 0.3, 0.4)])
    assert "painted" in browser.text("#mask-words")
    generate(browser, prompt=PROMPT, num_inference_steps=8)
    alpha = sent_file(browser, "mask")[..., 3]
    assert alpha.shape == (64, 96)
    assert alpha[32, 19:40].max() == 0
    assert alpha[32, 60:].min() == alpha[:10].min() == 255
    assert shown(browser).std() > 5


def test_a_mask_can_be_made_with_the_keyboard(browser: Browser, photo: Path) -> None:
    start_from(browser, photo)
    browser.evaluate("document.getElementById('film').focus()")
    browser.press(" ")
    browser.press("ArrowRight", "shift")
    dab = browser.text("#mask-words")
    browser.press("z", "control")
    browser.press("z", "control")
    assert "no mask" in browser.text("#mask-words") != dab
    browser.evaluate("document.getElementById('paint-whole').focus()")
    browser.press("Enter")
    assert "100% painted" in browser.text("#mask-words")


def test_says_kindly_what_is_wrong_with_a_field(browser: Browser) -> None:
    browser.click("#generate")
    assert browser.text("#prompt-wrong")
    assert browser.evaluate("document.activeElement.id") == "prompt"
    browser.fill(prompt=PROMPT, size="custom", width=63, height=64)
    browser.click("#generate")
    browser.wait_for("document.getElementById('size-wrong').innerText")
    assert "63" in browser.text("#size-wrong")
    browser.fill(size="auto")
    generate(browser, num_inference_steps=4)
    assert browser.text("#error") == ""


def test_a_full_server_says_when_to_come_again(browser: Browser) -> None:
    browser.evaluate(REFUSE)
    browser.fill(prompt=PROMPT, num_inference_steps=4)
    browser.click("#generate")
    browser.wait_for("document.querySelector('#error button')")
    assert "The queue is full." in browser.text("#error")
    assert "Try again in 2 s" in browser.text("#error button")
    browser.wait_for("document.querySelector('#error button').innerText === 'Try again'")
    browser.click("#error button")
    browser.wait_for(ONE)


def test_tells_what_was_lost_and_keeps_the_settings(browser: Browser) -> None:
    browser.evaluate("window.intrude = () => Promise.reject(new TypeError('lost')); undefined")
    browser.fill(prompt=PROMPT)
    browser.click("#generate")
    browser.wait_for("document.querySelector('#error h2')")
    assert "cannot be reached" in browser.text("#error")
    for answer, words in (("{}", "broke off"), ('{"error": {"message": "Lost it."}}', "Lost it.")):
        stream = json.dumps(f"event: x\ndata: {answer}\n\n")
        browser.evaluate(f"window.intrude = () => new Response({stream}); undefined")
        browser.click("#error button")
        browser.wait_for(f"document.getElementById('error').innerText.includes('{words}')")
    assert browser.evaluate("document.getElementById('prompt').value") == PROMPT


def test_asks_for_a_key_and_keeps_it_in_the_tab_only(browser: Browser) -> None:
    browser.evaluate("""window.intrude = (path, { headers }) =>
        headers.Authorization ? null : new Response("{}", { status: 401 }); undefined""")
    browser.fill(prompt=PROMPT, num_inference_steps=4)
    browser.click("#generate")
    browser.wait_for("document.getElementById('key-dialog').open")
    browser.type("open-sesame")
    browser.press("Enter")
    browser.wait_for(ONE)
    assert browser.evaluate("asked.at(-1).headers.Authorization") == "Bearer open-sesame"
    assert browser.evaluate("sessionStorage.getItem('rayjobs.key')") == "open-sesame"
    assert "open-sesame" not in browser.evaluate("JSON.stringify(localStorage) + document.cookie")
    browser.click("#caption [data-action=copyCurl]")
    browser.wait_for("copied")
    assert "$RAYJOBS_API_KEY" in browser.evaluate("copied")
    assert "open-sesame" not in browser.evaluate("copied")


def test_works_by_keyboard_alone(browser: Browser) -> None:
    browser.tab_to("#prompt")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.type(PROMPT)
    browser.tab_to("#num_inference_steps")
    browser.press("a", "control")
    browser.type("4")
    browser.press("Enter", "control")
    browser.wait_for(f"{IDLE} && {ONE}")
    assert sent(browser)["num_inference_steps"] == 4
    browser.tab_to("#shots .thumb")
    browser.press("Enter")
    browser.tab_to("#shots [data-action=useAsInput]")
    browser.press(" ")
    browser.wait_for(PAINTING)


def test_cancels(browser: Browser) -> None:
    browser.fill(prompt=PROMPT, num_inference_steps=100)
    browser.evaluate(COUNT % 4)
    browser.click("#generate")
    browser.wait_for("document.getElementById('status').innerText.includes('tep')")
    browser.press("Escape")
    browser.wait_for(IDLE, 5)
    assert "Cancelled" in browser.text("#status")
    assert browser.evaluate("asked.at(-1).signal.aborted")
    browser.evaluate(COUNT % 1)
    generate(browser, num_inference_steps=4)


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("action", ["copyCurl", "copyPython"])
def test_what_it_copies_runs(
    browser: Browser, photo: Path, tmp_path: Path, action: str, edit: bool
) -> None:
    if edit:
        start_from(browser, photo)
        (tmp_path / "input.png").write_bytes(photo.read_bytes())
    generate(browser, prompt='it\'s a "red" star\nand $HOME', num_inference_steps=4)
    browser.click(f"#caption [data-action={action}]")
    browser.wait_for("copied")
    code = browser.evaluate("copied")
    command = ["bash", "-ec", code] if action == "copyCurl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    made = np.asarray(Image.open(tmp_path / "picture.png").convert("RGBA")).astype(int)
    assert np.abs(made - shown(browser)).max() <= 8


LORAS = """import(new URL("web/form.js", document.baseURI)).then(({ fillModels }) => {
  const model = { id: document.getElementById("model").value, kind: "model" };
  const lora = (id, base) => ({ id, base, kind: "lora", prompt_hints: [`a photo of ${id}`] });
  fillModels([model, lora("cat", model.id), lora("dog", null), lora("far", "another")]);
})"""


def test_offers_the_loras_of_the_model_and_sends_those_chosen(browser: Browser) -> None:
    browser.evaluate(LORAS)
    assert browser.text("#loras").split() == ["cat", "dog"]
    browser.click("#loras [value=cat]")
    browser.evaluate("document.querySelector('#loras [type=number]').value = 0.8")
    assert "a photo of cat" in browser.evaluate("document.getElementById('prompt').placeholder")
    browser.fill(prompt=PROMPT)
    browser.click("#generate")
    browser.wait_for("document.getElementById('loras-wrong').innerText")  # no such LoRA here
    assert sent(browser)["loras"] == [{"name": "cat", "scale": 0.8}]


def test_shows_older_pictures_while_another_is_made(browser: Browser) -> None:
    generate(browser, prompt=PROMPT, num_inference_steps=2)
    browser.fill(num_inference_steps=100)
    browser.evaluate(COUNT % 4)
    browser.click("#generate")
    browser.click("#shots .thumb")
    browser.click("#caption > .link")
    assert browser.evaluate("document.querySelectorAll('#frames .cell').length") == 4
    browser.click("#cancel")
    browser.wait_for(IDLE, 5)


def test_reuses_settings(browser: Browser) -> None:
    generate(browser, prompt=PROMPT, negative_prompt="grey", seed=3, num_inference_steps=4)
    browser.fill(prompt="other", negative_prompt="", seed="", num_inference_steps=9)
    browser.click("#shots [data-action=reuse]")
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
    assert browser.text("#theme") == ""
    assert browser.evaluate("document.getElementById('theme').ariaLabel") == "Theme: dark"
