"""A page that is written again while its job goes, at a bounded cost.

Owns when. Knows nothing of what is on the page.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Self

from rayjobs import storage
from rayjobs.config import BadInput

POLL_S = 0.5
FIRST_S, SHORTEST_S, LONGEST_S = 5.0, 10.0, 300.0
"""Between two looks while there is nothing to show, and between two pages: as long as there has
been one, within these."""
MAX_SHARE = 0.02
"""Of the time that may be spent on pages."""


class Rewriter:
    """A context in which `write` is called now and then by a thread.

    It is given the unix seconds at which the page will be written again at the latest, and says
    whether there was anything to write. After an interruption or a failure, but not after success,
    it is called once more, with None. A page is no reason for a job to fail: storage that is away,
    and errors of the kinds `passed_over`, are passed over.
    """

    def __init__(
        self,
        write: Callable[[float | None], bool],
        passed_over: tuple[type[Exception], ...] = (),
    ):
        self._page = write
        self._passed_over = (storage.StorageError, *passed_over)
        self._first: float | None = None
        """When there was a page."""
        self._next = time.monotonic() + FIRST_S
        self._cost_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stop.set()
        self._thread.join()
        # Who is told of bad input may have no business in this folder.
        if error is not None and not isinstance(error, BadInput):
            self._write(None)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            if time.monotonic() >= self._next:
                self._write(self._wait_s())

    def _wait_s(self) -> float:
        so_far_s = 0.0 if self._first is None else time.monotonic() - self._first
        return max(min(max(so_far_s, SHORTEST_S), LONGEST_S), self._cost_s / MAX_SHARE)

    def _write(self, wait_s: float | None) -> None:
        started = time.monotonic()
        margin_s = 2 * (self._cost_s + POLL_S)
        is_written = False
        with contextlib.suppress(*self._passed_over):
            is_written = self._page(None if wait_s is None else time.time() + wait_s + margin_s)
        ended = time.monotonic()
        self._cost_s = ended - started
        if is_written and self._first is None:
            self._first = ended
        pause_s = FIRST_S if self._first is None else wait_s or 0.0
        self._next = max(started + pause_s, ended + self._cost_s / MAX_SHARE)
