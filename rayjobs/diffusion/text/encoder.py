"""From prompts to what the UNet is conditioned on, each text encoded once.

Owns tokenizing, which hidden state each family reads, and the cache. Knows nothing of rows.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cachetools import LRUCache

from rayjobs.diffusion.adapters.bank import LoraBank, LoraUse
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text.inversion import expand_words

WEIGHTED_WORDS = re.compile(r"\([^()]+:\s*\d+(\.\d+)?\)")


class Text(NamedTuple):
    """One text to encode. `text` None stands for no text at all: zeros for SDXL, "" for SD."""

    text: str | None
    clip_skip: int | None = None
    loras: LoraUse = ()


@dataclass(frozen=True)
class Embedding:
    """What the UNet gets of one text: states (1, 77, D), SDXL's pooled vector (1, D), warnings."""

    text_1LD: torch.Tensor
    pooled_1D: torch.Tensor | None
    warnings: tuple[str, ...] = ()


class PromptEncoder:
    """Encodes texts in batches of at most `batch`, and remembers the last `cache_size` of them.

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
        self._cache: LRUCache[Text, Embedding] = LRUCache(cache_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[Text]) -> list[Embedding]:
        """One embedding per text, in order; texts met before cost nothing."""
        texts = [self._canonical(text) for text in texts]
        embeddings = {text: self._cache[text] for text in texts if text in self._cache}
        missing = [text for text in dict.fromkeys(texts) if text not in embeddings]
        for group in self._groups(missing):
            embeddings |= zip(group, self._encode(group), strict=True)
        self._cache.update(embeddings)
        return [embeddings[text] for text in texts]

    def _canonical(self, text: Text) -> Text:
        if text.text is None and not self.model.force_zeros:
            return text._replace(text="")
        return text

    def _groups(self, texts: list[Text]) -> Iterator[list[Text]]:
        """Texts that one call can take: same layer, and no more than the fixed batch."""
        by_layer: dict[int | None, list[Text]] = {}
        for text in texts:
            by_layer.setdefault(text.clip_skip, []).append(text)
        for group in by_layer.values():
            for first in range(0, len(group), self.batch):
                yield group[first : first + self.batch]

    def _encode(self, texts: list[Text]) -> list[Embedding]:
        padding = self.batch - len(texts) if self.fixed_shape else 0
        padded = texts + [texts[-1]] * padding
        states, pooled_BD, kept = [], None, []
        with self.loras.applied([text.loras for text in padded]):
            for tokenizer, encoder in zip(
                self.model.tokenizers, self.model.text_encoders, strict=True
            ):
                said = [expand_words(text.text or "", tokenizer) for text in padded]
                tokens, whole = _tokenize(tokenizer, said)
                output = encoder(tokens.to(self.model.device), output_hidden_states=True)
                states.append(self._pick_state(encoder, output, texts[0].clip_skip))
                pooled_BD = output[0] if output[0].ndim == 2 else pooled_BD
                kept.append(whole)
        text_BLD = torch.cat(states, dim=-1).to(self.model.dtype)
        return [
            self._embedding(i, text, text_BLD, pooled_BD, min(whole[i] for whole in kept))
            for i, text in enumerate(texts)
        ]

    def _pick_state(self, encoder: Any, output: Any, clip_skip: int | None) -> torch.Tensor:
        """SDXL reads the last layer but one; SD the last, or an earlier one normed again."""
        if self.model.family == "sdxl":
            state: torch.Tensor = output.hidden_states[-(2 + (clip_skip or 0))]
            return state
        if clip_skip is None:
            return output[0]
        # transformers 5.6 and later have no `text_model` inside CLIPTextModel.
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return norm(output.hidden_states[-(clip_skip + 1)])

    def _embedding(
        self,
        row: int,
        text: Text,
        text_BLD: torch.Tensor,
        pooled_BD: torch.Tensor | None,
        num_tokens_kept: float,
    ) -> Embedding:
        text_1LD = text_BLD[row : row + 1].clone()
        pooled_1D = None
        if self.model.family == "sdxl" and pooled_BD is not None:
            pooled_1D = pooled_BD[row : row + 1].to(self.model.dtype)
        if text.text is None:
            text_1LD = torch.zeros_like(text_1LD)
            pooled_1D = torch.zeros_like(pooled_1D) if pooled_1D is not None else None
        warnings = []
        if num_tokens_kept < float("inf"):
            cut = f"prompt cut after {int(num_tokens_kept)} tokens, the text encoder's limit"
            warnings.append(cut)
        if WEIGHTED_WORDS.search(text.text or ""):
            warnings.append("weights such as (word:1.3) are taken as plain text")
        return Embedding(text_1LD, pooled_1D, tuple(warnings))


def _tokenize(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, list[float]]:
    """Token ids (B, 77), and for each text how many of its tokens were kept (inf: all)."""
    length = tokenizer.model_max_length
    ids = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    whole = tokenizer(texts).input_ids
    return ids, [length - 2 if len(tokens) > length else float("inf") for tokens in whole]
