"""Which calls of the UNet a row makes: with guidance or without, of all blocks or of the outermost.

Owns what `guidance_interval` and `cache_interval` mean. Knows neither torch nor how calls are made.
"""

from collections.abc import Sequence
from typing import NamedTuple

REUSE_COST = 0.3
"""Of a call of the outermost blocks, where one of all blocks costs 1: by the arithmetic of the
starter model (88 of 290 million multiplications); that of SDXL at 1024 px says 0.1."""


class Call(NamedTuple):
    """One of a row's UNet calls."""

    guided: bool = True
    reuses: bool = False
    """Takes what the deep blocks gave at an earlier call, and computes only the outermost ones."""
    keeps: bool = False
    """Computes all blocks, and the next call reuses what the deep ones give."""


def plan_calls(
    num: int,
    skipped: int = 0,
    guidance_interval: Sequence[float] | None = None,
    cache_interval: int = 1,
    left: int = 0,
) -> tuple[Call, ...]:
    """The `num` calls that a row makes of its schedule, the first ones `skipped` and the
    last ones `left`.

    Guidance is on from share to share of the whole schedule, as in diffusers' guiders. All blocks
    are computed at every n-th call, and where guidance sets in: of the text that it needs nothing
    was kept.
    """
    start, end = guidance_interval or (0.0, 1.0)
    total = skipped + num + left
    guided = range(int(start * total) - skipped, int(end * total) - skipped)
    whole, was_guided = [], False
    for n in range(num):
        is_guided = n in guided
        whole.append(n % cache_interval == 0 or (is_guided and not was_guided))
        was_guided = is_guided if whole[-1] else was_guided
    return tuple(
        Call(n in guided, not whole[n], whole[n] and n + 1 < num and not whole[n + 1])
        for n in range(num)
    )


def count_slots(calls: Sequence[Call], most: int) -> float:
    """Slots of the calls together, in such as compute all blocks; a guided one has `most`."""
    return sum((most if call.guided else 1) * (REUSE_COST if call.reuses else 1) for call in calls)


def check_guidance_interval(interval: Sequence[float] | None) -> None:
    """Raise ValueError unless it is none, or two ascending shares."""
    if interval is None:
        return
    is_pair = len(interval) == 2 and all(isinstance(share, int | float) for share in interval)
    if not is_pair or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"guidance_interval is {list(interval)!s:.60}; it must be two shares of the schedule, "
            "the smaller one first, such as [0.2, 0.8]"
        )


def check_cache_interval(interval: int) -> None:
    """Raise ValueError unless the deep blocks are computed at times."""
    if interval < 1:
        raise ValueError(f"cache_interval is {interval}; it must be at least 1, which keeps none")
