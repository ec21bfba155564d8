"""Results of a run on storage: metrics of the steps, metrics and image grids of checkpoints.

Owns their files, which checkpoint is best, and which must be kept. Knows no torch.
"""

import json
from dataclasses import asdict, dataclass

from rayjobs import storage
from rayjobs.storage import NotThere, join

METRICS = "metrics.jsonl"
"""One line a step."""
EXPORTED = "export.jpg"
"""A picture by the export, where no checkpoint was validated."""

ROUNDING = 1e-6
"""Of a loss, relative: what two computations of the same may differ by."""
SCALES = {
    "subject_likeness": "up to 1, higher is better",
    "prompt_likeness": "up to 1, higher is better",
    "preservation": "up to 1, lower is better",
    "diversity": "from 0, higher is better",
    "joint_score": "0 to 1, higher is better",
}


def with_scale(name: str) -> str:
    """A metric's name for people, its scale, and whether more of it is better or less."""
    return f"{name.replace('_', ' ')} ({SCALES[name]})"


@dataclass(frozen=True)
class Result:
    """The validation of the model after a step; step 0 is the untrained model."""

    step: int
    score: float | None
    """The joint score; None where nothing was measured."""
    metrics: dict[str, float]
    grids: dict[str, str]
    """File names of picture grids, by prompt."""


def folder(output_uri: str) -> str:
    return join(output_uri, "validation")


def write(output_uri: str, result: Result) -> None:
    data = json.dumps(asdict(result), indent=1, ensure_ascii=False).encode()
    storage.write_bytes(join(folder(output_uri), f"step-{result.step:08d}.json"), data)


def read(output_uri: str) -> list[Result]:
    """All there are, by step."""
    results = []
    for name in storage.list_files(folder(output_uri)):
        if name.endswith(".json"):
            try:
                data = storage.read_bytes(join(folder(output_uri), name))
            except NotThere:
                continue
            results.append(Result(**json.loads(data)))
    return sorted(results, key=lambda result: result.step)


def best_step(results: list[Result]) -> int | None:
    """The step with the best score; of equals the latest."""
    scored = [r for r in results if r.score is not None and r.step > 0]
    return max(scored, key=lambda r: (r.score, r.step)).step if scored else None


def has_stalled(losses: list[tuple[int, float]], patience: int) -> bool:
    """Whether none of the last `patience` losses is better than the best before by more than
    rounding."""
    if len(losses) <= patience:
        return False
    before, last = losses[:-patience], losses[-patience:]
    return min(loss for _, loss in last) >= (1 - ROUNDING) * min(loss for _, loss in before)


def read_losses(output_uri: str, last_step: int) -> list[tuple[int, float]]:
    """The losses at fixed noise of steps 1 .. last_step, each with its step."""
    uri = join(output_uri, METRICS)
    if not storage.exists(uri):
        return []
    rows = [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
    return [
        (row["step"], row["validation_loss"])
        for row in rows
        if "validation_loss" in row and row["step"] <= last_step
    ]


def step_of_least(losses: list[tuple[int, float]]) -> int | None:
    """The step with the least loss; of equals the earliest."""
    return min(losses, key=lambda loss: (loss[1], loss[0]))[0] if losses else None


def to_keep(steps: list[int], results: list[Result], keep: int, every: int) -> set[int]:
    """The checkpoints to leave: the best, those still to be looked at, and the latest, `keep` in
    all where that is enough."""
    validated = {result.step for result in results}
    waiting = {step for step in steps if every and step % every == 0 and step not in validated}
    best = best_step(results)
    kept = {best} & set(steps) if best is not None else set()
    for step in sorted(steps, reverse=True):
        if len(kept) >= keep:
            break
        kept.add(step)
    newest = {max(steps)} if steps else set()
    return kept | waiting | newest
