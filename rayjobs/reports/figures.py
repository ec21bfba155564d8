"""Numbers as people read them: the same on every page, card, bar and line.

Owns their rounding and units.
"""

import datetime as dt


def rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 1000 else f"{per_s:.2f}" if per_s >= 1 else f"{per_s:.3g}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.0%}" if share in (0.0, 1.0) else f"{share:.2%}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{number(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{number(num_bytes)} TB"


def duration(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return (
        f"{hours:.1f} h"
        if hours >= 2
        else f"{minutes:.1f} min"
        if minutes >= 2
        else f"{seconds:.1f} s"
    )


def moment(unix_s: float) -> str:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
