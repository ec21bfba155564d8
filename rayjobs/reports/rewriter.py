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
"""Before the first page, and between two: as long as the job has run so far, within these."""
MAX_SHARE = 0.02
"""Of the time that may be spent on pages."""


class Rewriter:
    """A context in which `write` is called now and then by a thread.

    It is given the unix seconds at which the page will be written again at the latest. After an
    interruption or a failure, but not after success, it is called once more, with None. A page is
    no reason for a job to fail: storage that is away, and errors of the kinds `passed_over`, are.
    """

    def __init__(
        self,
        write: Callable[[float | None], None],
        passed_over: tuple[type[Exception], ...] = (),
    ):
        self._page = write
        self._passed_over = (storage.StorageError, *passed_over)
        self._began = time.monotonic()
        self._next = self._began + FIRST_S
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
        so_far_s = time.monotonic() - self._began
        return max(min(max(so_far_s, SHORTEST_S), LONGEST_S), self._cost_s / MAX_SHARE)

    def _write(self, wait_s: float | None) -> None:
        started = time.monotonic()
        margin_s = 2 * (self._cost_s + POLL_S)
        with contextlib.suppress(*self._passed_over):
            self._page(None if wait_s is None else time.time() + wait_s + margin_s)
        ended = time.monotonic()
        self._cost_s = ended - started
        self._next = max(started + (wait_s or 0.0), ended + self._cost_s / MAX_SHARE)
