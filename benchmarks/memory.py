"""The memory of this process. Imports neither torch nor Ray, which would be most of it."""

import os
import threading
import time
from pathlib import Path

POLL_S = 0.02


class Watch:
    """This process's resident memory, looked at by a thread: now, and its peak since `start`."""

    def __init__(self) -> None:
        self.start_mb = self.peak_mb = resident_mb()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, resident_mb())
            time.sleep(POLL_S)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6
