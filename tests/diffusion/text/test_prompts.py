"""Long and weighted prompts: the engine draws what diffusers draws of reference embeddings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.diffusion.text.chunks import tokenize
from rayjobs.diffusion.text.inversion import add_word, initial_vectors
from rayjobs.diffusion.text.syntax import check_syntax, parse, spoken

pytestmark = pytest.mark.model

Said = list[list[tuple[str, float]]]
"""A prompt's chunks: texts and their weights."""


def words(count: int, first: int = 0) -> str:
    """Words of one token each."""
    known = ("red", "blue", "star", "ring", "heart", "photo", "a", "of")
    return " ".join(known[n % len(known)] for n in range(first, first + count))


# What the web UI makes of a text, by hand: each word above is a token, as a comma is.
WEIGHTED: dict[str, Said] = {
    "a red star": [[("a red star", 1)]],
    "": [[]],
    "a (red:1.3) star": [[("a", 1), ("red", 1.3), ("star", 1)]],
    "a (red) star": [[("a", 1), ("red", 1.1), ("star", 1)]],
    "a [red] star": [[("a", 1), ("red", 1 / 1.1), ("star", 1)]],
    "a (((red))) star": [[("a", 1), ("red", 1.1**3), ("star", 1)]],
    "((a [red:1.5) star:0.5)": [[("a", 0.825 / 1.1), ("red", 0.825 / 1.1), ("star", 0.5 / 1.1)]],
    "(red star": [[("red star", 1.1)]],
    r"a \(red\) star, \[of\] \\": [[(r"a (red) star, [of] \ ", 1)]],
    "a 😀 (猫:0.7) star": [[("a 😀", 1), ("猫", 0.7), ("star", 1)]],
    "a (red:-0.5) star (ring: 0 )": [[("a", 1), ("red", -0.5), ("star", 1), ("ring", 0)]],
    "red ring BREAK a (star:1.2)": [[("red ring", 1)], [("a", 1), ("star", 1.2)]],
    "BREAK red BREAK BREAK star BREAK": [[], [("red", 1)], [], [("star", 1)]],
    words(75): [[(words(75), 1)]],
    words(76): [[(words(75), 1)], [(words(1, 75), 1)]],
    words(300): [[(words(75, n), 1)] for n in (0, 75, 150, 225)],
    f"({words(100)}:1.2) star": [[(words(75), 1.2)], [(words(25, 75), 1.2), ("star", 1)]],
    # Back at a comma at most 20 tokens before a chunk's end, and no further.
    f"{words(60)}, {words(30)}": [[(words(60) + ",", 1)], [(words(30), 1)]],
    f"{words(40)}, {words(40)}": [[(words(40) + ", " + words(34), 1)], [(words(6, 34), 1)]],
    f"{words(75)}, {words(9)}": [[(words(75), 1)], [(", " + words(9), 1)]],
}
NEGATIVES = (None, "", "(blue:1.4) ring", words(80), "red BREAK (star:0.3)")


def encoded(model: Model, said: Said, count: int, skip: int, norm: bool) -> tuple[Any, Any]:
    """Reference embeddings: (1, 77 N, D) and the pooled vector of the first chunk."""
    states, pooled = [], None
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        whole = []
        for parts in said + [[]] * (count - len(said)):
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for text, weight in parts:
                new = tokenizer(text).input_ids[1:-1]
                ids, weights = ids + new, weights + [float(weight)] * len(new)
            ids.append(tokenizer.eos_token_id)
            ids += [tokenizer.pad_token_id] * (77 - len(ids))
            weights += [1.0] * (77 - len(weights))
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
            if model.family == "sdxl":
                z = out.hidden_states[-2 - skip]
            else:
                z = getattr(encoder, "text_model", encoder).final_layer_norm(
                    out.hidden_states[-1 - skip]
                )
            told = z * torch.tensor(weights)[None, :, None]
            if norm and set(weights) != {1.0}:
                told = told * (z.mean() / told.mean())
            whole.append(told)
            if out[0].ndim == 2 and len(whole) == 1:
                pooled = out[0]
        states.append(torch.cat(whole, dim=1))
    return torch.cat(states, dim=-1), pooled


@torch.no_grad()
def reference(model: Model, request: Request, said: Said, negative: Said) -> torch.Tensor:
    """diffusers' picture of reference embeddings, (3, 64, 64) in 0..1."""
    is_xl = model.family == "sdxl"
    if request.guidance_scale == 1:
        negative = [[]]
    count = max(len(said), len(negative))
    how = (count, request.clip_skip or 0, request.prompt_syntax == "a1111")
    text, pooled = encoded(model, said, *how)
    no_text, no_pooled = encoded(model, negative, *how)
    if request.negative_prompt is None and model.force_zeros:
        no_text, no_pooled = torch.zeros_like(no_text), torch.zeros_like(no_pooled)
    parts = {"vae": model.vae, "unet": model.unet}
    parts |= zip(("tokenizer", "tokenizer_2"), model.tokenizers, strict=False)
    parts |= zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False)
    parts["scheduler"] = EulerDiscreteScheduler.from_config(model.scheduler.config)
    arguments: dict[str, Any] = {"prompt_embeds": text, "negative_prompt_embeds": no_text}
    pipeline: Any
    if is_xl:
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        arguments["pooled_prompt_embeds"] = pooled
        arguments["negative_pooled_prompt_embeds"] = no_pooled
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        width=64,
        height=64,
        output_type="pt",
        **arguments,
    ).images
    return images[0]


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    """SDXL and Stable Diffusion whose encoders' outputs have a mean, as trained ones have."""
    torch.manual_seed(2)
    models = {}
    for name in ("sdxl", "sd"):
        model = load_model(str(folders[name]), ModelOptions(device="cpu", onednn=False))
        for encoder in model.text_encoders:
            encoder = getattr(encoder, "text_model", encoder)
            torch.nn.init.normal_(encoder.final_layer_norm.bias, 0.2, 0.3)
            torch.nn.init.normal_(encoder.embeddings.position_embedding.weight, 0.2, 0.3)
        models[name] = model
    return models


def requests_for(family: str) -> dict[Request, tuple[Said, Said]]:
    """Each text with another negative one, strength of guidance and layer."""
    made = {}
    for number, (text, said) in enumerate(WEIGHTED.items()):
        negative = NEGATIVES[number % len(NEGATIVES)]
        request = Request(
            prompt=text,
            negative_prompt=negative,
            prompt_syntax="a1111-no-norm" if number % 4 == 3 else "a1111",
            seed=number,
            steps=2,
            sampler="euler",
            guidance_scale=1.0 if number % 7 == 6 else 4.0,
            clip_skip=1 if number % 5 == 2 else None,
            width=64,
            height=64,
        )
        # Those of NEGATIVES, by hand as well.
        written: Said = {
            "(blue:1.4) ring": [[("blue", 1.4), ("ring", 1)]],
            words(80): [[(words(75), 1)], [(words(5, 75), 1)]],
            "red BREAK (star:0.3)": [[("red", 1)], [("star", 0.3)]],
        }.get(negative or "", [[]])
        made[request] = (said, written)
    return made


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_equals_diffusers_alone_and_mixed(models: dict[str, Model], family: str) -> None:
    model, asked = models[family], requests_for(family)
    expected = {request: reference(model, request, *said) for request, said in asked.items()}
    plain = [replace(request, prompt_syntax="plain") for request in asked]
    mixed = Engine(model, max_rows=8, fixed_shape=False)
    engines = {"alone": Engine(model, max_rows=1), "fixed": Engine(model, max_rows=5)}
    for name, engine in (engines | {"mixed": mixed}).items():
        # Rows of plain prompts beside them, whose texts are all of one length.
        others = plain[:4] if name == "mixed" else []
        results = {r.request: r for r in engine.generate([*asked, *others], keep_pixels=True)}
        if name == "fixed":
            bits = {request: result.pixels for request, result in results.items()}
        for request, picture in expected.items():
            result = results[request]
            assert result.error is None, (name, request.prompt, result.error)
            difference = (result.pixels - picture).abs().max().item()
            assert difference <= 1e-4, (name, request.prompt, difference)
    for request in list(asked)[2::6]:
        # The rows beside it, and the lengths of their texts, move no bit of a row in a job.
        (alone,) = engines["fixed"].generate([request], keep_pixels=True)
        assert torch.equal(alone.pixels, bits[request])
        (as_plain,) = engines["fixed"].generate(
            [replace(request, prompt_syntax="plain")], keep_pixels=True
        )
        assert (as_plain.pixels - bits[request]).abs().max() > 1e-3, "weights do act"


def test_adapters_of_text_encoders_reach_every_chunk(
    models: dict[str, Model], tmp_path: Path
) -> None:
    model = models["sdxl"]
    draw = torch.Generator().manual_seed(3)
    down, up = (torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw))
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    keys = {f"text_encoder.{name}.lora_A.weight": down, f"text_encoder.{name}.lora_B.weight": up}
    save_file(keys, tmp_path / "pytorch_lora_weights.safetensors")
    text = f"({words(80)}:1.2)"
    said: Said = [[(words(75), 1.2)], [(words(5, 75), 1.2)]]
    settings: dict[str, Any] = {"steps": 2, "sampler": "euler", "guidance_scale": 4.0}
    plain = Request(prompt=text, prompt_syntax="a1111", width=64, height=64, **settings)
    adapted = replace(plain, loras=(Lora(path=str(tmp_path), scale=0.5),))
    engine = Engine(model, max_rows=2)
    results = {r.request: r.pixels for r in engine.generate([plain, adapted], keep_pixels=True)}
    engine.loras.detach()
    expected = [reference(model, plain, said, [[]])]
    encoder = model.text_encoders[0]
    layer = getattr(encoder, "text_model", encoder).encoder.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight += 0.5 * up @ down
        expected.append(reference(model, plain, said, [[]]))
        layer.weight -= 0.5 * up @ down
    for request, picture in zip((plain, adapted), expected, strict=True):
        assert (results[request] - picture).abs().max() <= 1e-4
    assert (results[adapted] - results[plain]).abs().max() > 1e-3


def test_a_learned_word_is_weighted_and_divided_as_a_whole(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["sdxl"]))
    add_word(model, "<sks>", initial_vectors(model, "star", 3))
    first, second = tokenize(model, f"{words(74)} (<sks>:1.2) star", "a1111").chunks
    for number, tokenizer in enumerate(model.tokenizers):
        learned = tokenizer.convert_tokens_to_ids(["<sks>", "<sks>_1", "<sks>_2"])
        star = tokenizer("star").input_ids[1]
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        assert first.tokens[number][75:] == (end, pad)
        assert second.tokens[number][1:6] == (*learned, star, end)
        assert second.weights is not None
        assert second.weights[number][:6] == (1, 1.2, 1.2, 1.2, 1, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a <lora:style:0.8> star", "'<lora:style:0.8>', which is not read there; name the file"),
        ("a ([red:blue:0.5] star", "has [a:b:0.5] or [a|b] beside brackets, bars or colons"),
        ("a [red:blue:ring:0.5] [red:8]", "has [a:b:0.5] or [a|b] beside brackets"),
        ("a [red|blue] | star", "has [a:b:0.5] or [a|b] beside brackets"),
        ("a [red BREAK blue:0.5] star", "BREAK in brackets"),
        ("a star AND a ring", "AND between prompts"),
        ("(a BREAK star)", "BREAK in brackets"),
        ("[a BREAK star", "BREAK in brackets"),
        ("a (red:1.2.3) star", "the weight '1.2.3', which is not a number"),
        ("a (red:" + "9" * 400 + ")", "too large"),
    ],
)
def test_what_is_not_supported_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"^prompt has ") as caught:
        Request(prompt=text, prompt_syntax="a1111").check()
    assert told in str(caught.value)
    Request(prompt=text).check()
    if "AND" not in text:
        with pytest.raises(ValueError, match=r"^negative_prompt has "):
            Request(prompt="", negative_prompt=text, prompt_syntax="a1111").check()


def test_syntaxes_are_known_by_name() -> None:
    with pytest.raises(ValueError, match="prompt_syntax is 'compel'; it must be one of plain, a11"):
        check_syntax("prompt", "a", "compel")
    for text in (r"a \[red:0.5\] star", "a [red] (ring|star) 16:9 BREAKING sAND", "a | b", ":"):
        check_syntax("prompt", text, "a1111")


def test_a_prompt_of_too_many_chunks_fails_alone(tiny: Model) -> None:
    long = Request(prompt=words(75 * 64 + 1), prompt_syntax="a1111", steps=1)
    results = {r.request: r for r in Engine(tiny).generate([long, Request(prompt="a", steps=1)])}
    assert "65 chunks of 75 tokens; at most 64" in (results.pop(long).error or "")
    assert all(result.error is None for result in results.values())


@pytest.mark.parametrize(
    ("text", "is_weighted"),
    [
        ("a (red:1.3) star", True),
        ("((masterpiece)), a star", True),
        ("(masterpiece), a star", True),
        ("a [red] star", True),
        (r"miku \(vocaloid\)", True),
        ("a star BREAK a ring", True),
        ("a crane (bird) in 16:9", False),
        ("BREAKFAST for two, (with tea) or not", False),
    ],
)
def test_plain_texts_that_look_weighted_are_warned_about(
    tiny: Model, text: str, is_weighted: bool
) -> None:
    warned = [w for w in tokenize(tiny, text, "plain").warnings if "prompt_syntax a1111" in w]
    assert len(warned) == is_weighted


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a <lora:style:1> star", "'<lora:style:1>' is taken as plain text: name the file under"),
        ("a star, embedding:bad-hands-5", "'embedding:bad-hands-5' is taken as plain text: name"),
        ("a {red|blue} star", "'{red|blue}' is taken as plain text: write one of the texts"),
        ("a __colour/bright__ star", "'__colour/bright__' is taken as plain text: wildcards"),
        ("a (red)++ star", "')++' is taken as plain text: (word:1.1)"),
        ("a red+ star", "'ed+' is taken as plain text: (word:1.1)"),
        ("a (red)1.3 star", "')1.3' is taken as plain text: (word:1.1)"),
        ("a star --no red", "'--no' is taken as plain text: give it as a setting"),
        ("a star in C++ of A+, snake__case, {one} -- no (2) 3+", None),
    ],
)
def test_what_other_programs_read_is_told(
    tiny: Model, text: str, told: str | None, syntax: str
) -> None:
    if syntax == "a1111" and "<lora" in text:
        return  # refused before
    said = tokenize(tiny, text, syntax).warnings
    assert [warning[: len(told or "")] for warning in said] == ([] if told is None else [told])


def test_what_a_prompt_says_has_neither_weights_nor_breaks() -> None:
    text = r"a (red:1.3) [star] BREAK \(fine\)"
    assert spoken(text, "a1111") == "a red star (fine)"
    assert spoken(text, "plain") == spoken(text, None) == text


def test_what_the_web_ui_reads_as_guidance_is_told(tiny: Model) -> None:
    assert "plain text" in tokenize(tiny, "a star :1.2", "a1111").warnings[0]
    assert tokenize(tiny, "a star :1.2", "a1111", negative=True).warnings == ()
    assert tokenize(tiny, "a (star:1.2)", "a1111").warnings == ()
    assert parse("a star:1.2") == [[("a star:1.2", 1.0)]]
