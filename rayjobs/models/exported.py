"""The note beside exported weights: what they are, what they were made of.

Owns its keys and its place. Training writes it; generation and serving read it. Knows no torch.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput

FILE = "manifest.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDINGS_FILE = "learned_embeds.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Weights that a run left, in the folder of this note."""

    kind: str
    """`lora`: pytorch_lora_weights.safetensors, for `base_uri`; `full`: a diffusers folder;
    `words`: learned_embeds.safetensors alone."""
    base_uri: str
    base_sha256: str
    family: str
    instance_prompt: str
    identifier: str
    step: int
    seed: int
    files: dict[str, str]
    """SHA-256 by name."""
    photos: dict[str, str]
    """SHA-256 of every photograph of the subject, by name."""
    tokens: tuple[str, ...] = ()
    """Words of learned embeddings, in learned_embeds.safetensors."""
    metrics: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT


def write(uri: str, exported: Exported) -> None:
    """Last of an export's files: its presence says that all are there."""
    data = json.dumps(asdict(exported), indent=1, ensure_ascii=False).encode()
    storage.write_bytes(storage.join(uri, FILE), data)


def read(uri: str) -> Exported | None:
    """The note in folder `uri`, or None. Raises BadInput for one of another sort."""
    place = storage.join(uri, FILE)
    if not storage.exists(place):
        return None
    try:
        values: dict[str, Any] = json.loads(storage.read_bytes(place))
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')!r}, not {FORMAT}")
        values["tokens"] = tuple(values["tokens"])
        return Exported(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{place} is no note of an export: {error}") from None
