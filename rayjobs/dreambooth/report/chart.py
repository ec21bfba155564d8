"""The loss by step, as a chart with a scale.

Owns the drawing. Knows nothing of what was trained.
"""

import math
from collections.abc import Sequence

CURVE_POINTS = 400
SMOOTHED_OVER = 0.05
"""Share of the run that the bold curve averages over."""
FEWEST = 10
"""Steps that it averages over in a run that is long enough."""
HEADROOM = 1.3
"""How far the scale goes beyond the averages; single steps above it are cut off."""
WIDTH, HEIGHT = 1000.0, 200.0


def draw(losses: Sequence[float], measured: Sequence[tuple[int, float]] = ()) -> str:
    """The training loss of steps 1, 2, ..., and the losses `measured` at fixed noise, by step."""
    if len(losses) < 2:
        return '<p class="quiet">The curve begins with the second step of a checkpoint.</p>'
    window = max(int(len(losses) * SMOOTHED_OVER), min(FEWEST, len(losses) // 2), 1)
    smooth = _means(losses, window)
    top = _round(max([*smooth, *(loss for _, loss in measured)]) * HEADROOM)
    steps = range(1, len(losses) + 1)
    paths = f'<path class="each" d="{_path(steps, losses, top, len(losses))}"/>'
    paths += f'<path d="{_path(steps, smooth, top, len(losses))}"/>'
    key = f'<span class="each">each step</span><span>mean of {window:,} steps</span>'
    if measured:
        at, values = zip(*measured, strict=True)
        paths += f'<path class="fixed" d="{_path(at, values, top, len(losses))}"/>'
        key += '<span class="fixed">held-out pictures at fixed noise</span>'
    scale = "".join(f"<span>{_number(share * top)}</span>" for share in (1, 0.75, 0.5, 0.25, 0))
    ends = sorted({1, round(len(losses) / 4), len(losses) // 2, 3 * len(losses) // 4, len(losses)})
    below = "".join(f"<span>{step:,}</span>" for step in ends if step)
    lines = "".join(f"M0 {HEIGHT * share:.0f}H{WIDTH:.0f}" for share in (0.25, 0.5, 0.75))
    label = f"loss by step: {losses[0]:.4f} at step 1, {smooth[-1]:.4f} as the mean of the last"
    return (
        f'<figure class="chart"><p class="key">{key}</p><div class="plot">'
        f'<div class="scale">{scale}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><path class="lines" d="{lines}"/>{paths}</svg>'
        f'<div class="ends">{below}</div></div>'
        f"<figcaption>Loss by step, lower is better; the mean of the last {window:,} is "
        f"{smooth[-1]:.4f}.</figcaption></figure>"
    )


def _means(losses: Sequence[float], window: int) -> list[float]:
    """Of each step and those before it, as many as the window has."""
    total, means = 0.0, []
    for i, loss in enumerate(losses):
        total += loss - (losses[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def _path(steps: Sequence[int], values: Sequence[float], top: float, last: int) -> str:
    every = max(1, len(values) // CURVE_POINTS)
    shown = [*range(0, len(values), every)]
    if shown[-1] != len(values) - 1:
        shown.append(len(values) - 1)
    points = [
        f"{WIDTH * (steps[i] - 1) / (last - 1):.1f},"
        f"{HEIGHT - HEIGHT * min(1.0, max(0.0, values[i]) / top):.1f}"
        for i in shown
    ]
    return "M" + " L".join(points)


def _round(top: float) -> float:
    """The least number that is no less and whose quarters read well."""
    if top <= 0:
        return 1.0
    whole = 10.0 ** math.floor(math.log10(top / 4))
    return float(
        next(4 * whole * part for part in (1, 2, 2.5, 5, 10, 20) if 4 * whole * part >= top)
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "0"
