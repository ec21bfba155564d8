"""Words that change from step to step: the web UI's schedule, and the pictures that come of it."""

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.text.said import MAX_TEXTS
from rayjobs.diffusion.text.schedule import stages
from rayjobs.diffusion.text.syntax import spoken
from tests.diffusion.text.test_prompts import encoded, words

LONG = words(80)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # The web UI's own examples, of 10 steps: each text and the last step, from 0, that has it.
        ("test", {"test": 9}),
        ("a [b:3]", {"a ": 3, "a b": 9}),
        ("a [b: 3]", {"a ": 3, "a b": 9}),
        ("a [[[b]]:2]", {"a ": 2, "a [[b]]": 9}),
        ("[(a:2):3]", {"": 3, "(a:2)": 9}),
        ("a [b : c : 1] d", {"a b  d": 1, "a  c  d": 9}),
        ("a[b:[c:d:2]:1]e", {"abe": 1, "ace": 2, "ade": 9}),
        ("a [unbalanced", {"a [unbalanced": 9}),
        ("a [b:.5] c", {"a  c": 5, "a b c": 9}),
        ("a [b::0.2] c", {"a b c": 2, "a  c": 9}),
        ("a [b:c:1.0]", {"a b": 9}),
        ("a [b:c:0]", {"a c": 9}),
        (r"a \[b:c:3\] (d:1.2) [e] f:g", {r"a \[b:c:3\] (d:1.2) [e] f:g": 9}),
    ],
)
def test_the_web_uis_examples(text: str, said: dict[str, int]) -> None:
    ends = list(said.values())
    assert stages(text, 10) == [
        words
        for words, first, last in zip(said, [-1, *ends], ends, strict=False)
        for _ in range(first, last)
    ]


def test_alternatives_take_turns() -> None:
    # The first has the first two steps, as there.
    assert stages("[a|(b:1.1)|]", 5) == ["a", "a", "(b:1.1)", "", "a"]
    assert spoken("a [red:blue:3] [star|ring]", "a1111") == "a blue star"


@torch.no_grad()
def test_equals_diffusers_with_other_embeddings_at_each_step(tiny: Model) -> None:
    """Alone and beside rows with one text; the texts are of one and of two chunks."""
    num = 5
    base: dict[str, Any] = {"steps": num, "sampler": "euler", "prompt_syntax": "a1111"}
    base |= {"width": 64, "height": 64}
    asked = {
        Request(
            prompt="a [red:blue:0.4] star",
            negative_prompt="[ring::1]",
            guidance_scale=3.0,
            seed=1,
            **base,
        ): [("a red star", "ring")] * 2 + [("a red star", "")] + [("a blue star", "")] * 2,
        Request(prompt=f"[red|{LONG}]", seed=2, guidance_scale=1.0, **base): [
            (text, None) for text in ("red", "red", LONG, "red", LONG)
        ],
    }
    others = [Request(prompt="a ring", seed=3, guidance_scale=3.0, **base)]
    pictures = {}
    for engine in (Engine(tiny, max_rows=1), Engine(tiny, max_rows=4)):
        for result in engine.generate([*asked, *others], keep_pixels=True):
            assert result.error is None
            pictures.setdefault(result.request, []).append(result.pixels)
    for request, said in asked.items():
        expected = reference(tiny, request, said)
        assert [(mine - expected).abs().max() <= 1e-4 for mine in pictures[request]] == [True] * 2
        constant = reference(tiny, request, [said[0]] * num)
        assert (constant - expected).abs().max() > 1e-3


def reference(model: Model, request: Request, said: list[tuple[str, str | None]]) -> torch.Tensor:
    """diffusers' picture, its embeddings replaced after each step."""
    count = max(2 if LONG in pair else 1 for pair in said)

    def of(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = [[(words(75), 1.0)], [(words(5, 75), 1.0)]] if text == LONG else [[(text, 1.0)]]
        return encoded(model, chunks, count, 0, False)

    def both(pair: tuple[str, str | None]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [of(text) for text in reversed(pair) if text is not None]
        return torch.cat([states for states, _ in texts]), torch.cat([one for _, one in texts])

    def change(_: Any, step: int, __: Any, ___: Any) -> dict[str, torch.Tensor]:
        states, pooled = both(said[min(step + 1, len(said) - 1)])
        return {"prompt_embeds": states, "add_text_embeds": pooled}

    parts = {"vae": model.vae, "unet": model.unet}
    parts |= zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=True)
    parts |= zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=True)
    parts["scheduler"] = EulerDiscreteScheduler.from_config(model.scheduler.config)
    pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    states, pooled = both(said[0])
    return pipeline(
        prompt_embeds=states[-1:],
        pooled_prompt_embeds=pooled[-1:],
        negative_prompt_embeds=states[:1],
        negative_pooled_prompt_embeds=pooled[:1],
        num_inference_steps=len(said),
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        width=64,
        height=64,
        output_type="pt",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds"],
    ).images[0]


def test_too_many_texts_fail_alone(tiny: Model) -> None:
    turns = "[a|b|c|d|e|f|g] [a|b|c|d|e|f|g|h|i|j|k]"
    asked = Request(prompt=turns, prompt_syntax="a1111", steps=100)
    (result,) = Engine(tiny).generate([asked])
    assert f"77 texts by turns; at most {MAX_TEXTS}" in str(result.error)
