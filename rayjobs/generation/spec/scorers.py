"""The models that a job's `quality` names: are they there, of the right type, and which are they.

Owns their hashes and the warning of one that may change. Loads none of them.
"""

import hashlib
import sys
from collections.abc import Collection
from pathlib import Path

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.records import SCORES, canonical_json, scores_asked
from rayjobs.diffusion import weights
from rayjobs.generation.config import GenerateConfig, QualityConfig
from rayjobs.quality import kinds


def named(config: QualityConfig) -> dict[str, str]:
    """The models by their keys."""
    uris = {name: getattr(config, name) for name in kinds.MODELS}
    return {name: uri for name, uri in uris.items() if uri is not None}


def check(config: QualityConfig) -> dict[str, str]:
    """Hash of each model that is a file or a folder; a hub id stands for itself.

    Raises BadInput naming the key of one that is missing or of another type.
    """
    digests: dict[str, str] = {}
    by_uri: dict[str, str] = {}
    for name, uri in named(config).items():
        path = Path(storage.to_local(uri))
        if not path.exists():
            if path.is_absolute() or uri.startswith("."):
                raise BadInput(f"quality.{name}: {uri} does not exist")
            print(
                f"warning: quality.{name}: {uri} may change on the hub; a folder with its files "
                "does not",
                file=sys.stderr,
            )
        kinds.check(name, uri, path)
        if uri not in by_uri:
            by_uri[uri] = _hash(uri, path)
        digests[name] = by_uri[uri]
    return digests


def check_columns(config: GenerateConfig, columns: Collection[str]) -> None:
    """Raise BadInput where the prompt file has a column that a score is to be written to."""
    for name in scores_asked(dict(config.quality)):
        if (column := SCORES[name][0]) in columns:
            raise BadInput(
                f"prompts.uri: {config.prompts.uri} has a column {column!r}, which quality.{name} "
                "writes; rename it, or leave that key out"
            )


def _hash(uri: str, path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    hashes = [(p.name, weights.sha256_of(p)) for p in files if p.is_file()]
    return hashlib.sha256(canonical_json(hashes or uri)).hexdigest()
