"""Generation: images from prompts, as a job with a data set or as a step of a Ray Data program."""

from typing import Any

EXPORTED = ("ProcessorConfig", "build_processor")


def __getattr__(name: str) -> Any:
    """The processor's names load Ray, so they are imported when first used."""
    if name in EXPORTED:
        from rayjobs.generation.worker import processor

        return getattr(processor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
