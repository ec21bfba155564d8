"""What a request's UNet calls are told: its texts, slot by slot.

Owns which text is in which slot, and when another is said. Knows nothing of how texts are encoded.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from rayjobs.diffusion.adapters.bank import LoraUse
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.text.chunks import Tokens, padded, tokenize
from rayjobs.diffusion.text.encoder import Text
from rayjobs.diffusion.text.schedule import stages

if TYPE_CHECKING:
    from rayjobs.diffusion.request import Request

MAX_TEXTS = 64
"""Of a prompt whose words change from step to step."""


def said_by(
    request: Request, guidance: float, use: LoraUse, model: Model, num_calls: int
) -> list[tuple[Text, ...]]:
    """The negative text, which guidance needs, and the prompt, in as many chunks; in the web UI's
    syntax perhaps of other words at each of the row's calls.

    clip_skip leaves the negative one alone, as in diffusers, but in the web UI's syntax.
    """
    layers = min(encoder.config.num_hidden_layers for encoder in model.text_encoders)
    if (request.clip_skip or 0) > layers - 1:
        raise ValueError(
            f"clip_skip is {request.clip_skip}; this model allows at most {layers - 1}"
        )
    syntax, skip = request.prompt_syntax, request.clip_skip
    asked = [(request.prompt, Text((), skip, use))]
    # A UNet distilled with guidance as an input (LCM) takes it there instead.
    if guidance > 1 and model.unet.config.time_cond_proj_dim is None:
        is_zero = request.negative_prompt is None and model.force_zeros
        negative = Text((), None if syntax == "plain" else skip, use, is_zero)
        asked.insert(0, (request.negative_prompt or "", negative))
    told = [
        _tokens(model, words, syntax, num_calls, negative=like is not asked[-1][1])
        for words, like in asked
    ]
    count = max(len(tokens.chunks) for tokens in itertools.chain.from_iterable(told))
    return [
        tuple(
            like._replace(chunks=padded(model, tokens.chunks, count), warnings=tokens.warnings)
            for tokens in of_slot
        )
        for (_, like), of_slot in zip(asked, told, strict=True)
    ]


def _tokens(
    model: Model, words: str, syntax: str, num_calls: int, *, negative: bool
) -> list[Tokens]:
    """A prompt as tokens: once, or for each call where its words change."""
    texts = [words] if syntax == "plain" else stages(words, num_calls)
    different = dict.fromkeys(texts)
    if len(different) > MAX_TEXTS:
        raise ValueError(f"a prompt says {len(different)} texts by turns; at most {MAX_TEXTS}")
    made = {text: tokenize(model, text, syntax, negative=negative) for text in different}
    return [made[text] for text in texts] if len(made) > 1 else [made[texts[0]]]
