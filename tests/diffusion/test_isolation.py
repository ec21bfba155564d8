"""In a fixed shape a row's bits do not depend on its neighbours, nor on what befalls them."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Request, Result

pytestmark = pytest.mark.model

SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_a"]
ROWS = 5
"""All requests and a victim at once."""


Picture = Callable[[int], Image.Image]


@pytest.fixture(scope="module")
def requests(picture: Picture) -> list[Request]:
    return [
        Request(
            prompt=f"a photo of a {colour} star on a black background",
            seed=number,
            steps=5 + number % 3,
            sampler=SAMPLERS[number % len(SAMPLERS)],
            guidance_scale=[4.0, 1.0, 7.0][number % 3],
            init_image=picture(number) if number % 2 else None,
        )
        for number, colour in enumerate(["red", "green", "blue", "pink"])
    ]


@pytest.fixture(scope="module")
def truncated(picture: Picture) -> bytes:
    whole = io.BytesIO()
    picture(0).save(whole, "PNG")
    return whole.getvalue()[:200]


def by_seed(results: list[Result]) -> dict[int, Result]:
    return {result.request.seed: result for result in results}


def run(
    engine: Engine, requests: list[Request], truncated: bytes, disturb: str | None = None
) -> dict[int, Result]:
    engine.keep_pixels = True
    for request in requests:
        engine.add(request)
    victim = engine.add(Request(prompt="a victim", seed=99, steps=9, guidance_scale=4.0))
    results, steps = [], 0
    while engine.num_pending:
        results += engine.step()
        steps += 1
        if steps == 3 and disturb == "cancel":
            assert engine.cancel(victim)
        if steps == 3 and disturb == "nan":
            engine.rows[victim].latents *= float("nan")
        if steps == 3 and disturb == "join":
            engine.add(Request(prompt="a late one", seed=77, steps=4))
        if steps == 2 and disturb == "truncated":
            engine.add(Request(prompt="a bad one", seed=78, steps=4, init_image=truncated))
    return by_seed(results)


@pytest.fixture(scope="module")
def calm(starter: Model, requests: list[Request], truncated: bytes) -> dict[int, Result]:
    return run(Engine(starter, ROWS), requests, truncated)


@pytest.mark.parametrize("disturb", ["cancel", "nan", "join", "truncated"])
def test_neighbours_do_not_notice(
    starter: Model,
    requests: list[Request],
    truncated: bytes,
    calm: dict[int, Result],
    disturb: str,
) -> None:
    disturbed = run(Engine(starter, ROWS), requests, truncated, disturb)
    for request in requests:
        a, b = calm[request.seed], disturbed[request.seed]
        assert b.error is None
        assert torch.equal(a.pixels, b.pixels), request.sampler
    if disturb == "cancel":
        assert 99 not in disturbed
    if disturb == "nan":
        assert disturbed[99].image is None
        assert "not finite" in disturbed[99].error
    if disturb == "truncated":
        assert "init image cannot be read" in disturbed[78].error


def test_alone_in_company_and_in_any_order(starter: Model, requests: list[Request]) -> None:
    together = by_seed(list(Engine(starter, ROWS).generate(requests, keep_pixels=True)))
    backwards = by_seed(list(Engine(starter, ROWS).generate(requests[::-1], keep_pixels=True)))
    for request in requests:
        (alone,) = Engine(starter, ROWS).generate([request], keep_pixels=True)
        assert torch.equal(alone.pixels, together[request.seed].pixels)
        assert torch.equal(alone.pixels, backwards[request.seed].pixels)


def test_without_a_fixed_shape_the_difference_stays_small(
    starter: Model, requests: list[Request]
) -> None:
    fixed = by_seed(list(Engine(starter, ROWS).generate(requests, keep_pixels=True)))
    engine = Engine(starter, ROWS, fixed_shape=False)
    for result in engine.generate(requests, keep_pixels=True):
        difference = (result.pixels - fixed[result.request.seed].pixels).abs().max()
        assert difference < 1e-4


def test_rows_with_calls_of_their_own(starter: Model, requests: list[Request]) -> None:
    """What a CUDA device gets, where a row's place in a call moves its bits."""
    model = replace(starter)
    engine, seen = Engine(model, ROWS), []
    unet = model.unet
    model.__dict__["replay"] = lambda x, t, given, _: unet(x, t, return_dict=False, **given)[0]
    engine._unet_batch.alone = True
    hook = unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        together = by_seed(list(engine.generate(requests, keep_pixels=True)))
    finally:
        hook.remove()
    assert sorted(set(seen)) == [1, 2]  # guided rows have two places, and no call is padded
    fixed = by_seed(list(Engine(starter, ROWS).generate(requests, keep_pixels=True)))
    for seed, result in fixed.items():
        assert (result.pixels - together[seed].pixels).abs().max() < 1e-4


@pytest.mark.gpu
def test_on_a_gpu_a_place_moves_no_bits(requests: list[Request]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = load_model("starter", ModelOptions(device="cuda"))
    together = by_seed(list(Engine(model, ROWS).generate(requests, keep_pixels=True)))
    for request in requests:
        (alone,) = Engine(model, ROWS).generate([request], keep_pixels=True)
        assert torch.equal(alone.pixels, together[request.seed].pixels)
