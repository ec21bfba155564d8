"""Links, a safety checker, the order of a stream's images, and which replica is asked."""

import asyncio
import base64
import io
import json
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from rayjobs.images import watermark
from rayjobs.images.credentials import read_credentials
from rayjobs.provenance.keys import Provenance
from serve.config import ResultsConfig, SafetyConfig
from serve.engine import safety
from serve.ingress.marks import Marks
from serve.ingress.responses import ResponseEncoder, usage
from serve.ingress.results import ResultsStore
from serve.ingress.schemas import GenerateBody
from serve.protocol import ControlUse, Event, Failed, Finished, ImagesRequest, Partial, Pixels, Step
from tests.chain import make_chain


def pixels(value: int = 0, side: int = 16) -> Pixels:
    return Pixels(side, side, bytes([value]) * (3 * side * side))


async def told(*events: Event) -> AsyncIterator[Event]:
    for event in events:
        yield event


def make_request(count: int) -> ImagesRequest:
    return ImagesRequest(id="1", caller="a", model="m", prompt="p", seeds=tuple(range(count)))


def test_a_stream_gives_one_image_after_another() -> None:
    events = [
        Partial(1, 0, pixels()),
        Step(0, 1, 2, 0.0),
        Finished(1, 1, pixels()),
        Partial(0, 0, pixels()),
        Partial(2, 0, pixels()),
        Finished(0, 0, pixels()),
        Finished(2, 2, pixels()),
    ]

    async def main() -> list[str]:
        body = GenerateBody(prompt="p", stream=True, progress=True)
        stream = ResponseEncoder(ResultsStore(ResultsConfig())).stream(
            body, make_request(3), told(*events), "image_generation"
        )
        return [data.decode() async for data in stream]

    blocks = asyncio.run(main())
    kinds = [block.split("\n")[0].removeprefix("event: ") for block in blocks]
    images = [block.split('"image_index": ')[1][0] for block in blocks]
    assert kinds[0] == "rayjobs.step"
    expected = ["image_generation.partial_image", "image_generation.completed"]
    assert kinds[1:] == expected * 3
    assert images[1:] == ["0", "0", "1", "1", "2", "2"]


def test_a_failure_in_mid_stream_is_openai_s() -> None:
    async def main() -> list[str]:
        body = GenerateBody(prompt="p", stream=True)
        events = told(Step(0, 1, 2, 0.0), Failed("deadline", "too late", "deadline_s"))
        stream = ResponseEncoder(ResultsStore(ResultsConfig())).stream(
            body, make_request(1), events, "image_generation"
        )
        return [data.decode() async for data in stream]

    assert '"error": {"message": "too late", "type": "server_error"' in asyncio.run(main())[-1]


def test_usage_counts_patches_of_16_pixels() -> None:
    made = [Finished(0, 0, pixels(side=40), text_tokens=7), Finished(1, 1, pixels(side=16))]
    found = usage(make_request(2), made)
    assert (found.input_tokens, found.output_tokens, found.total_tokens) == (7, 9 + 1, 17)


def test_links_are_presigned(bucket: str) -> None:
    async def main() -> dict[str, Any]:
        body = GenerateBody(prompt="p", response_format="url", output_format="webp")
        answers = ResponseEncoder(ResultsStore(ResultsConfig(uri=f"{bucket}/served")))
        return await answers.whole(body, make_request(1), told(Finished(0, 0, pixels(200))))

    (image,) = asyncio.run(main())["data"]
    with urllib.request.urlopen(image["url"]) as response:
        picture = Image.open(response)
        assert (picture.format, picture.size) == ("WEBP", (16, 16))


def test_pictures_carry_their_id_and_credentials(tmp_path: Path) -> None:
    keys = Provenance(watermark=True, **make_chain().write(tmp_path))
    made, request = Finished(0, 3, pixels(200, 256)), make_request(1)

    async def main(body: GenerateBody) -> list[dict[str, Any]]:
        answers = ResponseEncoder(ResultsStore(ResultsConfig()), Marks(keys))
        whole = (await answers.whole(body, request, told(made)))["data"][0]
        stream = answers.stream(body, request, told(made), "image_generation")
        (block,) = [data.decode() async for data in stream]
        return [whole, json.loads(block.split("data: ")[1])]

    whole, streamed = asyncio.run(main(GenerateBody(prompt="p", output_format="webp")))
    assert whole["image_id"] == streamed["image_id"] == Marks(keys).image_id(request, 3)
    other = Marks(keys).image_id(replace(request, prompt="q"), 3)
    assert len({whole["image_id"], other, Marks(keys).image_id(request, 4)}) == 3
    for answer in (whole, streamed):
        data = base64.b64decode(answer["b64_json"])
        assert watermark.read(Image.open(io.BytesIO(data))) == whole["image_id"][:16]
        found = read_credentials(data, "webp")
        assert found is not None
        assert found.is_valid
        assert found.record == {"image_id": whole["image_id"], "model": "m"}


def test_an_id_is_of_the_pictures_that_were_to_be_followed() -> None:
    marks = Marks(Provenance(watermark=True))
    uses = [ControlUse(name="edges", pixels=pixels(value)) for value in (0, 1)]
    asked = [
        replace(make_request(1), controls=controls) for controls in ((), (uses[0],), (uses[1],))
    ]
    assert len({marks.image_id(request, 3) for request in asked}) == 3
    again = replace(asked[1], controls=(ControlUse(name="edges", pixels=pixels(0)),))
    assert marks.image_id(again, 3) == marks.image_id(asked[1], 3)


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """An image classifier for which bright pictures are unsafe."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.weight.fill_(0.01)
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_safety_checker_has_a_threshold(classifier: str) -> None:
    image = Image.new("RGB", (32, 32), "white")
    score = safety.build(SafetyConfig(uri=classifier))
    assert score is not None
    found = score._classifier.score(image)
    strict = safety.build(SafetyConfig(uri=classifier, threshold=max(1e-6, found - 0.01)))
    lax = safety.build(SafetyConfig(uri=classifier, threshold=min(1 - 1e-6, found + 0.01)))
    assert strict is not None
    assert lax is not None
    assert not strict.allows(image)
    assert lax.allows(image)
    assert safety.build(SafetyConfig()) is None


def replica(name: str, pending_s: float, *names: str) -> Any:
    return SimpleNamespace(name=name, routing_stats={"names": names, "pending_s": pending_s})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing ray.serve (pydantic)
@pytest.mark.parametrize(
    ("wanted", "first"),
    [("a", {"holds a"}), ("a,lora", {"holds both"}), ("b", {"idle", "holds a", "holds both"})],
)
def test_a_replica_that_holds_the_model_is_asked_first(wanted: str, first: set[str]) -> None:
    from serve.router.affinity import SPILL_S, ModelAffinityRouter

    replicas = [
        replica("idle", 0.0),
        replica("holds a", 3.0, "a"),
        replica("holds both", 9.0, "a", "lora") if "," in wanted else replica("holds both", 9.0),
        replica("swamped", SPILL_S + 1, "a", "b", "lora"),
    ]
    metadata = SimpleNamespace(multiplexed_model_id=wanted)
    pending: Any = SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace())
    chosen = asyncio.run(ModelAffinityRouter.choose_replicas(None, replicas, pending))  # type: ignore
    assert {each.name for each in chosen[0]} == first
    assert {each.name for rank in chosen for each in rank} == {each.name for each in replicas}
