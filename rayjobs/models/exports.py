"""What training exports: the note beside the weights, and what such a folder's uri stands for.

Owns the note's keys and its place, and the step from an export's uri to a base model with an
adapter and words. Training writes it; generation and serving read it. Knows no torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.records import canonical_json
from rayjobs.diffusion.files.beside import word_file
from rayjobs.diffusion.files.identity import sha256_of
from rayjobs.models.facts import is_folder
from rayjobs.models.options import LoraConfig, ModelConfig, SourceConfig, WordConfig

FILE = "manifest.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDINGS_FILE = "learned_embeds.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
PEFT_FOLDER = "peft"
FUSED = "fused"
"""The folder of a whole model beside an adapter or words."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ExportNote:
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
    knows_words: bool = False
    """Whether the model of a `full` export has the words in its own text encoders."""
    steps: int = 0
    """The run's steps, of which `step` is the exported one; 0 in notes of older versions."""
    caption_syntax: str = "plain"
    """How the captions were written that it was trained with, as `prompt_syntax` of prompts."""
    dtype: str = ""
    """Of a whole model's weights; empty in notes of older versions."""
    metrics: dict[str, float] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    """What else the run was told of its base: keys of `SourceConfig`, with their values."""
    format: int = FORMAT


def write(uri: str, note: ExportNote) -> None:
    """Last of an export's files: its presence says that all are there."""
    values = asdict(note)
    if not note.source:
        del values["source"]
    if note.caption_syntax == "plain":
        del values["caption_syntax"]  # which earlier versions do not know
    data = json.dumps(values, indent=1, ensure_ascii=False).encode()
    storage.write_bytes(storage.join(uri, FILE), data)


def read(uri: str) -> ExportNote | None:
    """The note in folder `uri`, or None. Raises BadInput for one of another sort."""
    place = storage.join(uri, FILE)
    if not storage.exists(place):
        return None
    try:
        values: dict[str, Any] = json.loads(storage.read_bytes(place))
        if values.get("format") != FORMAT:
            raise ValueError(f"its format is {values.get('format')!r}, not {FORMAT}")
        values["tokens"] = tuple(values["tokens"])
        SourceConfig.model_validate({"uri": "-", **values.get("source", {})})
        return ExportNote(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{place} is no note of an export: {error}") from None


@dataclass(frozen=True)
class ExportParts:
    """What an export's uri stands for: a model, and what goes on top of it."""

    base_uri: str
    lora_uri: str | None
    words: tuple[WordConfig, ...]
    source: Mapping[str, str] = field(default_factory=dict)
    """What else is known of the base: keys of `SourceConfig`."""

    @property
    def base(self) -> SourceConfig:
        return SourceConfig.model_validate({"uri": self.base_uri, **self.source})


def parts_of(uri: str, note: ExportNote) -> ExportParts:
    """The parts of the export in folder `uri`; a full export is a model as it is.

    Raises BadInput when the export's base is a local folder that this machine lacks, or when
    nobody can load it.
    """
    if note.kind == "full":
        if note.tokens and not note.knows_words:
            raise BadInput(
                f"{uri} was exported by an older version, and its text encoders cannot be loaded; "
                f"remove {storage.join(uri, FILE)} and start its run again, which exports it again "
                "without training"
            )
        return ExportParts(uri, None, ())
    learned = storage.join(uri, EMBEDDINGS_FILE)
    words = tuple(WordConfig(uri=learned, word=word) for word in note.tokens)
    base = note.base_uri
    if base.startswith("/") and not Path(base).exists():
        raise BadInput(
            f"{uri} is an adapter for the model {base}, which is not here; load that model where "
            "it is, and this export as its LoRA"
        )
    lora = storage.join(uri, LORA_FILE) if note.kind == "lora" else None
    return ExportParts(base, lora, words, note.source)


def resolve(model: ModelConfig) -> ModelConfig:
    """The base model with the adapter and the words that an export's uri means; others as is."""
    note = read(model.uri) if is_folder(model.uri) else None
    if note is None:
        return model
    try:
        parts = parts_of(model.uri, note)
    except BadInput as error:
        raise BadInput(f"model.uri: {error}") from None
    loras = () if parts.lora_uri is None else (LoraConfig(uri=parts.lora_uri),)
    told = {key: it for key, it in parts.source.items() if getattr(model, key) is None}
    return model.model_copy(
        update=told
        | {
            "uri": parts.base_uri,
            "loras": (*loras, *model.loras),
            "words": (*parts.words, *model.words),
        }
    )


def identity(model_sha256: str, words: Sequence[WordConfig]) -> str:
    """A model's identity with the words that it is taught."""
    if not words:
        return model_sha256
    taught = [(each.word, sha256_of(words_file(each))) for each in words]
    return hashlib.sha256(canonical_json([model_sha256, *taught])).hexdigest()


def words_file(config: WordConfig) -> Path:
    """The local file of learned embeddings. Raises BadInput and StorageError."""
    try:
        return word_file(storage.fetch(config.uri))
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"model.words: {error}") from None
