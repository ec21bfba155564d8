"""Progress while a job runs: images done by all workers, their rate and the time left.

Owns the counter that workers report to and the bar that the driver shows.
"""

import sys
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

POLL_S = 0.5
LOG_EVERY_S = 10.0


class Counter:
    """Images and failures so far. An actor, so that workers anywhere can report to it."""

    def __init__(self) -> None:
        self.images = 0
        self.failed = 0

    def add(self, images: int, failed: int) -> None:
        self.images += images
        self.failed += failed

    def read(self) -> tuple[int, int]:
        return self.images, self.failed


class Progress:
    """A context in which a bar follows `counter`; it shows images/s and an estimate of the rest."""

    def __init__(self, total: int):
        self.total = total
        # Without CPUs of its own it can always be placed, and here no other node's end ends it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(Counter).options(num_cpus=0, scheduling_strategy=here)
        self.counter: Any = actor.remote()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Progress":
        print(f"{self.total:,} images to make; starting workers", file=sys.stderr, flush=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        # Counted from the first image, so that the workers' start is not taken for slowness.
        while not self._read()[0] and not self._stop.wait(POLL_S):
            pass
        # A terminal has a bar that moves; a log gets a line now and then.
        every_s = POLL_S if sys.stderr.isatty() else LOG_EVERY_S
        with tqdm(
            total=self.total, unit=" images", file=sys.stderr, smoothing=0.1, mininterval=every_s
        ) as bar:
            while not self._stop.wait(POLL_S):
                self._show(bar)
            self._show(bar)

    def _show(self, bar: tqdm) -> None:
        images, failed = self._read()
        if failed:
            bar.set_postfix(failed=failed, refresh=False)
        new = min(images, self.total) - int(bar.n)
        if new > 0:
            bar.update(new)

    def _read(self) -> tuple[int, int]:
        try:
            counts: tuple[int, int] = ray.get(self.counter.read.remote(), timeout=4 * POLL_S)
        except Exception:  # the bar is no reason for a job to fail
            return 0, 0
        return counts
