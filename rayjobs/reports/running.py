"""How a job goes, as its page says it until it has ended as it should.

Owns the sentence. Knows nothing of what is made.
"""

from dataclasses import dataclass

from rayjobs.reports import figures

MARK = '<p class="now">'


@dataclass(frozen=True)
class Running:
    """How far a run of the job was when the page was written, which is `at` in unix seconds."""

    at: float
    again_by: float | None
    """When it will be written again at the latest; None after an interruption."""
    made: int
    """Of this run."""
    to_make: int
    rate: float
    """Of this run, by the second; 0 while nobody knows it."""
    unit: str
    """What is made: images, steps."""


def tell(running: Running | None) -> str:
    """A paragraph, empty without a job; a page that nobody writes again gives itself away."""
    if running is None:
        return ""
    of = f"{running.made:,} of {running.to_make:,} {running.unit} of this run"
    of = of if running.to_make else "what was missing is made"
    at = f"at {figures.moment(running.at)} UTC"
    if running.again_by is None:
        return _paragraph("Interrupted", f"{at}, after {of}. The same command continues.")
    pace = ""
    if running.rate:
        left = figures.duration((running.to_make - running.made) / running.rate)
        pace = f", {figures.rate(running.rate)} {running.unit}/s, {left} left"
    return _paragraph(
        "In progress",
        f"{at}: {of}{pace}. This page is written again by {figures.moment(running.again_by)[11:]}; "
        "one that is much older is of a job that was cut off, and the same command continues it.",
    )


def is_running(page: str) -> bool:
    """Whether a page says that its job goes on, or was interrupted."""
    return MARK in page


def _paragraph(state: str, rest: str) -> str:
    return f"{MARK}<b>{state}</b> {rest}</p>"
