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
    settle_words,
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
    (tmp_path / "cat.pt").touch()
    with pytest.raises(ValueError, match=r"a pickle.* Convert it once where you trust it"):
        load_word(model, str(tmp_path / "cat.pt"), "<new>")
    before = [len(tokenizer) for tokenizer in model.tokenizers]
    with pytest.raises(ValueError, match="not finite"):
        add_word(model, "<new>", [torch.zeros(1, 32), torch.full((1, 32), torch.nan)])
    assert [len(tokenizer) for tokenizer in model.tokenizers] == before, "all of it or nothing"


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Any:
    """One that knows words of other words' letters, in other numbers."""
    model = load_model(str(folders["sd"]), ModelOptions(dtype="float32"))
    for word, count in (("<s>", 3), ("zed", 2), ("zed2", 2), ("<s>x", 1), ("Rex", 2)):
        add_word(model, word, initial_vectors(model, "star", count))
    return model.tokenizers[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a <s> star", "a <s> <s>_1 <s>_2 star"),
        ("a <s> <s>_1 <s>_2 star", "a <s> <s>_1 <s>_2 star"),
        ("<s><s>", "<s> <s>_1 <s>_2<s> <s>_1 <s>_2"),
        ("<S> star", "<S> <S>_1 <S>_2 star"),
        ("zed and zed2", "zed zed_1 and zed2 zed2_1"),
        ("zed2, zed", "zed2 zed2_1, zed zed_1"),
        ("a zedong, a zed's", "a zedong, a zed zed_1's"),
        ("<s>x", "<s>x"),
        ("rex and REX", "rex rex_1 and REX REX_1"),
        ("nothing of these", "nothing of these"),
    ],
)
def test_a_word_of_several_vectors_is_spoken_as_all_of_them(
    tokenizer: Any, text: str, said: str
) -> None:
    assert expand_words(text, tokenizer) == said
    unknown = {token.lower() for token in tokenizer.tokenize(said)} & {"_</w>", "1</w>"}
    assert not unknown, "each token is one that was added"


def test_a_word_is_no_part_of_another(tokenizer: Any) -> None:
    assert "zed" not in tokenizer.tokenize("a zedong of zed_x")
    assert tokenizer.tokenize("zed star")[0] == "zed"


def test_uneven_numbers_of_vectors(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each encoder has its own number, and a word that follows has its own vectors."""
    pictures = []
    for uneven_first in (False, True):
        model = load_model(str(folders["sdxl"]), ModelOptions(dtype="float32"))
        if uneven_first:
            add_word(model, "<odd>", [torch.randn(3, 32), torch.randn(1, 32)])
        torch.manual_seed(2)
        add_word(model, WORD, [torch.randn(2, 32), torch.randn(1, 32)])
        request = Request(prompt=PROMPT, seed=3, steps=2, width=64, height=64)
        (result,) = Engine(model, max_rows=1).generate([request])
        assert result.image is not None, result.error
        pictures.append(result.image.tobytes())
        said = [expand_words(WORD, tokenizer) for tokenizer in model.tokenizers]
        assert said == [f"{WORD} {WORD}_1", WORD]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", ["emb_params", "some-other-word"])
def test_the_only_tensor_of_a_file(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A1111's name for it, and that of a word which is now to be another."""
    model = load_model(str(folders["sd"]), ModelOptions(dtype="float32"))
    save_file({name: torch.full((2, 32), 0.5)}, tmp_path / "cat.safetensors")
    load_word(model, str(tmp_path / "cat.safetensors"), WORD)
    ids = model.tokenizers[0](f"{WORD} {WORD}_1", add_special_tokens=False, return_tensors="pt")
    embedded = model.text_encoders[0].get_input_embeddings()(ids.input_ids)
    assert (embedded == 0.5).all()


def test_a_table_that_is_longer_than_the_vocabulary(folders: dict[str, Path]) -> None:
    """Some models' tables are padded: a word's rows are its own, not the padding's."""
    model = load_model(str(folders["sd"]), ModelOptions(dtype="float32"))
    (encoder,), (tokenizer,) = model.text_encoders, model.tokenizers
    encoder.resize_token_embeddings(len(tokenizer) + 7)
    add_word(model, WORD, [torch.full((2, 32), 0.5)])
    ids = tokenizer(f"{WORD} {WORD}_1", add_special_tokens=False, return_tensors="pt").input_ids
    assert (encoder.get_input_embeddings()(ids) == 0.5).all()
    settle_words(model)
    assert (encoder.get_input_embeddings()(ids) == 0.5).all()
