"""What was compiled in one process, as bytes for another one.

Owns what torch gives for this and what it is for. Knows nothing of where it is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from rayjobs.diffusion.modules import onednn

if TYPE_CHECKING:
    from rayjobs.diffusion.model import Model

LIBRARIES = ("torch", "diffusers")


def identify(model: Model, sizes: Iterable[tuple[int | None, int | None]]) -> str:
    """Stands for all that decides the code of a model that is warm for pictures of these sizes.

    Weights do not: models of one architecture share it.
    """
    facts: dict[str, Any] = {name: importlib.metadata.version(name) for name in LIBRARIES}
    facts |= {
        "card": _card(model.device),
        "options": asdict(model.options),
        "dtypes": [str(model.dtype), str(model.vae.dtype)],
        "parts": [
            {key: repr(value) for key, value in part.config.items() if key[0] != "_"}
            for part in (model.unet, model.vae)
        ],
        "sizes": sorted(map(repr, sizes)),
        "deterministic": torch._inductor.config.deterministic,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def take(data: bytes) -> None:
    """Use what another process gave. It is code: of unknown origin it must not come here.

    Raises RuntimeError for what is none.
    """
    try:
        found = torch.compiler.load_cache_artifacts(data)
    except Exception as error:  # torch says no more of it
        raise RuntimeError(f"it cannot be read: {error!r}") from error
    if found is None:
        raise RuntimeError("it cannot be read")


def give() -> bytes | None:
    """What this process has compiled, and used of what it took; None where that is nothing."""
    made = torch.compiler.save_cache_artifacts()
    return None if made is None else made[0]


def _card(device: str) -> str:
    if device.startswith("cuda"):
        capability = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} {capability} {torch.version.cuda}"
    return f"{onednn.cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}"
