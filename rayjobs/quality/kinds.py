"""What the keys under `quality` take: which models, as far as their `config.json` tells.

Owns that table, so that a wrong model is refused before anything is made. Imports neither torch nor
transformers.
"""

import json
from pathlib import Path

from rayjobs.config import BadInput

ALIKE = 0.95
"""The cosine of two embeddings from which on their pictures show the same, where none is given."""
CLIPS = ("clip",)
CAPTIONERS = ("blip", "blip-2", "git", "vision-encoder-decoder")
"""Those that describe a picture without being asked a question."""
MODELS: dict[str, tuple[str, ...]] = {
    "clip": CLIPS,
    "aesthetic": (),
    "safety": (),
    "pick": CLIPS,
    "hps": CLIPS,
    "caption": CAPTIONERS,
}
"""The types that the model of each key may have; where there are none, its weights tell."""


def check(name: str, uri: str, path: Path) -> None:
    """Raise BadInput where the model at `path`, named by `quality.NAME`, is of another type."""
    if not MODELS[name] or not path.exists():
        return
    file = path / "config.json"
    try:
        kind = json.loads(file.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise BadInput(
            f"quality.{name}: {uri} is no folder of a transformers model: its config.json cannot "
            "be read"
        ) from None
    refuse_other(f"quality.{name}: {uri}", kind, MODELS[name])


def refuse_other(uri: str, kind: str | None, expected: tuple[str, ...]) -> None:
    """Raise BadInput where a model's type is none of those expected."""
    if kind not in expected:
        types = " or ".join(expected)
        raise BadInput(f"{uri} is a model of type {kind}; expected is type {types}")
