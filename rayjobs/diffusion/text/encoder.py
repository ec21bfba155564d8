"""From prompts to what the UNet is conditioned on, each chunk encoded once.

Owns which hidden state each family reads, how weights act on it, and the cache. Knows neither how
prompts are written nor rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from rayjobs.diffusion.adapters.bank import LoraBank, LoraUse
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.upload import upload
from rayjobs.diffusion.text.chunks import Chunk

TEXT_PARTS = ("text_encoder", "text_encoder_2")
MIN_MEAN = 1e-5
"""Of the mean magnitude: a mean below is rounding's, and no measure to keep."""


class Text(NamedTuple):
    """One text to encode. `is_zero` stands for no text at all where that is zeros, as for SDXL."""

    chunks: tuple[Chunk, ...]
    clip_skip: int | None = None
    loras: LoraUse = ()
    is_zero: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embedding:
    """What the UNet gets of one text: states (1, 77 N, D) of its N chunks, and SDXL's pooled
    vector (1, D) of the first."""

    text_1LD: torch.Tensor
    pooled_1D: torch.Tensor | None


class _Piece(NamedTuple):
    """All that decides the embedding of a chunk."""

    chunk: Chunk
    clip_skip: int | None
    loras: LoraUse


class PromptEncoder:
    """Encodes chunks in batches of at most `batch`, and remembers the last `cache_size` of them.

    With `fixed_shape` smaller batches are padded.
    """

    def __init__(
        self,
        model: Model,
        loras: LoraBank,
        batch: int,
        cache_size: int = 1024,
        *,
        fixed_shape: bool = True,
    ):
        self.model = model
        self.loras = loras
        self.batch = batch
        self.fixed_shape = fixed_shape
        self._cache: LRUCache[_Piece, Embedding] = LRUCache(cache_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[Text]) -> list[Embedding]:
        """One embedding per text, in order; chunks met before cost nothing."""
        pieces = [_Piece(chunk, t.clip_skip, t.loras) for t in texts for chunk in t.chunks]
        embeddings = {piece: self._cache[piece] for piece in pieces if piece in self._cache}
        missing = [piece for piece in dict.fromkeys(pieces) if piece not in embeddings]
        for group in self._groups(missing):
            embeddings |= zip(group, self._encode(group), strict=True)
        self._cache.update(embeddings)
        remaining = iter(pieces)
        return [_joined(t, [embeddings[next(remaining)] for _ in t.chunks]) for t in texts]

    def _groups(self, pieces: list[_Piece]) -> Iterator[list[_Piece]]:
        """Chunks that one call can take: same layer, and no more than the fixed batch."""
        by_layer: dict[int | None, list[_Piece]] = {}
        for piece in pieces:
            by_layer.setdefault(piece.clip_skip, []).append(piece)
        for group in by_layer.values():
            for first in range(0, len(group), self.batch):
                yield group[first : first + self.batch]

    def _encode(self, pieces: list[_Piece]) -> list[Embedding]:
        padding = self.batch - len(pieces) if self.fixed_shape else 0
        padded = pieces + [pieces[-1]] * padding
        with self.loras.applied([piece.loras for piece in padded], TEXT_PARTS):
            chunks = [piece.chunk for piece in padded]
            text_BLD, pooled_BD = encode_chunks(self.model, chunks, pieces[0].clip_skip)
        text_BLD = text_BLD.to(self.model.dtype)
        return [self._embedding(i, text_BLD, pooled_BD) for i in range(len(pieces))]

    def _embedding(
        self, row: int, text_BLD: torch.Tensor, pooled_BD: torch.Tensor | None
    ) -> Embedding:
        pooled_1D = None
        if self.model.family == "sdxl" and pooled_BD is not None:
            pooled_1D = pooled_BD[row : row + 1].to(self.model.dtype)
        return Embedding(text_BLD[row : row + 1].clone(), pooled_1D)


def encode_chunks(
    model: Model, chunks: Sequence[Chunk], clip_skip: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States (N, 77, D) of N chunks, and SDXL's pooled vectors (N, P): a call of each encoder."""
    states, pooled_NP = [], None
    for number, encoder in enumerate(model.text_encoders):
        tokens_NL = torch.tensor([chunk.tokens[number] for chunk in chunks])
        output = encoder(upload(tokens_NL, model.device), output_hidden_states=True)
        state_NLD = _pick_state(model.family, encoder, output, clip_skip)
        weighted = zip(state_NLD, chunks, strict=True)
        states.append(torch.stack([_weighted(state, chunk, number) for state, chunk in weighted]))
        pooled_NP = output[0] if output[0].ndim == 2 else pooled_NP
    return torch.cat(states, dim=-1), pooled_NP


def _pick_state(family: str, encoder: Any, output: Any, clip_skip: int | None) -> torch.Tensor:
    """SDXL reads the last layer but one; SD the last, or an earlier one normed again."""
    if family == "sdxl":
        state: torch.Tensor = output.hidden_states[-(2 + (clip_skip or 0))]
        return state
    if clip_skip is None:
        return output[0]
    # transformers 5.6 and later have no `text_model` inside CLIPTextModel.
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm(output.hidden_states[-(clip_skip + 1)])


def _weighted(state_LD: torch.Tensor, chunk: Chunk, encoder: int) -> torch.Tensor:
    """An encoder's output for a chunk, each token's times its weight.

    To keep the mean of all as it was is how AUTOMATIC1111's web UI has it ("Emphasis: Original").
    """
    if chunk.weights is None:
        return state_LD
    weights_L1 = upload(torch.tensor(chunk.weights[encoder]), state_LD.device)[:, None]
    plain_LD = state_LD.float()
    weighted_LD = plain_LD * weights_L1
    if chunk.keeps_mean:
        mean, new_mean = plain_LD.mean(), weighted_LD.mean()
        least = MIN_MEAN * plain_LD.abs().mean()
        is_told = (mean.abs() > least) & (new_mean.abs() > least)
        weighted_LD = weighted_LD * torch.where(is_told, mean / new_mean, 1.0)
    return weighted_LD.to(state_LD.dtype)


def _joined(text: Text, pieces: list[Embedding]) -> Embedding:
    """The embedding of a text from those of its chunks."""
    whole = pieces[0]
    if len(pieces) > 1:
        text_1LD = torch.cat([piece.text_1LD for piece in pieces], dim=1)
        whole = Embedding(text_1LD, whole.pooled_1D)
    if not text.is_zero:
        return whole
    pooled_1D = None if whole.pooled_1D is None else torch.zeros_like(whole.pooled_1D)
    return Embedding(torch.zeros_like(whole.text_1LD), pooled_1D)
