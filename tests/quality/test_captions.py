"""Captions against transformers' own generation, on tiny random models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPTokenizer,
    GitConfig,
    GitForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from rayjobs.quality.scores import Asked, Scorer
from rayjobs.starter import components

Make = Callable[[int], Image.Image]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}


def make(kind: str, folder: Path) -> str:
    """A random model of that kind, with what reads pictures and writes words for it."""
    tokenizer = components.save_tokenizer(folder, components.END)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = TOWER | {"vocab_size": len(tokenizer), "bos_token_id": begin, "eos_token_id": end}
    words |= {"pad_token_id": end, "max_position_embeddings": 96}
    torch.manual_seed(3)
    if kind == "blip":
        text = words | {"encoder_hidden_size": 32, "sep_token_id": end, "initializer_range": 0.3}
        vision = VISION | {"initializer_range": 0.3}
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
        BlipImageProcessorPil(size=SQUARE).save_pretrained(folder)
    elif kind == "git":
        model = GitForCausalLM(GitConfig(vision_config=VISION, initializer_range=0.3, **words))
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(folder)
    else:
        decoder = BertConfig(
            is_decoder=True, add_cross_attention=True, initializer_range=0.3, **words
        )
        encoder = ViTModel(ViTConfig(initializer_range=0.3, **VISION), add_pooling_layer=False)
        model = VisionEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(decoder))
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = begin
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
        ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["blip", "git", "vision-encoder-decoder"])
def test_a_caption_is_what_the_model_says_of_each_picture(
    kind: str, picture: Make, tmp_path: Path
) -> None:
    folder = make(kind, tmp_path)
    scorer = Scorer(Asked(caption=folder))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = []
    for number in range(3):
        pixels = scorer.captioner.processor(images=picture(number), return_tensors="pt")
        tokens = model.generate(**pixels, max_new_tokens=64, do_sample=False)
        words = CLIPTokenizer.from_pretrained(folder).decode(tokens[0], skip_special_tokens=True)
        expected.append({"caption": words.strip()})
    assert [scorer.score(picture(number), "a prompt") for number in range(3)] == expected
    assert all(each["caption"] for each in expected)


def test_a_model_that_has_to_be_asked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match=r"quality\.caption: .* type llava; expected is type blip"):
        Scorer(Asked(caption=str(tmp_path)))
