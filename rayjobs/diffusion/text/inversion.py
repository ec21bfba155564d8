"""Learned words: tokens of their own with learned embeddings (textual inversion, arXiv 2208.01618).

Owns how a word is added to a loaded model, how it expands to tokens in a prompt, and the files of
them. A word of several vectors is as many tokens: w, w_1, w_2, ... Legend: N tokens, D width.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AddedToken

from rayjobs.diffusion.files.beside import word_file
from rayjobs.diffusion.model import Model

SDXL_NAMES = ("clip_l", "clip_g")
A1111_NAME = "emb_params"


class GrownEmbedding(torch.nn.Module):
    """An embedding table with rows of its own, for the tokens from `first` on."""

    def __init__(self, known: torch.nn.Embedding, first: int):
        super().__init__()
        self.known = known
        self.first = first
        self.learned = torch.nn.ParameterList()

    @property
    def weight(self) -> torch.Tensor:
        """The table as it was, for those who ask for its dtype or device."""
        return self.known.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = F.embedding(ids.clamp(max=self.known.num_embeddings - 1), self.known.weight)
        learned_ND = torch.cat(list(self.learned)).to(embedded.dtype)
        mine = F.embedding((ids - self.first).clamp(min=0), learned_ND)
        return torch.where((ids >= self.first)[..., None], mine, embedded)

    def as_table(self) -> torch.nn.Embedding:
        """A plain table that gives the same."""
        learned_ND = torch.cat(list(self.learned)).detach().to(self.known.weight)
        size = max(self.known.num_embeddings, self.first + len(learned_ND))
        table_ND = self.known.weight.new_zeros(size, self.known.embedding_dim)
        table_ND[: self.known.num_embeddings] = self.known.weight.detach()
        table_ND[self.first : self.first + len(learned_ND)] = learned_ND
        return torch.nn.Embedding.from_pretrained(table_ND, padding_idx=self.known.padding_idx)


def add_word(model: Model, word: str, vectors: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Teach a model's text encoders a word, with (N, D) float32 embeddings for each of them.

    N may differ from encoder to encoder. Returns the embeddings as parameters. Raises ValueError,
    and changes nothing, when the model knows the word already, or when the vectors are not for its
    encoders.
    """
    if not re.fullmatch(r"\S+", word):
        raise ValueError(f"a learned word is one word, not {word!r}")
    if len(vectors) != len(model.text_encoders):
        raise ValueError(
            f"{word!r} has embeddings for {len(vectors)} text encoders, the model has "
            f"{len(model.text_encoders)}"
        )
    parts = list(zip(model.tokenizers, model.text_encoders, vectors, strict=True))
    for tokenizer, encoder, rows_ND in parts:
        _check_fits(word, tokenizer, encoder, rows_ND)
    return [_add_tokens(word, model.device, *part) for part in parts]


def _check_fits(word: str, tokenizer: Any, encoder: Any, rows_ND: torch.Tensor) -> None:
    width = _table(encoder).weight.shape[1]
    if rows_ND.shape[1] != width:
        raise ValueError(
            f"{word!r} has embeddings of width {rows_ND.shape[1]}, the text encoder's have {width}"
        )
    if not len(rows_ND) or not bool(rows_ND.isfinite().all()):
        raise ValueError(f"{word!r} has no embeddings, or some that are not finite numbers")
    vocabulary = tokenizer.get_vocab()
    taken = [token for token in tokens_of(word, len(rows_ND)) if token in vocabulary]
    if taken:
        raise ValueError(f"the tokenizer knows {taken[0]!r} already; take another, as <{word}>")


def _add_tokens(
    word: str, device: str, tokenizer: Any, encoder: Any, rows_ND: torch.Tensor
) -> torch.nn.Parameter:
    known, first = _table(encoder), len(tokenizer)
    # "zed" is no part of "zedong"; <zed> may stand anywhere.
    alone = bool(re.fullmatch(r"\w|\w.*\w", word))
    tokens = tokens_of(word, len(rows_ND))
    tokenizer.add_tokens([AddedToken(token, single_word=alone) for token in tokens])
    if not isinstance(known, GrownEmbedding):
        known = GrownEmbedding(known, first)
        encoder.set_input_embeddings(known)
    parameter = torch.nn.Parameter(rows_ND.float().to(device), requires_grad=False)
    known.learned.append(parameter)
    return parameter


def settle_words(model: Model) -> None:
    """Make learned words part of the text encoders' own tables, as other programs save them."""
    for encoder in model.text_encoders:
        known = _table(encoder)
        if isinstance(known, GrownEmbedding):
            table = known.as_table()
            encoder.set_input_embeddings(table)
            encoder.config.vocab_size = table.num_embeddings


def load_word(model: Model, path: str, word: str) -> None:
    """Teach a model the word of a file (or of its folder), as diffusers, kohya and A1111 write it.

    SDXL's are clip_l and clip_g; Stable Diffusion's have the word's name, or are the only one.
    Raises ValueError when it cannot be read or is for another model.
    """
    file = word_file(Path(path))
    try:
        held = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"learned words {path} cannot be read: {error}") from None
    names = SDXL_NAMES if model.family == "sdxl" else (_single_name(held, word),)
    if not all(name in held for name in names):
        there, wanted = ", ".join(held), " and ".join(names)
        raise ValueError(f"learned words {file.name} hold {there}, not {wanted}")
    add_word(model, word, [torch.atleast_2d(held[name]) for name in names])


def _single_name(held: dict[str, torch.Tensor], word: str) -> str:
    """Which tensor of a file is the word's, for a model with one text encoder."""
    if word in held:
        return word
    return next(iter(held)) if len(held) == 1 else A1111_NAME if A1111_NAME in held else word


def to_tensors(model: Model, word: str, vectors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A word as diffusers keeps it."""
    names = SDXL_NAMES if model.family == "sdxl" else (word,)
    return {
        name: rows_ND.detach().float().cpu().contiguous()
        for name, rows_ND in zip(names, vectors, strict=True)
    }


def tokens_of(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def expand_words(text: str, tokenizer: Any) -> str:
    """The text with each learned word as all of the tokens that this tokenizer has for it.

    A word is found as the tokenizer finds it: in any case, the longest first, and never inside of
    another word. One that is spelled out already stays as it is.
    """
    added = tokenizer.added_tokens_encoder
    counts = {token: _count(token, added) for token in added}
    if all(count == 1 for count in counts.values()):
        return text
    by_lower = {token.lower(): token for token in added}

    def expanded(found: re.Match[str]) -> str:
        word = by_lower[found[0].lower()]
        if re.match(rf"\s+{re.escape(word)}_1", text[found.end() :], re.IGNORECASE):
            return found[0]
        return " ".join(tokens_of(found[0], counts[word]))

    longest_first: list[str] = sorted(added, key=len, reverse=True)
    pattern = "|".join(_standing_alone(token) for token in longest_first)
    return re.sub(pattern, expanded, text, flags=re.IGNORECASE)


def _count(token: str, added: dict[str, int]) -> int:
    count = 1
    while f"{token}_{count}" in added:
        count += 1
    return count


def _standing_alone(token: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.match(r"\w", token[-1]) else r"(?!_\d)"
    return before + re.escape(token) + after


def initial_vectors(model: Model, like: str, count: int) -> list[torch.Tensor]:
    """(count, D) for each encoder: the mean embedding of a known word's tokens, `count` times."""
    vectors = []
    for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(like, add_special_tokens=False, return_tensors="pt").input_ids[0]
        mean_D = _table(encoder).weight.detach().float().cpu()[ids].mean(0)
        vectors.append(mean_D.repeat(count, 1))
    return vectors


def _table(encoder: Any) -> Any:
    return encoder.get_input_embeddings()
