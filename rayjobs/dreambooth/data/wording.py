"""What is wrong, or perhaps not meant, in the wording of captions.

Owns the checks of captions, made before anything is written. Knows neither files nor torch; a
tokenizer is handed in.
"""

import re
from collections.abc import Sequence
from typing import Any

from rayjobs.config import BadInput
from rayjobs.diffusion.text import schedule, syntax
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import Photo, shortened

MAX_TOKENS = 3500
"""Of a caption in any syntax but plain: it fits into the chunks that a prompt may have."""
WEIGHS_NOT = (
    "weights such as (word:1.3) are taken as plain text, and train.caption_syntax=a1111 reads them"
)
WEIGHS = "words in brackets are weighted; a backslash before each bracket makes it text"


def check_captions(
    config: DreamBoothConfig, photos: Sequence[Photo], identifier: str, tokenizer: Any
) -> list[str]:
    """Warnings for captions that are perhaps not taken as they were meant.

    Raises BadInput for those that cannot be taken at all. Without a tokenizer none is measured.
    """
    how = config.train.caption_syntax
    check_syntax(config, photos)
    words = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in identifier.split()]
    nameless, weighted = [], []
    weighs = syntax.looks_weighted if how == "plain" else _weighs
    for photo in photos:
        if not all(re.search(w, text, re.I) for text in photo.captions for w in words):
            nameless.append(photo.name)
        if any(map(weighs, photo.captions)):
            weighted.append(photo.name)
    about_weights = WEIGHS_NOT if how == "plain" else WEIGHS
    warnings = [
        f"{what}: {shortened(names)}"
        for what, names in (
            (f"captions without the identifier {identifier!r} teach nothing of it", nameless),
            (about_weights, weighted),
        )
        if names
    ]
    return warnings + ([] if tokenizer is None else _check_lengths(photos, how, tokenizer))


def _check_lengths(photos: Sequence[Photo], how: str, tokenizer: Any) -> list[str]:
    warnings, most = [], tokenizer.model_max_length - 2
    for photo in photos:
        longest = max(
            len(ids) - 2 for ids in tokenizer(list(photo.captions), verbose=False).input_ids
        )
        if how != "plain" and longest > MAX_TOKENS:
            raise BadInput(f"{photo.name}: its caption has {longest} tokens; make it shorter")
        if how == "plain" and longest > most:
            warnings.append(
                f"{photo.name}: its caption has {longest} tokens, of which the model reads {most}; "
                "train.caption_syntax=a1111 reads all"
            )
    return warnings


def check_syntax(config: DreamBoothConfig, photos: Sequence[Photo]) -> None:
    """Refuse captions that ask for what their syntax has and we have not."""
    train = config.train
    if train.caption_syntax == "plain":
        return
    shuffles = train.shuffle_tags or train.tag_dropout
    for caption, name in {text: photo.name for photo in photos for text in photo.captions}.items():
        try:
            syntax.check_syntax(f"{name}: its caption", caption, train.caption_syntax)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if any(not isinstance(part, str) for part in schedule.read(caption)):
            raise BadInput(
                f"{name}: its caption has words that change from step to step, as [a:b:0.5] or "
                "[a|b], and a step of training has none before it; write what the picture shows"
            )
        if shuffles and _weighs(caption) and any(map(_is_open, caption.split(","))):
            raise BadInput(
                f"{name}: its caption has brackets around several tags, which train.shuffle_tags "
                "and train.tag_dropout would tear apart; give each tag its own"
            )


def _weighs(caption: str) -> bool:
    return any(part.weight != 1 for section in syntax.parse(caption) for part in section)


def _is_open(tag: str) -> bool:
    bare = re.sub(r"\\.", "", tag)
    return any(bare.count(opens) != bare.count(closes) for opens, closes in ("()", "[]"))
