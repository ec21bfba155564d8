"""OpenAI's own client against the running application."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request

pytestmark = pytest.mark.ray
PROMPT = "a photo of a red star on a blue background"
QUICK: dict[str, Any] = {"num_inference_steps": 6}
Picture = Callable[[int], Image.Image]


@pytest.fixture(scope="module")
def client(app_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app_url}/v1", api_key="none", max_retries=0)


def opened(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), int)


def png(image: Image.Image) -> tuple[str, bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "image.png", buffer.getvalue(), "image/png"


def right_half(side: int = 64) -> Image.Image:
    """A mask as OpenAI means it: transparent where the picture is to be changed."""
    mask = Image.new("RGBA", (side, side), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (side // 2, 0, side, side))
    return mask


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["starter"]
    assert client.models.retrieve("starter").object == "model"
    assert models[0].model_dump()["default_size"] == "64x64"


def test_generations_are_the_engine_s_pictures(client: openai.OpenAI, starter: Model) -> None:
    answer = client.images.generate(
        model="starter",
        prompt=PROMPT,
        n=2,
        size="64x64",
        extra_body={"seed": 7, "num_inference_steps": 6, "guidance_scale": 4, "sampler": "ddim"},
    )
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * 16
    requests = [
        Request(prompt=PROMPT, seed=seed, steps=6, guidance_scale=4, sampler="ddim")
        for seed in (7, 8)
    ]
    made = sorted(Engine(starter, 1).generate(requests), key=lambda r: r.request.seed)
    for data, result in zip(answer.data or [], made, strict=True):
        difference = np.abs(opened(str(data.b64_json)) - np.asarray(result.image, int))
        assert difference.max() <= 1


@pytest.mark.parametrize(("form", "name"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats(client: openai.OpenAI, form: Any, name: str) -> None:
    answer = client.images.generate(
        prompt=PROMPT, output_format=form, output_compression=80, extra_body=QUICK
    )
    (data,) = answer.data or []
    assert Image.open(io.BytesIO(base64.b64decode(str(data.b64_json)))).format == name


def test_what_openai_has_and_diffusion_does_not_is_taken(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT,
        quality="high",
        style="vivid",
        user="me",
        moderation="low",
        size="auto",
        extra_body=QUICK,
    )
    assert len(answer.data or []) == 1


def test_an_edit_is_image_to_image(client: openai.OpenAI, picture: Picture) -> None:
    extra: dict[str, Any] = {"seed": 3, "num_inference_steps": 10}
    near, far = (
        client.images.edit(
            image=png(picture(1)), prompt=PROMPT, extra_body=extra | {"strength": strength}
        )
        for strength in (0.1, 1.0)
    )
    known = np.asarray(picture(1), int)
    errors = [np.abs(opened(str(a.data[0].b64_json)) - known).mean() for a in (near, far)]
    assert errors[0] < 12 < errors[1]


def test_a_mask_keeps_the_rest(client: openai.OpenAI, picture: Picture) -> None:
    answer = client.images.edit(
        image=[png(picture(2))], mask=png(right_half()), prompt=PROMPT, size="64x64"
    )
    made, known = opened(str(answer.data[0].b64_json)), np.asarray(picture(2), int)
    assert np.abs(made[:, :32] - known[:, :32]).max() <= 1
    assert np.abs(made[:, 32:] - known[:, 32:]).mean() > 5


def test_streams(client: openai.OpenAI, picture: Picture) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, n=2, extra_body=QUICK | {"seed": 5}
    )
    events = list(stream)
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"] * 2
    assert [e.partial_image_index for e in events if "partial" in e.type] == [0, 1, 0, 1]
    assert all(opened(event.b64_json).shape == (64, 64, 3) for event in events)
    assert events[2].usage.output_tokens == 16
    edits = client.images.edit(
        image=png(picture(3)), prompt=PROMPT, stream=True, partial_images=1, extra_body=QUICK
    )
    assert [e.type for e in edits] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_stream_without_partial_images_has_one_event(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=0, extra_body=QUICK)
    assert [event.type for event in stream] == ["image_generation.completed"]


REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]] = [
    ({"size": "13x13"}, openai.BadRequestError, "size"),
    ({"size": "99999x8"}, openai.BadRequestError, "size"),
    ({"size": "large"}, openai.BadRequestError, "size"),
    ({"n": 11}, openai.BadRequestError, "n"),
    ({"model": "nobody"}, openai.NotFoundError, "model"),
    ({"model": "../../etc"}, openai.NotFoundError, "model"),
    ({"prompt": ""}, openai.BadRequestError, "prompt"),
    ({"prompt": "x" * 5000}, openai.BadRequestError, "prompt"),
    ({"response_format": "url"}, openai.BadRequestError, "response_format"),
    ({"background": "transparent"}, openai.BadRequestError, "background"),
    ({"extra_body": {"typo": 1}}, openai.BadRequestError, "typo"),
    ({"extra_body": {"sampler": "edm_euler"}}, openai.BadRequestError, "sampler"),
    ({"extra_body": {"sampler": "magic"}}, openai.BadRequestError, "sampler"),
    ({"extra_body": {"num_inference_steps": 999}}, openai.BadRequestError, "num_inference_steps"),
    ({"extra_body": {"guidance_scale": -1}}, openai.BadRequestError, "guidance_scale"),
    ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed"),
    ({"extra_body": {"loras": [{"name": "nobody"}]}}, openai.NotFoundError, "loras"),
    ({"partial_images": 2}, openai.BadRequestError, "partial_images"),
]


@pytest.mark.parametrize(("keys", "kind", "param"), REFUSED)
def test_refusals_are_the_client_s_own_errors(
    client: openai.OpenAI, keys: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as told:
        client.images.generate(**{"prompt": PROMPT, **keys})
    assert told.value.param == param
    assert told.value.request_id
    assert "," not in told.value.request_id
    assert set(told.value.body) == {"message", "type", "param", "code"}


def test_a_deadline_is_a_gateway_timeout(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as told:
        client.images.generate(
            prompt=PROMPT, extra_body={"deadline_s": 0.05, "num_inference_steps": 150}
        )
    assert told.value.status_code == 504
    assert told.value.response.headers["x-should-retry"] == "false"


def test_a_bad_picture_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.images.edit(image=("x.png", b"no picture", "image/png"), prompt=PROMPT)
    assert told.value.param == "image"


def test_a_mask_of_another_size_is_told(client: openai.OpenAI, picture: Picture) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.images.edit(image=png(picture(1)), mask=png(right_half(32)), prompt=PROMPT)
    assert told.value.param == "mask"
    assert "32" in told.value.message
