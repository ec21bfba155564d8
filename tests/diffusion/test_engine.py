"""What a caller may ask of the engine, and what it is told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Lora, Request


def ask(**changes: Any) -> Request:
    return Request(**({"prompt": "a red star", "steps": 3, "guidance_scale": 3.0} | changes))


def test_results_carry_their_request_and_all_arrive(tiny: Model) -> None:
    requests = [ask(seed=n, steps=1 + n % 4) for n in range(11)]
    results = list(Engine(tiny, max_rows=3).generate(iter(requests)))
    assert {id(r.request) for r in results} == {id(request) for request in requests}
    assert all(r.image.size == (64, 64) and r.pixels is None for r in results)


def test_sizes_take_turns(tiny: Model) -> None:
    requests = [ask(seed=n, width=[64, 96, 128][n % 3], height=64) for n in range(9)]
    results = list(Engine(tiny, max_rows=2).generate(requests, keep_pixels=True))
    for result in results:
        assert result.image.size == (result.request.width, 64)
        assert result.pixels.shape == (3, 64, result.request.width)
        assert result.pixels.dtype == torch.float32


def test_an_init_image_decides_the_size_when_none_is_asked_for(tiny: Model) -> None:
    wide = Image.new("RGB", (90, 70), "orange")
    cases = [ask(init_image=wide), ask(init_image=wide, width=64, height=64)]
    sizes = {r.request.width: r.image.size for r in Engine(tiny).generate(cases)}
    assert sizes == {None: (88, 64), 64: (64, 64)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampler": "eulr"}, "unknown sampler 'eulr'"),
        ({"sampler": "EDMEulerScheduler"}, "does not fit"),
        ({"sampler_options": {"nonsense": 1}}, "no option 'nonsense'"),
        ({"sampler": "pndm", "steps": 2}, "sampler 'pndm' has no schedule of 2 steps"),
        ({"width": 66}, "width is 66"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 5000}, "5000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"loras": (Lora(path="x", scale=float("inf")),)}, "the scale of a LoRA is inf"),
        ({"clip_skip": 9}, "clip_skip is 9; this model allows at most 2"),
        ({"init_image": b"no picture"}, "no picture in a format that is read here"),
        ({"init_image": "/no/such.png"}, "no such file"),
        ({"init_image": Image.new("RGB", (64, 64)), "strength": 0.1}, "leaves no step to make"),
        ({"init_image": Image.new("RGB", (64, 64)), "sampler": "ipndm"}, "image-to-image"),
        ({"prompt": 7}, "prompt must be text"),
        ({"prompt": "a \ud800 star"}, "prompt is not valid text"),
        ({"steps": "many"}, "not supported"),
    ],
)
def test_a_bad_request_fails_alone_with_its_reason(
    tiny: Model, changes: dict[str, Any], told: str
) -> None:
    bad, good = ask(**changes), ask()
    results = {id(r.request): r for r in Engine(tiny).generate([bad, good])}
    assert told in results[id(bad)].error
    assert results[id(bad)].image is None
    assert results[id(good)].error is None


def test_a_long_prompt_is_cut_with_a_warning(tiny: Model) -> None:
    (result,) = Engine(tiny).generate([ask(prompt="a red star " * 60)])
    (warning,) = result.warnings
    assert warning.startswith("prompt cut after 75 tokens, the text encoder's limit")
    assert "prompt_syntax a1111" in warning
    assert result.image is not None


def test_weights_of_words_are_not_silently_ignored(tiny: Model) -> None:
    (result,) = Engine(tiny).generate([ask(prompt="a (red:1.3) star")])
    (warning,) = result.warnings
    assert warning.startswith("weights such as (word:1.3) are taken as plain text")
    assert "prompt_syntax a1111" in warning


def test_a_prompt_met_again_is_not_encoded_again(tiny: Model) -> None:
    engine = Engine(tiny)
    list(engine.generate([ask(), ask(seed=1, prompt="a blue ring")]))
    before = dict(engine.prompts._cache)
    list(engine.generate([ask(seed=n) for n in range(5)]))
    after = engine.prompts._cache
    assert set(after) == set(before)
    assert all(after[text] is before[text] for text in before)


def test_calls_are_full_though_rows_of_several_shapes_wait(tiny: Model) -> None:
    engine, chosen = Engine(tiny, max_rows=4), []
    policy: Any = engine._batcher
    choose = policy.choose

    def counted() -> list[Any]:
        chosen.append(choose())
        return chosen[-1]

    policy.choose = counted
    kinds = [{}, {"height": 32}, {"prompt": "a red star, " * 30, "prompt_syntax": "a1111"}]
    requests = [ask(seed=n, width=32, **kinds[n % 3]) for n in range(36)]
    assert all(result.image is not None for result in engine.generate(requests))
    assert all(len({(row.shape, row.num_chunks) for row in rows}) <= 1 for rows in chosen)
    made = [len(rows) for rows in chosen if rows]
    assert sum(made) == 36 * 3
    assert sum(made) / len(made) > 2.7


def test_cancel_knows_what_it_cancels(tiny: Model) -> None:
    engine = Engine(tiny)
    first, second = engine.add(ask()), engine.add(ask(init_image=Image.new("RGB", (64, 64))))
    assert engine.cancel(second)
    assert not engine.cancel(second)
    assert not engine.cancel(99)
    results = []
    while engine.num_pending:
        results += engine.step()
    assert [result.id for result in results] == [first]
    assert engine.step() == []


def test_places_too_few_for_all_rows_make_more_calls_not_other_pictures(tiny: Model) -> None:
    requests = [ask(seed=n) for n in range(5)]
    whole = {r.request.seed: r for r in Engine(tiny).generate(requests, keep_pixels=True)}
    engine = Engine(tiny, slots=3)
    for result in engine.generate(requests, keep_pixels=True):
        assert (result.pixels - whole[result.request.seed].pixels).abs().max() < 1e-4


def test_an_engine_needs_a_row(tiny: Model) -> None:
    with pytest.raises(ValueError, match="max_rows is 0"):
        Engine(tiny, max_rows=0)


def test_engines_of_one_model_share_its_recording(tiny: Model) -> None:
    model, spent_s, pictures = replace(tiny), [], []
    for _ in range(2):
        engine = Engine(model, max_rows=1)
        (result,) = engine.generate([Request(prompt="a", seed=1, steps=2)], keep_pixels=True)
        spent_s.append(engine.trace_warmup_s)
        pictures.append(result.pixels)
    assert spent_s[0] > 0 == spent_s[1]
    assert torch.equal(*pictures)
