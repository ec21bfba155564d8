"""What a GPU's twin counts: launches, waits and uploads, and the lines that caused them.

Knows nothing of tensors.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType

OURS = ("/rayjobs/", "/serve/", "/benchmarks/")
THEIRS = ("/diffusers/", "/transformers/", "/torchsde/", "/peft/")


@dataclass(frozen=True)
class Wait:
    """Why the host waited, on which line, and in which thread."""

    what: str
    where: str
    thread: str


@dataclass
class Counts:
    launches: Counter[str] = field(default_factory=Counter)
    """Operators on the device, by name."""
    waits: list[Wait] = field(default_factory=list)
    uploads: int = 0
    """Copies to the device that did not wait."""
    downloaded: int = 0
    """Bytes of copies to the host."""

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    def add(self, other: "Counts") -> None:
        self.launches.update(other.launches)
        self.waits += other.waits
        self.uploads += other.uploads
        self.downloaded += other.downloaded

    def in_thread(self, name: str = "MainThread") -> list[Wait]:
        return [wait for wait in self.waits if wait.thread.startswith(name)]


def where() -> str:
    """The nearest line of this project's, and that of a library's below it."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        line = f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if any(part in name for part in THEIRS) and not lines:
            lines.append(line)
        elif any(part in name for part in OURS) and "site-packages" not in name:
            lines.append(line)
            break
        frame = frame.f_back
    return " < ".join(lines)
