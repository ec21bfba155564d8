"""The run's page: before and after, the class, the curves. It opens from disk and from S3.

Owns what the page shows. What was drawn and measured is `results`'; the page makes no pictures but
small copies of the subject's photographs.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import yaml

from rayjobs import storage
from rayjobs.dreambooth import results
from rayjobs.dreambooth.config import DreamBoothConfig, ValidationConfig
from rayjobs.dreambooth.data.photos import Photo
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.results import Result

MAX_PHOTOS = 24
NO_PICTURES = (
    '<p class="quiet">No pictures were made: validation.every_n_steps was 0. The same command with '
    "it set makes them of the checkpoints that are left.</p>"
)
ABOUT_METRICS = (
    "Likenesses and preservation are cosines or shares; 1 is the same. Preservation is how much "
    "pictures of the class without the identifier look like the subject; diversity is how much "
    "they differ from each other. The joint score counts from the untrained model (step 0). "
    "Measured on {of_subject} pictures of each prompt and {of_class} of the class, with seeds 0, "
    "1, ... and {steps} steps; `rayjobs evaluate` with these numbers gives these values."
)
MAX_SKIPPED = 100
PHOTO_HEIGHT = 160
CURVE_POINTS = 400
SMOOTHED_OVER = 0.05
"""Share of the run that the bold curve averages over."""


def write(run: ResolvedRun) -> str:
    """Write index.html in the run's folder; return its URI."""
    config = run.config
    validated = results.read(config.output.uri)
    rows = _metrics(config.output.uri)
    page = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    filled = page.substitute(
        title=html.escape(f"DreamBooth: {config.run.name}"),
        subtitle=html.escape(f"{config.instance.prompt} · {config.model.uri}"),
        tiles=_tiles(config, rows, validated),
        photos=_photos([photo for subject in run.subjects for photo in subject.photos]),
        skipped=_skipped(run.skipped),
        pictures=_pictures(validated) or NO_PICTURES,
        curve=_curve([row["loss"] for row in rows]),
        table=_table(validated, config.validation),
        settings=html.escape(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)),
    )
    storage.write_bytes(page_uri(run), filled.encode())
    return page_uri(run)


def page_uri(run: ResolvedRun) -> str:
    return storage.join(run.config.output.uri, "index.html")


def _metrics(output_uri: str) -> list[dict[str, float]]:
    uri = storage.join(output_uri, results.METRICS)
    if not storage.exists(uri):
        return []
    return [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]


def _tiles(config: DreamBoothConfig, rows: list[dict[str, float]], validated: list[Result]) -> str:
    facts = [
        (f"{len(rows):,}", f"of {config.train.steps:,} steps"),
        (config.train.method, f"{config.prior.mode} for the class"),
    ]
    best = results.best_step(validated)
    chosen = next((result for result in validated if result.step == best), None)
    if chosen is not None:
        facts.append((f"{best:,}", "exported: the best checkpoint"))
        facts += [
            (f"{value:.3f}", results.with_scale(name)) for name, value in chosen.metrics.items()
        ]
    return "".join(
        f"<div><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>" for b, s in facts
    )


def _photos(photos: Sequence[Photo]) -> str:
    images = []
    for photo in photos[:MAX_PHOTOS]:
        image = photo.open()
        image.thumbnail((4 * PHOTO_HEIGHT, PHOTO_HEIGHT))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        data = base64.b64encode(buffer.getvalue()).decode()
        name = html.escape(photo.name, quote=True)
        images.append(f'<img src="data:image/jpeg;base64,{data}" alt="{name}">')
    return "".join(images)


def _skipped(skipped: dict[str, str]) -> str:
    """What lay beside the photographs and was passed over, and why."""
    if not skipped:
        return ""
    told = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:MAX_SKIPPED])
    more = f" and {len(skipped) - MAX_SKIPPED:,} more" if len(skipped) > MAX_SKIPPED else ""
    return f'<p class="quiet">Passed over: {html.escape(told)}{more}</p>'


def _pictures(validated: list[Result]) -> str:
    """Each prompt's grids, one below the other, as training went on."""
    prompts = dict.fromkeys(prompt for result in validated for prompt in result.grids)
    parts = []
    for prompt in prompts:
        parts.append(f"<h2>{html.escape(prompt)}</h2>")
        for result in validated:
            if prompt in result.grids:
                when = f"after step {result.step:,}" if result.step else "before"
                source = html.escape(f"validation/{result.grids[prompt]}", quote=True)
                parts.append(
                    f'<figure><img src="{source}" alt="{html.escape(prompt, quote=True)}, {when}" '
                    f'loading="lazy"><figcaption>{when}</figcaption></figure>'
                )
    return "".join(parts)


def _curve(losses: list[float]) -> str:
    if len(losses) < 2:
        return '<p class="quiet">no steps yet</p>'
    width = max(1, int(len(losses) * SMOOTHED_OVER))
    smooth = [
        sum(losses[max(0, i - width) : i + 1]) / len(losses[max(0, i - width) : i + 1])
        for i in range(len(losses))
    ]
    top = max(smooth) * 1.3
    paths = f'<path class="each" d="{_path(losses, top)}"/><path d="{_path(smooth, top)}"/>'
    return (
        f'<svg viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" '
        f'aria-label="loss by step">{paths}</svg><p class="ends"><span>step 1: {losses[0]:.4f}'
        f"</span><span>mean of the last {width}: {smooth[-1]:.4f}</span></p>"
    )


def _path(values: list[float], top: float) -> str:
    every = max(1, len(values) // CURVE_POINTS)
    points = [
        f"{1000 * i / (len(values) - 1):.1f},{200 - 200 * min(1.0, values[i] / top):.1f}"
        for i in range(0, len(values), every)
    ]
    return "M" + " L".join(points)


def _table(validated: list[Result], settings: ValidationConfig) -> str:
    names = list(dict.fromkeys(name for result in validated for name in result.metrics))
    if not names:
        return ""
    best = results.best_step(validated)
    about = ABOUT_METRICS.format(
        of_subject=settings.num_images, of_class=settings.num_class_images, steps=settings.steps
    )
    score_name = results.with_scale("joint_score")
    head = "".join(f"<th>{results.with_scale(name)}</th>" for name in names)
    body = ""
    for result in validated:
        cells = "".join(f"<td>{result.metrics.get(name, float('nan')):.3f}</td>" for name in names)
        mark = ' class="best"' if result.step == best else ""
        score = "" if result.score is None else f"{result.score:.3f}"
        body += f"<tr{mark}><td>{result.step:,}</td>{cells}<td>{score}</td></tr>"
    return (
        f'<h2>Metrics</h2><p class="quiet">{about}</p><div class="scroll"><table>'
        f"<tr><th>step</th>{head}<th>{score_name}</th></tr>{body}</table></div>"
    )
