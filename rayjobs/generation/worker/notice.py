"""Notice that this machine will be taken away: its worker finishes its shards and takes no more.

Owns what is done until then. Knows neither Ray nor what a shard is: `find` asks the cluster.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

LOOK_EVERY_S = 5.0
MARGIN_S = 10.0
"""So long before the end what is not finished is dropped; another worker makes it."""


class Notice:
    """Looks from a thread. `find()` gives the seconds left, None where nothing is known."""

    def __init__(self, find: Callable[[], float | None], drop: Callable[[], None]):
        self._find, self._drop = find, drop
        self._is_given = threading.Event()
        threading.Thread(target=self._run, name="notice", daemon=True).start()

    def is_given(self) -> bool:
        return self._is_given.is_set()

    def leave(self) -> None:
        """End this process once notice is given: Ray starts another one, on another machine."""
        if self.is_given():
            self._drop()
            print("this machine will be taken away: its worker ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _run(self) -> None:
        while (left_s := self._look()) is None:
            time.sleep(LOOK_EVERY_S)
        self._is_given.set()
        until_s = time.monotonic() + left_s - MARGIN_S
        while time.monotonic() < until_s:
            time.sleep(0.5)
        self.leave()

    def _look(self) -> float | None:
        try:
            return self._find()
        except Exception:  # the head may be away, too
            return None
