"""What a model's files tell before it is loaded.

Owns the way from a uri, local or on S3, to those files. What the values mean to the engine is
`rayjobs.diffusion.facts`'. Needs no torch.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion import facts
from rayjobs.diffusion.facts import Usual
from rayjobs.diffusion.sampler_names import EPSILON, Prediction
from rayjobs.diffusion.weights import STARTER, Source, Weights, locate
from rayjobs.models.options import SourceConfig
from rayjobs.storage import StorageError

HUB_COPIES = "snapshots"
"""The folder of the hub's cache in which a repository has a folder for each commit."""


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration files tell."""

    family: str | None = None
    side: int | None = None
    """Pixels of the pictures that it was trained on."""
    multiple: int = 8
    """Sides must be multiples of it."""
    prediction: Prediction = EPSILON
    usual: Usual | None = None
    """The steps and guidance that it is made for."""
    needs_mask: bool = False
    """Whether it only makes masked parts of pictures anew."""

    @property
    def is_edm(self) -> bool:
        return self.prediction.is_edm

    @property
    def guidance_scale(self) -> float | None:
        return None if self.usual is None else self.usual.guidance_scale

    @property
    def steps(self) -> int:
        return facts.STEPS if self.usual is None else self.usual.steps


def read_facts(config: SourceConfig | str) -> ModelFacts:
    """Of a diffusers folder, local or s3://, from its configuration files, and of a local single
    file from its header; else none."""
    config = SourceConfig(uri=config) if isinstance(config, str) else config
    folder = str(STARTER) if config.uri == "starter" else config.uri
    if not is_folder(folder):
        return _facts_of_file(config) if Path(folder).is_file() else ModelFacts()
    try:
        index = _json(folder, "model_index.json")
        vae, unet = _json(folder, "vae", "config.json"), _json(folder, "unet", "config.json")
        sampler = _json(folder, "scheduler", "scheduler_config.json")
    except (StorageError, ValueError):
        return ModelFacts()
    family = facts.FAMILIES.get(str(index.get("_class_name")))
    if family is None:
        return ModelFacts()
    if config.prediction_type is not None:
        sampler = facts.as_told(sampler, config.prediction_type)
    return ModelFacts(
        family,
        facts.default_side(unet, vae),
        max(8, facts.vae_scale(vae)),
        Prediction.of(sampler),
        facts.usual(family, sampler, unet, facts.names_of(index, unet)),
        facts.needs_mask(unet),
    )


def find_weights(config: SourceConfig | str, key: str = "model.uri") -> Weights:
    """The local files of a model, fetched first if it is elsewhere.

    Raises StorageError, and BadInput naming the `key` that is to be changed.
    """
    try:
        return locate(to_source(config))
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{key}: {error}") from None


def unpinned(config: SourceConfig, weights: Weights) -> list[str]:
    """A warning for a model of the hub that may be another one tomorrow."""
    if config.revision is not None or weights.path.parent.name != HUB_COPIES:
        return []
    commit = weights.path.name
    return [f"model.uri: {config.uri} may change on the hub; model.revision={commit} pins it"]


def to_source(config: SourceConfig | str) -> Source:
    """The same with what is elsewhere fetched to this machine. Raises StorageError."""
    if isinstance(config, str):
        return Source(uri=storage.to_local(config))
    keys: dict[str, Any] = {name: getattr(config, name) for name in SourceConfig.model_fields}
    places = {name: keys[name] for name in ("uri", "config", "base") if keys[name] is not None}
    keys |= {name: storage.to_local(uri) for name, uri in places.items()}
    return Source(**keys)


def is_folder(uri: str) -> bool:
    """Whether `uri` may be a folder: it is one here, or it is elsewhere."""
    return storage.is_remote(uri) or Path(uri).is_dir()


def _facts_of_file(config: SourceConfig) -> ModelFacts:
    """Without what its configuration, on the hub or on S3, would have to be fetched for."""
    source = Source(**{name: getattr(config, name) for name in SourceConfig.model_fields})
    near = {n: v for n in ("config", "base") if (v := getattr(config, n)) and Path(v).is_dir()}
    try:
        weights = locate(replace(source, config=None, base=None, **near))
        return ModelFacts(
            weights.family,
            weights.default_side,
            8,
            weights.prediction,
            weights.usual,
            weights.needs_mask,
        )
    except ValueError:
        return ModelFacts()


def _json(folder: str, *parts: str) -> dict[str, Any]:
    values = json.loads(storage.read_bytes(storage.join(folder, *parts)))
    if not isinstance(values, dict):
        raise ValueError(f"{'/'.join(parts)} is no JSON object")
    return values
