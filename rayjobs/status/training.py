"""How far a training run is: step, loss, checkpoints, best metric, from its folder.

Owns what is read for it: the end of the metrics, the notes of the checkpoints that are kept, and
the sentence on the run's page, which is newer than the last checkpoint.
"""

import datetime as dt
import html
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from rayjobs import storage
from rayjobs.dreambooth import lock, results
from rayjobs.dreambooth.checkpoints import Checkpoints
from rayjobs.models import exports
from rayjobs.reports import figures
from rayjobs.reports.running import MARK

TAIL_BYTES = 64 * 1024
"""Of the metrics, a line a step."""
PAGE_BYTES = 1024 * 1024
PAGE_S = 900.0
"""A page that is older is of a run that was cut off: it is written every 5 minutes, unless it is
slow to make."""
SMOOTHED = 50
"""Steps over which the loss is averaged."""


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    state: str
    """`done`, `in progress` or `interrupted` as its page says, `silent`: the page is old, or
    `begun`: there is no page yet."""
    name: str
    step: int
    """Of the last metrics that are stored, which is done with each checkpoint."""
    num_steps: int
    loss: float | None
    """Mean of the last steps."""
    checkpoints: list[int]
    """The steps of those that are kept."""
    best: dict[str, Any] | None
    """Step, name and value of the best metric: the joint score, else the loss at fixed noise."""
    exported_step: int | None
    page: str
    """How the run goes by its page, which is newer than the last checkpoint; empty at its end."""
    kind: str = "training run"

    def text(self, uri: str) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        kept = ", ".join(f"{step:,}" for step in self.checkpoints) or "none"
        lines = [
            f"{self.kind} {self.name!r} in {uri}: {self.state}",
            f"  step        {self.step:,} of {self.num_steps:,} "
            f"({figures.percent(self.step, self.num_steps)}){loss}",
            f"  checkpoints {kept}",
        ]
        if self.best is not None:
            best = self.best
            lines.append(f"  best        step {best['step']:,}: {best['name']} {best['value']:.4g}")
        if self.exported_step is not None:
            lines.append(f"  exported    step {self.exported_step:,}")
        return "\n".join([*lines, *([f"  {self.page}"] if self.page else [])])


def look_at_run(uri: str) -> RunStatus:
    """The run in this folder, which has a lock."""
    rows, num_steps = _last_metrics(uri), lock.num_steps(uri)
    checkpoints = [each.step for each in Checkpoints(storage.join(uri, "checkpoints")).list()]
    note, page = exports.read(storage.join(uri, "export")), _page(uri)
    is_done = note is not None and not page and (note.steps or num_steps) >= num_steps
    step = max([*checkpoints, *(row["step"] for row in rows)], default=0)
    losses = [row["loss"] for row in rows[-SMOOTHED:] if "loss" in row]
    return RunStatus(
        state="done" if is_done else _state(page),
        name=lock.name(uri),
        step=step,
        num_steps=num_steps,
        loss=sum(losses) / len(losses) if losses else None,
        checkpoints=checkpoints,
        best=_best(uri, rows),
        exported_step=None if note is None else note.step,
        page=page,
    )


def _last_metrics(uri: str) -> list[dict[str, Any]]:
    try:
        with storage.open_input(storage.join(uri, results.METRICS)) as file:
            start = max(0, file.seek(0, 2) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except storage.NotThere:
        return []
    return [json.loads(line) for line in lines[1 if start else 0 :]]


def _best(uri: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    validated = results.read(uri)
    best = results.best_step(validated)
    if best is not None:
        [score] = [result.score for result in validated if result.step == best]
        return {"step": best, "name": "joint score", "value": score}
    losses = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    least = results.step_of_least(losses)
    if least is None:
        return None
    return {"step": least, "name": "loss at fixed noise", "value": dict(losses)[least]}


def _state(page: str) -> str:
    written = re.search(r"at (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", page)
    if written is None:
        return "begun"
    if page.startswith("Interrupted"):
        return "interrupted"
    at = dt.datetime.fromisoformat(f"{written[1]}+00:00").timestamp()
    return "in progress" if time.time() - at < PAGE_S else "silent"


def _page(uri: str) -> str:
    """What the run's page says of a run that has not ended."""
    try:
        with storage.open_input(storage.join(uri, "index.html")) as file:
            text = file.read(PAGE_BYTES).decode(errors="replace")
    except storage.NotThere:
        return ""
    found = re.search(rf"{re.escape(MARK)}(.*?)</p>", text, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", found[1])) if found else ""
