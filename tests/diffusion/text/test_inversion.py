"""Learned words: the engine draws what diffusers draws with the same embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import ModelOptions, load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.text.inversion import (
    add_word,
    expand_words,
    initial_vectors,
    load_word,
    to_tensors,
)

pytestmark = pytest.mark.model

WORD = "<sks>"
PROMPT = "a photo of a <sks> star"


def saved(folder: Path, family: str, path: Path, count: int) -> list[torch.Tensor]:
    model = load_model(str(folder), ModelOptions(dtype="float32"))
    torch.manual_seed(1)
    vectors = [v + 0.3 * torch.randn_like(v) for v in initial_vectors(model, "star", count)]
    save_file(to_tensors(model, WORD, vectors), path)
    return vectors


@pytest.mark.parametrize("count", [1, 3])
def test_like_diffusers(folders: dict[str, Path], family: str, tmp_path: Path, count: int) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    saved(folders[family], family, path, count)
    model = load_model(str(folders[family]), ModelOptions(dtype="float32"))
    engine = Engine(model, max_rows=2)
    load_word(model, str(tmp_path), WORD)
    request = Request(prompt=PROMPT, seed=3, steps=3, guidance_scale=4.0, width=64, height=64)
    (result,) = engine.generate([request], keep_pixels=True)
    assert result.error is None

    pipe: Any = DiffusionPipeline.from_pretrained(folders[family])
    pipe.set_progress_bar_config(disable=True)
    held = load_file(path)
    if family == "sd":
        pipe.load_textual_inversion(held, token=WORD)
    else:
        parts = (("clip_l", pipe.text_encoder, pipe.tokenizer),)
        parts += (("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),)
        for name, encoder, tokenizer in parts:
            pipe.load_textual_inversion(
                held[name], token=WORD, text_encoder=encoder, tokenizer=tokenizer
            )
    generator = torch.Generator().manual_seed(3)
    made = pipe(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=4.0,
        width=64,
        height=64,
        generator=generator,
        output_type="pt",
    ).images[0]
    assert result.pixels is not None
    assert (result.pixels - made).abs().max() <= 1e-4


def test_other_prompts_do_not_notice(folders: dict[str, Path]) -> None:
    request = Request(prompt="a red star", seed=3, steps=2, width=64, height=64)
    pictures = []
    for teach in (False, True):
        model = load_model(str(folders["sdxl"]), ModelOptions(dtype="float32"))
        if teach:
            add_word(model, WORD, initial_vectors(model, "star", 2))
        (result,) = Engine(model, max_rows=1).generate([request])
        assert result.image is not None
        pictures.append(result.image.tobytes())
    assert pictures[0] == pictures[1]


def test_what_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(folders["sdxl"]), ModelOptions(dtype="float32"))
    with pytest.raises(ValueError, match="width 7, the text encoder's have 32"):
        add_word(model, WORD, [torch.zeros(1, 7)] * 2)
    with pytest.raises(ValueError, match="for 1 text encoders, the model has 2"):
        add_word(model, WORD, [torch.zeros(1, 32)])
    add_word(model, WORD, [torch.zeros(1, 32)] * 2)
    with pytest.raises(ValueError, match="knows '<sks>' already"):
        add_word(model, WORD, [torch.zeros(1, 32)] * 2)
    save_file({"other": torch.zeros(1, 32)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="hold other, not clip_l and clip_g"):
        load_word(model, str(tmp_path), "<new>")
    with pytest.raises(ValueError, match=r"no such \.safetensors file"):
        load_word(model, str(tmp_path / "absent"), "<new>")


def test_a_word_of_several_vectors_is_spoken_as_all_of_them() -> None:
    assert expand_words("a <s> star", {"<s>": 1}) == "a <s> star"
    assert expand_words("a <s> star", {"<s>": 3}) == "a <s> <s>_1 <s>_2 star"
    assert expand_words("a <s> <s>_1 star", {"<s>": 2}) == "a <s> <s>_1 star"
