"""Pictures' bytes depend on pixels and parameters alone; A1111's grammar reads the parameters."""

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rayjobs.diffusion.sampler import SAMPLERS
from rayjobs.images.encode import EXTENSION, encode_picture, extension_of
from rayjobs.images.parameters import A1111, parameters_text, read_parameters, read_sampler

RECORD = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "seed": 2**62,
    "sampler": "euler_a",
    "steps": 20,
    "guidance_scale": 7.0,
    "guidance_rescale": 0.0,
    "clip_skip": None,
    "strength": None,
    "init_image": None,
    "width": 512,
    "height": 768,
    "model": "starter",
    "model_sha256": "abcdef1234567890",
}


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and parameters, as the web UI's grammar has them."""
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompts: list[list[str]] = [[], []]
    place = 0
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            place, line = 1, line.removeprefix("Negative prompt:").strip()
        prompts[place].append(line)
    facts = {k: json.loads(v) if v[:1] == v[-1:] == '"' else v for k, v in pair.findall(last)}
    return "\n".join(prompts[0]), "\n".join(prompts[1]), facts


@pytest.mark.parametrize("image_format", EXTENSION)
def test_bytes_depend_on_the_pixels_alone(
    image_format: str, picture: Callable[[int], Image.Image]
) -> None:
    image = picture(1)
    data = encode_picture(image, image_format, 90)
    laden, buffer = picture(1), io.BytesIO()
    text = PngInfo()
    text.add_text("Creation Time", "today")
    laden.save(buffer, "PNG", pnginfo=text, icc_profile=b"x" * 200, dpi=(300, 300))
    with Image.open(buffer) as again:
        again.info["comment"] = b"made by hand"
        assert encode_picture(again, image_format, 90) == data
    assert extension_of(data) == EXTENSION[image_format]
    decoded = Image.open(io.BytesIO(data))
    assert decoded.size == image.size
    if image_format in ("png", "webp-lossless"):
        assert decoded.convert("RGB").tobytes() == image.tobytes()


def test_quality_is_that_of_lossy_formats(picture: Callable[[int], Image.Image]) -> None:
    for image_format in ("webp", "jpeg"):
        low, high = (encode_picture(picture(2), image_format, q) for q in (30, 95))
        assert len(low) < len(high)
    for image_format in ("png", "webp-lossless"):
        assert len({encode_picture(picture(2), image_format, q) for q in (30, 95)}) == 1


def test_transparency_is_dropped_only_where_it_cannot_be_held() -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 40))
    modes = {f: Image.open(io.BytesIO(encode_picture(image, f, 90))).mode for f in ("png", "jpeg")}
    assert modes == {"png": "RGBA", "jpeg": "RGB"}


def test_what_is_no_picture_is_refused(picture: Callable[[int], Image.Image]) -> None:
    with pytest.raises(ValueError, match="neither png, jpeg nor webp"):
        extension_of(b"GIF89a....")
    with pytest.raises(ValueError, match="image format 'gif' is none of png, webp"):
        encode_picture(picture(0), "gif", 90)


@pytest.mark.parametrize(("prompt", "chunk"), [("a café", b"tEXt"), ("猫", b"iTXt")])
def test_parameters_travel_in_the_pngs_text(
    prompt: str, chunk: bytes, picture: Callable[[int], Image.Image]
) -> None:
    text = parameters_text({**RECORD, "prompt": prompt})
    data = encode_picture(picture(0), "png", 90, text)
    assert chunk + b"parameters\0" in data
    assert data != encode_picture(picture(0), "png", 90)
    assert Image.open(io.BytesIO(data)).info["parameters"] == text


def test_text_is_as_the_web_ui_writes_it() -> None:
    whole = {**RECORD, "clip_skip": 1, "init_image": "a.png", "strength": 0.5}
    assert parameters_text(whole) == (
        "a cat\nNegative prompt: a dog\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 4611686018427387904, Size: 512x768, "
        "Model hash: abcdef1234, Model: starter, Denoising strength: 0.5, Clip skip: 2, RNG: CPU, "
        "Version: rayjobs"
    )
    bare = {**RECORD, "negative_prompt": None, "strength": 0.5}
    prompt, negative, facts = parse(parameters_text(bare))
    assert (prompt, negative) == ("a cat", "")
    assert not {"Denoising strength", "Clip skip", "CFG rescale"} & set(facts)


NASTY = [
    "plain",
    "(masterpiece:1.2), <lora:x:0.5>, a sign: 'stop', \"quoted\"",
    "two\nlines, of it",
    "Steps: 20, Sampler: Euler, CFG scale: 7",
    "first\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1",
    'back\\slash " and, "more"',
    "",
    "猫と犬, 100% \u2028 separator",
]


@pytest.mark.parametrize("prompt", NASTY)
@pytest.mark.parametrize("negative", [None, *NASTY[:5]])
def test_any_prompt_is_read_back(prompt: str, negative: str | None) -> None:
    record = {**RECORD, "prompt": prompt, "negative_prompt": negative}
    found = parse(parameters_text(record))
    assert found[:2] == (prompt, negative or "")
    ours = read_parameters(parameters_text(record))
    assert ours is not None
    assert (ours.prompt, ours.negative_prompt, ours.facts) == (prompt, negative or None, found[2])
    assert (found[2]["Steps"], found[2]["Sampler"], found[2]["Size"]) == (
        "20",
        "Euler a",
        "512x768",
    )


@pytest.mark.parametrize(
    "model", ["org/model", "a, b: c", 'with "quotes", too', '"x"', " spaced ", "line\nbreak"]
)
def test_any_value_is_read_back(model: str) -> None:
    assert parse(parameters_text({**RECORD, "model": model}))[2]["Model"] == model


def test_a_prompt_that_looks_negative_stays_a_prompt() -> None:
    text = "Negative prompt: shown on a sign\nNegative prompt: twice"
    prompt, negative, _ = parse(parameters_text({**RECORD, "prompt": text}))
    assert prompt.split() == text.split()
    assert negative == "a dog"


@pytest.mark.parametrize(
    ("sampler", "name", "schedule"),
    [
        ("euler", "Euler", None),
        ("dpmpp_2m_karras", "DPM++ 2M", "Karras"),
        ("dpmpp_2m", "DPM++ 2M", "Uniform"),
        ("pndm", "PLMS", None),
        ("EulerDiscreteScheduler", "Euler", None),
        ("sa_solver", "sa_solver", None),
    ],
)
def test_samplers_have_the_web_uis_names(sampler: str, name: str, schedule: str | None) -> None:
    facts: dict[str, Any] = parse(parameters_text({**RECORD, "sampler": sampler}))[2]
    assert (facts["Sampler"], facts.get("Schedule type")) == (name, schedule)
    again = read_sampler(facts)
    assert again is not None
    assert SAMPLERS.get(again, (again, {})) == SAMPLERS.get(sampler, (sampler, {}))


def test_named_samplers_are_all_ours() -> None:
    assert set(A1111) <= set(SAMPLERS) | {name for name, _ in SAMPLERS.values()}


def test_a_syntax_that_is_not_the_plain_one_is_named() -> None:
    facts = parse(parameters_text({**RECORD, "prompt_syntax": "a1111-no-norm"}))[2]
    assert (facts["Emphasis"], facts["Prompt syntax"]) == ("No norm", "a1111-no-norm")
    plain = parameters_text({**RECORD, "prompt_syntax": "plain"})
    assert plain == parameters_text(RECORD)
