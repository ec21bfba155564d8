"""Two hundred at once: all are answered, each with the picture that it would have had alone."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from tests.serving.calls import Answer, ask_all, mixed
from tests.serving.running import Running, metrics, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Picture = Callable[[int], Image.Image]
CONFIG = {
    "models": [{"name": "starter", "uri": "starter"}],
    "engine": {"max_pending_s": 6000},
}


@pytest.fixture(scope="module")
def patient() -> Iterator[Running]:
    """An application that lets many wait."""
    with running(CONFIG) as found:
        yield found


def alone(answer: Answer, image: Image.Image, engine: Engine) -> list[np.ndarray]:
    """The pictures of a request, each made by an engine with nothing else to do."""
    body = answer.asked
    width, height = map(int, body["size"].split("x"))
    made = []
    for number in range(body["n"]):
        request = Request(
            prompt=body["prompt"],
            seed=body["seed"] + number,
            steps=body["num_inference_steps"],
            guidance_scale=body["guidance_scale"],
            sampler=body["sampler"],
            width=width,
            height=height,
            init_image=fitted(image, width, height) if "image" in body else None,
            strength=body.get("strength", 0.5),
        )
        (result,) = engine.generate([request])
        made.append(np.asarray(result.image, int))
    return made


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    from serve import images

    return images.to_image(images.fitted(images.to_pixels(image), width, height))


def test_two_hundred_mixed_requests(patient: Running, picture: Picture, starter: Model) -> None:
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    bodies = mixed(200, seed=5, picture=buffer.getvalue())
    answers = ask_all(patient.url, bodies)
    told = [answer.body for answer in answers if answer.status != 200]
    assert not told, told
    engine = Engine(starter, max_rows=1, fixed_shape=False)
    for answer in answers:
        expected = alone(answer, picture(1), engine)
        for got, picture_alone in zip(answer.pictures(), expected, strict=True):
            assert np.abs(got - picture_alone).max() <= 1, answer.asked["prompt"]
    found = metrics(patient.url)
    rows = found["rows_per_step_sum"] / found["rows_per_step_count"]
    assert rows > 3
    late = found["event_loop_lag_seconds_count"] - found["event_loop_lag_seconds_bucket le=0.1"]
    assert late / found["event_loop_lag_seconds_count"] < 0.05
