"""A bar for work that is counted, with the one rate that is told everywhere.

Knows neither Ray nor what is counted.
"""

import sys
import time
from typing import Any

from tqdm import tqdm

POLL_S = 0.5
LOG_EVERY_S = 10.0
SHORTEST_S = 1e-3


class Bar(tqdm):
    """A bar whose rate is that of all that was done, since work on the first of it began."""

    def __init__(self, total: int, unit: str, began: float, initial: int = 0):
        self.began = began
        """In unix seconds."""
        self.worked_s: float | None = None
        """How long it all took, once that is known."""
        # A terminal has a bar that moves; a log gets a line now and then.
        every_s = POLL_S if sys.stderr.isatty() else LOG_EVERY_S
        super().__init__(
            total=total, initial=initial, unit=f" {unit}", file=sys.stderr, mininterval=every_s
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        worked_s = time.time() - self.began if self.worked_s is None else self.worked_s
        return super().format_dict | {"elapsed": max(worked_s, SHORTEST_S), "rate": None}
