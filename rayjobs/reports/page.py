"""The report's page: its summary, its charts and the frame around the contact sheets.

Owns the HTML. Knows nothing of storage or of shards' contents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from rayjobs.reports import figures
from rayjobs.reports.history import History
from rayjobs.reports.running import Running, tell

BINS = 120
WORKER_BINS = 48
MAX_WORKERS = 30
MAX_REASONS = 30
SLOW = 0.6
"""A worker below this share of the median speed is pointed out."""


ALIKE = {
    "duplicates": ("Near-duplicates", "groups of near-duplicates", "have a near-duplicate"),
    "semantic": ("The same shown", "groups that show the same", "show the same as another"),
}
"""What tables of groups are called, by name: as a heading, on a tile, and of images in them."""


@dataclass(frozen=True)
class Facts:
    """What a page shows beside the manifest's history."""

    title: str
    recipe: str
    expected: tuple[int, int] | None
    """Images and shards of the whole job, where known."""
    shown: int
    flagged: int
    """Blank or warned of, among those shown."""
    reasons: Sequence[Mapping[str, Any]]
    """Failures by reason, the most frequent first: text, count, examples."""
    num_reasons_read: int
    """Failed images whose reason was read."""
    alike: Mapping[str, tuple[int, int]]
    """Groups of near-duplicates and the images in them by their table, where they were sought."""
    unreadable: Sequence[str]
    """What could not be read, and why."""
    made_by: Mapping[str, str]
    """The model, the machine and the like, by name."""
    running: Running | None = None
    """The job that makes it, unless that has ended as it should."""


def render(history: History, facts: Facts, data: str) -> str:
    """The whole page; `data` is the JSON that its script works from."""
    here = files("rayjobs.reports")
    parts = {name: (here / f"page.{name}").read_text() for name in ("html", "css", "js")}
    summary = tell(facts.running) + _tiles(history, facts) + _look(history, facts)
    alike = (_duplicates(facts, name) for name in ALIKE)
    work = (*alike, _reasons(history, facts), _speed(history), _workers(history))
    return Template(parts["html"]).substitute(
        title=escape(facts.title),
        recipe=escape(facts.recipe),
        summary=summary,
        work="\n".join(work),
        made_by=_made_by(history, facts),
        shown=escape(_what_is_shown(history, facts)),
        data=data,
        style=parts["css"],
        script=parts["js"],
    )


def _tiles(history: History, facts: Facts) -> str:
    images, failed, shards = history.total("rows"), history.total("failed"), len(history)
    tiles = [(f"{images:,}", "images finished" if _is_partial(history, facts) else "images", "")]
    tiles.append(
        (f"{failed:,}", f"failed ({figures.percent(failed, images)})", "bad" if failed else "good")
    )
    of = f" of {facts.expected[1]:,}" if facts.expected else ""
    bar = (
        f'<progress max="{facts.expected[1]}" value="{shards}"></progress>'
        if facts.expected
        else ""
    )
    tiles.append((f"{shards:,}{of}", f"shards{bar}", ""))
    if history.active_s:
        tiles.append((figures.rate(history.rate), "images/s", ""))
        tiles.append((figures.duration(history.active_s), "of making images", ""))
        if history.pauses:
            paused_s = sum(until - since for since, until in history.pauses)
            pauses = figures.count(len(history.pauses), "pause")
            tiles.append((figures.duration(paused_s), f"in {pauses}, not counted", ""))
    tiles.append((figures.size(history.total("bytes")), "in all", ""))
    for name, (_, label, _) in ALIKE.items():
        if name in facts.alike:
            groups, _ = facts.alike[name]
            tiles.append((f"{groups:,}", label, "bad" if groups else ""))
    cells = (
        f'<div class="{kind}"><b>{value}</b><span>{label}</span></div>'
        for value, label, kind in tiles
    )
    return f'<section class="tiles" aria-label="Counts">{"".join(cells)}</section>'


def _made_by(history: History, facts: Facts) -> str:
    """What made the pictures, and what that cost."""
    terms = dict(facts.made_by)
    if history.active_s:
        workers = figures.count(len(history.busy_s), "worker")
        hours = float(history.busy_s.sum()) / 3600
        terms["Cost"] = f"{hours:,.3g} device-hours: the time of {workers}, one device each"
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in terms.items()
    )
    return f'<h2>Made by</h2><dl class="made">{items}</dl>' if items else ""


def _look(history: History, facts: Facts) -> str:
    """What a person should look at before calling the data set good."""
    points = []
    if facts.expected and _is_partial(history, facts) and facts.running is None:
        missing = facts.expected[1] - len(history)
        points.append(f"{missing:,} of {facts.expected[1]:,} shards are not finished yet.")
    if history.num_class_changed:
        points.append(
            f"{history.num_class_changed:,} shards are of workers of another determinism class."
        )
    if facts.flagged:
        points.append(
            f"{facts.flagged:,} of the {facts.shown:,} images below are blank or have a warning."
        )
    for name, (_, _, point) in ALIKE.items():
        if images := facts.alike.get(name, (0, 0))[1]:
            points.append(f"{images:,} images {point}.")
    slow = _slow(history)
    if slow:
        points.append(f"{slow:,} workers had less than {SLOW:.0%} of the median worker's speed.")
    points += facts.unreadable[:5]
    if len(facts.unreadable) > 5:
        points.append(f"{len(facts.unreadable) - 5:,} more shards cannot be read.")
    if not points:
        return ""
    items = "".join(f"<li>{escape(point)}</li>" for point in points)
    return f'<h2>To look at</h2><ul class="look">{items}</ul>'


def _speed(history: History) -> str:
    if history.span is None:
        return ""
    speed, failures = history.speed(BINS), history.failures(BINS)
    first, last = map(figures.moment, history.span)
    ends = f"<span>{first}</span><span>{last} UTC</span>"
    note = "images/s"
    note += f"; in red {history.total('failed'):,} failures" if failures.any() else ""
    note += "; grey where nothing was made" if history.pauses else ""
    top = float(speed.max() or 1)
    scale = "".join(f"<span>{figures.number(value)}</span>" for value in (top, top / 2, 0))
    label = f"images per second over time, at most {figures.number(top)}"
    return (
        '<h2>Speed and failures over time</h2><figure class="chart">'
        f'<div class="plot"><div class="scale" aria-hidden="true">{scale}</div>'
        f"{_chart(speed, failures, label, pauses=_pauses(history))}</div>"
        f"<figcaption>{ends}</figcaption><figcaption>{note}</figcaption></figure>"
    )


def _pauses(history: History) -> str:
    """Each pause as a part of the chart's width."""
    assert history.span is not None
    first, per_s = history.span[0], BINS / (history.span[1] - history.span[0])
    return "".join(
        f"M{(since - first) * per_s:.2f} 0h{(until - since) * per_s:.2f}V100"
        f"h{(since - until) * per_s:.2f}z"
        for since, until in history.pauses
    )


def _chart(
    speed: np.ndarray,
    failures: np.ndarray,
    label: str,
    top: float | None = None,
    pauses: str = "",
) -> str:
    """Bars without gaps, one for each part of the time, as one path; failures hang from the top."""
    height, high = 100, float(top or speed.max() or 1)
    steps = [f"V{height - height * min(value / high, 1) * 0.92:.1f}h1" for value in speed]
    highest = float(failures.max()) or 1.0
    drops = [f"V{(6 + 24 * count / highest) * (count > 0):.1f}h1" for count in failures]
    return (
        f'<svg viewBox="0 0 {len(speed)} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><path class="pauses" d="{pauses}"/>'
        f'<path class="half" d="M0 54h{len(speed)}"/>'
        f'<path class="speed" d="M0 {height}{"".join(steps)}V{height}z"/>'
        f'<path class="failures" d="M0 0{"".join(drops)}V0z"/></svg>'
    )


def _reasons(history: History, facts: Facts) -> str:
    failed = history.total("failed")
    if not failed:
        return ""
    blocks = [_reason(reason) for reason in facts.reasons[:MAX_REASONS]]
    rest = len(facts.reasons) - MAX_REASONS
    if rest > 0:
        blocks.append(f'<p class="quiet">{rest:,} rarer reasons are left out.</p>')
    read = facts.num_reasons_read
    some = (
        f" of {read:,} of the {failed:,} failures, from shards spread evenly"
        if read < failed
        else ""
    )
    head = f"<h2>Why images failed</h2><p class='quiet'>Reasons{some}, by frequency.</p>"
    return head + "".join(blocks)


def _reason(reason: Mapping[str, Any]) -> str:
    items = []
    for example in reason["examples"]:
        text = f"record {example['record']}, seed {example['seed']}: {example['prompt'][:120]}"
        where = f'<a href="{escape(example["file"])}">{escape(example["file"])}</a>'
        if example.get("page"):
            link = f"#page={example['page']}&amp;record={example['record']}"
            where = f'<a href="{link}">shown below</a>, {where}'
        items.append(f"<li>{escape(text)} ({where})</li>")
    return (
        f'<details class="reason"><summary><b>{reason["count"]:,}</b> {escape(reason["text"])}'
        f"</summary><ul>{''.join(items)}</ul></details>"
    )


def _workers(history: History) -> str:
    """A table of workers, on one scale of time and speed."""
    if history.span is None or not len(history):
        return ""
    workers = history.workers()
    drawn = [(one, history.of_worker(one["number"])) for one in workers[:MAX_WORKERS]]
    speeds = [history.speed(WORKER_BINS, where) for _, where in drawn]
    top = max(float(speed.max()) for speed in speeds)
    lines = []
    for (one, where), speed in zip(drawn, speeds, strict=True):
        failures = history.failures(WORKER_BINS, where)
        chart = _chart(speed, failures, f"speed of worker {escape(one['worker'])} over time", top)
        bad = ' class="bad"' if one["failed"] else ""
        lines.append(
            f"<tr><td>{escape(one['worker'])}</td><td>{escape(one['node'])}</td>"
            f"<td>{one['shards']:,}</td><td>{one['images']:,}</td><td{bad}>{one['failed']:,}</td>"
            f"<td>{figures.rate(one['images_per_s'])}</td><td>{chart}</td></tr>"
        )
    rest = len(workers) - len(drawn)
    more = (
        f'<p class="quiet">and {rest:,} more, with fewer failures and faster</p>'
        if rest > 0
        else ""
    )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("worker", "node", "shards", "images", "failed", "images/s", "over time")
    )
    return (
        f"<details{' open' if len(workers) <= 8 else ''}><summary><h2>Workers</h2> "
        f"({len(workers):,})</summary>"
        "<p class='quiet'>Those with failures first, then the slowest.</p>"
        f"<div class='scroll'><table class='facts'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{more}</details>"
    )


def _duplicates(facts: Facts, name: str) -> str:
    groups, images = facts.alike.get(name, (0, 0))
    if not groups:
        return ""
    return (
        f"<h2>{ALIKE[name][0]}</h2><p class='quiet'>{images:,} images in {groups:,} groups, listed "
        f"in <a href='{name}.parquet'>{name}.parquet</a>; the largest groups:</p>"
        f"<div id='{name}'></div>"
    )


def _what_is_shown(history: History, facts: Facts) -> str:
    total = history.total("rows")
    if facts.shown >= total:
        return f"All {total:,} images are shown."
    return (
        f"A sample: {facts.shown:,} of {total:,} images ({figures.percent(facts.shown, total)}), "
        "from shards spread evenly over the data set."
    )


def _is_partial(history: History, facts: Facts) -> bool:
    return facts.expected is not None and len(history) < facts.expected[1]


def _slow(history: History) -> int:
    speeds = [one["images_per_s"] for one in history.workers()] if history.span else []
    return sum(speed < SLOW * float(np.median(speeds)) for speed in speeds)
