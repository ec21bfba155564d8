"""Prompts as the text encoders take them: chunks of 77 tokens, and the weights of these.

Owns tokenizing, and where a prompt that is longer than one chunk is divided: as the web UI does it,
75 tokens in each, back at a comma where one is near. Knows neither rows nor what encoders give.
"""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text.inversion import expand_words
from rayjobs.diffusion.text.syntax import Part, foreign, looks_weighted, parse, weighs_whole

COMMA_REACH = 20
"""A chunk that ends in the middle of a phrase ends at a comma instead, at most so many tokens
back: the web UI's default ("comma_padding_backtrack")."""
NOWHERE = -COMMA_REACH
MAX_CHUNKS = 64
"""Of a prompt: 4800 tokens."""


class Chunk(NamedTuple):
    """What one call of each text encoder reads of a prompt."""

    tokens: tuple[tuple[int, ...], ...]
    """Token ids of each encoder, as many as it takes."""
    weights: tuple[tuple[float, ...], ...] | None = None
    """Of each token, where one is not 1."""
    keeps_mean: bool = True
    """Whether weights leave the mean of the encoder's output as it was."""


class Tokens(NamedTuple):
    """A prompt in chunks, and what of it is not taken as it was perhaps meant."""

    chunks: tuple[Chunk, ...]
    warnings: tuple[str, ...] = ()


def tokenize(model: Model, text: str, syntax: str, *, negative: bool = False) -> Tokens:
    """A prompt's chunks, at least one. Raises ValueError when there are too many."""
    if syntax == "plain":
        return _plain(model, text)
    sections = parse(text)
    each = [list(_divided(tokenizer, sections)) for tokenizer in model.tokenizers]
    if max(map(len, each)) > MAX_CHUNKS:
        raise ValueError(
            f"a prompt takes {max(map(len, each))} chunks of 75 tokens; at most {MAX_CHUNKS} are "
            "taken, so make it shorter"
        )
    warnings = foreign(text)
    if weighs_whole(text) and not negative:
        warnings.append("a number after a colon at the prompt's end is taken as plain text")
    chunks = tuple(
        _chunk(model, parts, syntax != "a1111-no-norm")
        for parts in zip_longest(*each, fillvalue=[])
    )
    return Tokens(chunks, tuple(warnings))


def padded(model: Model, chunks: tuple[Chunk, ...], count: int) -> tuple[Chunk, ...]:
    """`count` chunks, those that are missing being of no text."""
    missing = count - len(chunks)
    return chunks + (_chunk(model, [[] for _ in model.tokenizers], True),) * missing


def _plain(model: Model, text: str) -> Tokens:
    """One chunk, cut as diffusers' pipelines do it."""
    tokens, kept = [], []
    for tokenizer in model.tokenizers:
        said, most = expand_words(text, tokenizer), tokenizer.model_max_length
        cut = tokenizer(said, padding="max_length", max_length=most, truncation=True).input_ids
        tokens.append(tuple(cut))
        if len(tokenizer(said).input_ids) > most:
            kept.append(most - 2)
    warnings = foreign(text)
    if kept:
        warnings.append(
            f"prompt cut after {min(kept)} tokens, the text encoder's limit; prompt_syntax a1111 "
            "takes longer ones"
        )
    if looks_weighted(text):
        warnings.append(
            "weights such as (word:1.3) are taken as plain text; prompt_syntax a1111 reads them"
        )
    return Tokens((Chunk(tuple(tokens)),), tuple(warnings))


Weighted = tuple[int, float]
"""A token and its weight."""


def _divided(tokenizer: Any, sections: list[list[Part]]) -> Iterator[list[Weighted]]:
    """The weighted tokens of each chunk; what is after a BREAK begins another."""
    room = tokenizer.model_max_length - 2
    comma = tokenizer.get_vocab().get(",</w>")
    for number, section in enumerate(sections):
        chunk: list[Weighted] = []
        last_comma = NOWHERE
        for word in _words(tokenizer, section):
            if len(word) > room:
                raise ValueError(f"a learned word has {len(word)} vectors; a prompt takes {room}")
            if word[0][0] == comma:
                last_comma = len(chunk)
            elif len(chunk) == room and room - last_comma <= COMMA_REACH:
                yield chunk[: last_comma + 1]
                chunk, last_comma = chunk[last_comma + 1 :], NOWHERE
            if len(chunk) + len(word) > room:
                yield chunk
                chunk, last_comma = [], NOWHERE
            chunk += word
        if chunk or number < len(sections) - 1 or not number:
            yield chunk


def _words(tokenizer: Any, parts: Iterable[Part]) -> Iterator[list[Weighted]]:
    """Weighted tokens one by one; those of a learned word, which no end divides, at once."""
    learned = {number: name for name, number in tokenizer.added_tokens_encoder.items()}
    for text, weight in parts:
        ids = tokenizer(expand_words(text, tokenizer), add_special_tokens=False).input_ids
        at = 0
        while at < len(ids):
            name, end = learned.get(ids[at]), at + 1
            while end < len(ids) and name and learned.get(ids[end]) == f"{name}_{end - at}":
                end += 1
            yield [(token, weight) for token in ids[at:end]]
            at = end


def _chunk(model: Model, parts: Iterable[list[Weighted]], keeps_mean: bool) -> Chunk:
    tokens, weights = [], []
    for tokenizer, part in zip(model.tokenizers, parts, strict=True):
        size = tokenizer.model_max_length
        ids = [tokenizer.bos_token_id, *(token for token, _ in part), tokenizer.eos_token_id]
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
        tokens.append((*ids, *[tokenizer.pad_token_id] * (size - len(ids))))
        known = [1.0, *(weight for _, weight in part)]
        weights.append((*known, *[1.0] * (size - len(known))))
    is_weighted = any(weight != 1 for each in weights for weight in each)
    return Chunk(tuple(tokens), tuple(weights) if is_weighted else None, keeps_mean)
