"""What a model's files tell before it is loaded.

Owns the way from a uri, local or on S3, to those files. What the values mean to the engine is
`rayjobs.diffusion.facts`'. Needs no torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion import facts
from rayjobs.diffusion.weights import STARTER, Weights, locate
from rayjobs.storage import StorageError


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration files tell."""

    family: str | None = None
    side: int | None = None
    """Pixels of the pictures that it was trained on."""
    multiple: int = 8
    """Sides must be multiples of it."""
    is_edm: bool = False

    @property
    def guidance_scale(self) -> float | None:
        if self.family is None:
            return None
        return facts.default_guidance_scale(self.family, self.is_edm)


def read_facts(uri: str) -> ModelFacts:
    """Of a diffusers folder, local or s3://, from its configuration files alone; else none."""
    folder = str(STARTER) if uri == "starter" else uri
    if not is_folder(folder):
        return ModelFacts()
    try:
        family = facts.FAMILIES.get(str(_json(folder, "model_index.json").get("_class_name")))
        vae, unet = _json(folder, "vae", "config.json"), _json(folder, "unet", "config.json")
        sampler = str(_json(folder, "scheduler", "scheduler_config.json").get("_class_name"))
    except (StorageError, ValueError):
        return ModelFacts()
    if family is None:
        return ModelFacts()
    multiple = max(8, facts.vae_scale(vae))
    return ModelFacts(family, facts.default_side(unet, vae), multiple, facts.is_edm(sampler))


def find_weights(uri: str, key: str = "model.uri") -> Weights:
    """The local files of a model, fetched first if it is elsewhere.

    Raises StorageError, and BadInput naming the `key` that is to be changed.
    """
    try:
        return locate(storage.to_local(uri))
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{key}: {error}") from None


def is_folder(uri: str) -> bool:
    """Whether `uri` may be a folder: it is one here, or it is elsewhere."""
    return storage.is_remote(uri) or Path(uri).is_dir()


def _json(folder: str, *parts: str) -> dict[str, Any]:
    values = json.loads(storage.read_bytes(storage.join(folder, *parts)))
    if not isinstance(values, dict):
        raise ValueError(f"{'/'.join(parts)} is no JSON object")
    return values
