"""Image diffusion jobs on Ray.

The names below are the library's door. They load torch or Ray, so each is looked up when it is
first asked for: `import rayjobs` loads neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayjobs.diffusion.engine import Engine
    from rayjobs.diffusion.model import load_model
    from rayjobs.diffusion.request import Request
    from rayjobs.generation import build_processor

__all__ = ["Engine", "Request", "build_processor", "load_model"]

HOMES = {
    "Engine": "rayjobs.diffusion.engine",
    "Request": "rayjobs.diffusion.request",
    "load_model": "rayjobs.diffusion.model",
    "build_processor": "rayjobs.generation",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
