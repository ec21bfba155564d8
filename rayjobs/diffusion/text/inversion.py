"""Learned words: tokens of their own with learned embeddings (textual inversion, arXiv 2208.01618).

Owns how a word is added to a loaded model, how it expands to tokens in a prompt, and diffusers'
files of them. A word of several vectors is as many tokens: w, w_1, w_2, ... Legend: N tokens, D
width.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from rayjobs.diffusion.model import Model

SDXL_NAMES = ("clip_l", "clip_g")


class GrownEmbedding(torch.nn.Module):
    """An embedding table with rows of its own behind those it had."""

    def __init__(self, known: torch.nn.Embedding):
        super().__init__()
        self.known = known
        self.learned = torch.nn.ParameterList()

    @property
    def weight(self) -> torch.Tensor:
        """The table as it was, for those who ask for its dtype or device."""
        return self.known.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        size = self.known.num_embeddings
        embedded = F.embedding(ids.clamp(max=size - 1), self.known.weight)
        learned_ND = torch.cat(list(self.learned)).to(embedded.dtype)
        mine = F.embedding((ids - size).clamp(min=0), learned_ND)
        return torch.where((ids >= size)[..., None], mine, embedded)


def add_word(model: Model, word: str, vectors: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Teach a model's text encoders a word, with (N, D) float32 embeddings for each of them.

    Returns the embeddings as parameters. Raises ValueError when the model knows the word already,
    or when the vectors are not for its encoders.
    """
    if not re.fullmatch(r"\S+", word):
        raise ValueError(f"a learned word is one word, not {word!r}")
    tokens = [word, *(f"{word}_{number}" for number in range(1, len(vectors[0])))]
    if len(vectors) != len(model.text_encoders):
        raise ValueError(
            f"{word!r} has embeddings for {len(vectors)} text encoders, the model has "
            f"{len(model.text_encoders)}"
        )
    parameters = []
    for tokenizer, encoder, rows_ND in zip(
        model.tokenizers, model.text_encoders, vectors, strict=True
    ):
        known = _table(encoder)
        if rows_ND.shape[1] != known.weight.shape[1]:
            raise ValueError(
                f"{word!r} has embeddings of width {rows_ND.shape[1]}, the text "
                f"encoder's have {known.weight.shape[1]}"
            )
        taken = [token for token in tokens if token in tokenizer.get_vocab()]
        if taken:
            raise ValueError(f"the tokenizer knows {taken[0]!r} already; take another, as <{word}>")
        tokenizer.add_tokens(tokens)
        if not isinstance(known, GrownEmbedding):
            known = GrownEmbedding(known)
            encoder.set_input_embeddings(known)
        parameter = torch.nn.Parameter(rows_ND.float().to(model.device), requires_grad=False)
        known.learned.append(parameter)
        parameters.append(parameter)
    model.words[word] = len(tokens)
    return parameters


def load_word(model: Model, path: str, word: str) -> None:
    """Teach a model the word of a diffusers file (or its folder): clip_l and clip_g, or by name.

    Raises ValueError when it cannot be read or is for another model.
    """
    file = word_file(Path(path))
    try:
        held = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"learned words {path} cannot be read: {error}") from None
    names = SDXL_NAMES if model.family == "sdxl" else (word,)
    if not all(name in held for name in names):
        there, wanted = ", ".join(held), " and ".join(names)
        raise ValueError(f"learned words {file.name} hold {there}, not {wanted}")
    add_word(model, word, [torch.atleast_2d(held[name]) for name in names])


def to_tensors(model: Model, word: str, vectors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A word as diffusers keeps it."""
    names = SDXL_NAMES if model.family == "sdxl" else (word,)
    return {
        name: rows_ND.detach().float().cpu().contiguous()
        for name, rows_ND in zip(names, vectors, strict=True)
    }


def expand_words(text: str, words: dict[str, int]) -> str:
    """The text with each learned word as all of its tokens."""
    for word, count in words.items():
        tokens = " ".join([word, *(f"{word}_{number}" for number in range(1, count))])
        if count > 1 and word in text and tokens not in text:
            text = text.replace(word, tokens)
    return text


def initial_vectors(model: Model, like: str, count: int) -> list[torch.Tensor]:
    """(count, D) for each encoder: the mean embedding of a known word's tokens, `count` times."""
    vectors = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(like, add_special_tokens=False, return_tensors="pt").input_ids[0]
        mean_D = _table(encoder).weight.detach().float().cpu()[ids].mean(0)
        vectors.append(mean_D.repeat(count, 1))
    return vectors


def word_file(path: Path) -> Path:
    path = path / "learned_embeds.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"learned words {path}: no such .safetensors file")
    return path


def _table(encoder: Any) -> Any:
    return encoder.get_input_embeddings()
