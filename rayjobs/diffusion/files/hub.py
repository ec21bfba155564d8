"""Models on the Hugging Face hub: their local copies.

Knows nothing of what is in them.
"""

import re
from pathlib import Path

from rayjobs.diffusion.files.header import first_line


def download(hub_id: str, revision: str | None, *, weights: bool = True) -> Path:
    """The local copy of a repository of the hub, with or without its weights.

    HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are the hub's own variables. Raises ValueError
    when it cannot be had.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_id):
        raise ValueError(
            f"model {hub_id!r} does not exist; give `starter`, a diffusers folder, a .safetensors "
            "file or a hub id"
        )
    try:
        return _snapshot(hub_id, revision, []) if not weights else _with_weights(hub_id, revision)
    except Exception as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise ValueError(
            f"model {hub_id!r}{at} is no local path and cannot be had from the hub: "
            f"{first_line(error)}"
        ) from error


def _with_weights(hub_id: str, revision: str | None) -> Path:
    """A pipeline, or where there is none in the repository, a UNet."""
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    pinned = {} if revision is None else {"revision": revision}
    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, **pinned))
    except LocalEntryNotFoundError:  # the hub cannot be reached
        raise
    except EntryNotFoundError:
        return _snapshot(hub_id, revision, ["diffusion_pytorch_model*.safetensors"])


def _snapshot(hub_id: str, revision: str | None, weights: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", *weights]
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
