"""The run's page: before and after, the class, the curves, how to use it, from disk or from S3.

Owns what the page shows. What was drawn and measured is `results`'; the page makes no pictures but
small copies of the subject's photographs.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import yaml

from rayjobs import storage
from rayjobs.dreambooth import results
from rayjobs.dreambooth.config import DreamBoothConfig, ValidationConfig
from rayjobs.dreambooth.data.photos import Photo
from rayjobs.dreambooth.report import chart, use
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.results import Result
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from rayjobs.reports import figures
from rayjobs.reports.running import Running, is_running, tell

MAX_PHOTOS = 24
NO_VALIDATION = (
    '<p class="quiet">Of the export alone: validation.every_n_steps was 0. The same command with '
    "it set makes pictures of the checkpoints that are left.</p>"
)
NO_PICTURES = '<p class="quiet">No pictures were made yet.</p>'
ABOUT_METRICS = (
    "Likenesses and preservation are cosines or shares; 1 is the same. Preservation is how much "
    "pictures of the class without the identifier look like the subject; diversity is how much "
    "they differ from each other. The joint score counts from the untrained model (step 0). "
    "Measured on {of_subject} pictures of each prompt and {of_class} of the class, with seeds 0, "
    "1, ... and {steps}; `rayjobs evaluate` with these numbers gives these values."
)
MAX_SKIPPED = 100
PHOTO_HEIGHT = 256


def write(
    run: ResolvedRun, running: Running | None = None, work: Mapping[str, str] | None = None
) -> str:
    """Write index.html in the run's folder; return its URI.

    `running` is how the run goes, unless it has ended; `work` is how it was done, by name.
    """
    config = run.config
    validated = results.read(config.output.uri)
    rows = _metrics(config.output.uri)
    export = exports.read(run.export_uri) if running is None else None
    measured = [
        (int(row["step"]), row["validation_loss"]) for row in rows if "validation_loss" in row
    ]
    page = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    filled = page.substitute(
        title=html.escape(f"DreamBooth: {config.run.name}"),
        subtitle=html.escape(f"{config.instance.prompt} · {config.model.uri}"),
        running=tell(running),
        tiles=_tiles(config, rows, validated, export),
        photos=_photos([photo for subject in run.subjects for photo in subject.photos]),
        skipped=_skipped(run.skipped),
        pictures=_pictures(validated) or _only_picture(run, export),
        use=_use(run, export),
        curve=chart.draw([row["loss"] for row in rows], measured),
        table=_table(validated, config.validation),
        facts=_facts(run, export, work or {}),
        settings=html.escape(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)),
    )
    storage.write_bytes(page_uri(run), filled.encode())
    return page_uri(run)


def page_uri(run: ResolvedRun) -> str:
    return storage.join(run.config.output.uri, "index.html")


def is_written(run: ResolvedRun) -> bool:
    """Whether the page is there, and tells of the run's end."""
    try:
        return not is_running(storage.read_bytes(page_uri(run)).decode())
    except storage.NotThere:
        return False


def _metrics(output_uri: str) -> list[dict[str, float]]:
    uri = storage.join(output_uri, results.METRICS)
    if not storage.exists(uri):
        return []
    return [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]


def _tiles(
    config: DreamBoothConfig,
    rows: list[dict[str, float]],
    validated: list[Result],
    export: ExportNote | None,
) -> str:
    tiles = [(f"{len(rows):,}", f"of {config.train.steps:,} steps")]
    best = results.best_step(validated)
    if export is not None:
        why = "the best checkpoint" if export.step == best else "the checkpoint of that step"
        tiles.append((f"step {export.step:,}", f"exported: {why}"))
    shown = best if export is None else export.step
    chosen = next((result for result in validated if result.step == shown), None)
    for name, value in chosen.metrics.items() if chosen is not None else ():
        tiles.append((f"{value:.3f}", results.with_scale(name)))
    return "".join(
        f"<div><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>" for b, s in tiles
    )


def _facts(run: ResolvedRun, export: ExportNote | None, work: Mapping[str, str]) -> str:
    """What was trained, on what and how, each by its name."""
    config, train = run.config, run.config.train
    photos = sum(len(subject.photos) for subject in run.subjects)
    facts = {
        "Model": config.model.uri,
        "its SHA-256": run.model_sha256,
        "Trained": _method(config),
        "Subject": f"{figures.count(photos, 'photograph')} of “{config.instance.prompt}”",
        "The class": _class(run),
        "Each step": f"{figures.count(train.global_batch_size, 'picture')}, learning rate "
        f"{train.learning_rate:g}",
        **work,
        "Export": run.export_uri if export is not None else "",
    }
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
        if value
    )
    return f"<dl>{items}</dl>"


def _method(config: DreamBoothConfig) -> str:
    if config.export_kind == "words":
        return f"the word {config.identifier} alone, as {config.inversion.num_vectors} tokens"
    encoders = " and the text encoders" if config.train.text_encoders else ""
    word = f", and the word {config.identifier}" if config.inversion.num_vectors else ""
    if config.train.method == "full":
        return f"all weights of the UNet{encoders}{word}"
    kind = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[config.lora.kind]
    return f"a {kind} of rank {config.lora.rank} on the UNet{encoders}{word}"


def _class(run: ResolvedRun) -> str:
    """What keeps the class as it was."""
    prior = run.config.prior
    if prior.mode == "none":
        return "nothing keeps it as it was"
    images = figures.count(len(run.class_images) or prior.num_images, "image")
    by = "" if prior.mode == "images" else ", and what the untrained model makes of them"
    return f"{images} of “{prior.prompt}” keep it as it was{by}; weight {prior.weight:g}"


def _use(run: ResolvedRun, export: ExportNote | None) -> str:
    """Commands to copy, and the export's files."""
    if export is None:
        return ""
    links = "".join(
        f'<li><a href="{html.escape(f"export/{name}", quote=True)}">{html.escape(name)}</a>: '
        f"{html.escape(what)}</li>"
        for name, what in use.files(run.config)
    )
    blocks = "".join(
        f"<div><h3>{html.escape(title)}</h3><pre>{html.escape(text)}</pre></div>"
        for title, text in use.snippets(run.config, run.export_uri)
    )
    return f'<h2>Use it</h2><ul>{links}</ul><div class="use">{blocks}</div>'


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
        shown = []
        for result in validated:
            if prompt in result.grids:
                when = f"after step {result.step:,}" if result.step else "before"
                shown.append(_figure(result.grids[prompt], prompt, when))
        parts.append(f'<h3>{html.escape(prompt)}</h3><div class="grids">{"".join(shown)}</div>')
    return "".join(parts)


def _only_picture(run: ResolvedRun, export: ExportNote | None) -> str:
    """What the export draws, where nothing was validated."""
    place = storage.join(results.folder(run.config.output.uri), results.EXPORTED)
    if export is None or not storage.exists(place):
        return NO_PICTURES
    prompt = run.config.instance.prompt
    shown = _figure(results.EXPORTED, prompt, f"after step {export.step:,}")
    return f'<h3>{html.escape(prompt)}</h3><div class="grids">{shown}</div>{NO_VALIDATION}'


def _figure(name: str, prompt: str, when: str) -> str:
    source = html.escape(f"validation/{name}", quote=True)
    alt = html.escape(f"{prompt}, {when}", quote=True)
    return (
        f"<figure><figcaption>{when}</figcaption>"
        f'<div class="scroll"><img src="{source}" alt="{alt}" loading="lazy"></div></figure>'
    )


def _table(validated: list[Result], settings: ValidationConfig) -> str:
    names = list(dict.fromkeys(name for result in validated for name in result.metrics))
    if not names:
        return ""
    best = results.best_step(validated)
    about = ABOUT_METRICS.format(
        of_subject=settings.num_images,
        of_class=settings.num_class_images,
        steps=f"{settings.steps} steps" if settings.steps else "the model's usual steps",
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
