"""Time on the device and time on the host, told apart.

Owns events and medians. On a CPU both are the clock's.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(
    work: Callable[[], Any], device: str, *, repeats: int = 6, warm_up: int = 2
) -> dict[str, float]:
    """Median milliseconds of a call: until the device is done, and until the host may go on.

    Each call starts with an empty queue, so that a host which is slower than the device shows.
    """
    for _ in range(warm_up):
        work()
    synchronize(device)
    total_ms, host_ms = [], []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        host_ms.append(1000 * (time.perf_counter() - started_s))
        synchronize(device)
        total_ms.append(1000 * (time.perf_counter() - started_s))
    return {"ms": statistics.median(total_ms), "host_ms": statistics.median(host_ms)}


def queued_ms(work: Callable[[], Any], device: str, repeats: int = 6) -> float:
    """Milliseconds of a call in a row of them, as an engine makes them: the slower of the two."""
    work()
    synchronize(device)
    started_s = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return 1000 * (time.perf_counter() - started_s) / repeats


def matmul_tflops(device: str, side: int) -> float:
    """What this chip makes of a square bfloat16 product on random numbers."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = measure(lambda: a @ b, device, repeats=10, warm_up=3)
    return 2 * side**3 / found["ms"] / 1e9
