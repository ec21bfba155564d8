"""The data set's report: index.html and the scripts under report/, made of the finished shards.

Owns which shards are read, the cache of what was read before, and the order of pages. Reads through
the manifest and knows nothing of how images were made.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from rayjobs import storage
from rayjobs.dataset.lock import Lock, read_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.reports import alike, contact_sheet
from rayjobs.reports.alike import BROKEN
from rayjobs.reports.history import History, rows_shown
from rayjobs.reports.page import Facts, render
from rayjobs.reports.running import Running

MAX_PICTURES = 20_000
"""Of a larger data set a sample is shown, spread evenly over its shards."""
MAX_FAILED_SHARDS = 2_000
"""Shards that are read for the reasons of their failures alone."""
READ_WHILE_RUNNING = 64
"""The same while the job runs: then the report is written often."""
MAX_REASONS = 1_000
READERS = 4
PROMPTS_PER_FILE = 5_000

Sheets = dict[str, dict[str, Any]]


def write(
    output_uri: str,
    max_pictures: int = MAX_PICTURES,
    history: History | None = None,
    running: Running | None = None,
) -> str:
    """Write the report of what is finished of the data set; return the URI of its index.html.

    Made again after a resume, it reads only shards that it has not read. A data set with more than
    `max_pictures` is shown by a sample. `history` is the manifest's, where that was read already.
    That of a `running` job looks for no duplicates, and into few shards for failures' reasons.
    """
    history = read_history(output_uri) if history is None else history
    folder = storage.join(output_uri, "report")
    existing = set(storage.list_files(folder)) if storage.is_folder(folder) else set()
    plan = _plan(
        history, max_pictures, MAX_FAILED_SHARDS if running is None else READ_WHILE_RUNNING
    )
    sheets, unreadable = _read(output_uri, plan, existing, history.suffix, running is None)
    pages = list(_pages(sheets))
    lock = read_lock(output_uri)
    tables = alike.TABLES if running is None else {}
    found = {
        name: alike.write_largest(output_uri, file, history.suffix, existing)
        for name, file in tables.items()
    }
    largest = {name: script for name, (_, script) in found.items()}
    index = _write_prompts(folder, sheets, pages, existing)
    data = index | {"pages": pages, "suffix": history.suffix, "duplicates": None} | largest
    facts = _facts(output_uri, lock, sheets, pages)
    facts |= {"alike": {name: counts for name, (counts, _) in found.items() if counts}}
    facts |= {"unreadable": unreadable, "running": running}
    html = render(history, Facts(**facts), contact_sheet.as_json(data))
    uri = storage.join(output_uri, "index.html")
    storage.write_bytes(uri, html.encode())
    _remove_old(folder, existing, sheets, [*index["prompts"], *largest.values()])
    return uri


def read_history(output_uri: str) -> History:
    """All finished shards of the data set, as its manifest has them."""
    history = History()
    for entry in Manifest(output_uri).entries():
        history.add(entry)
    return history


def _plan(history: History, max_pictures: int, max_failed: int) -> dict[str, tuple[int, int, int]]:
    """What to read, by the name of what will come of it: shard, rows shown, rows."""
    total = history.total("rows")
    shards, digests = history.column("shard"), history.column("digest")
    rows, failed = history.column("rows"), history.column("failed")
    limit = rows_shown(max_pictures) if total > max_pictures else max(total, 1)
    plan = {}
    pictured = history.pictured(max_pictures)
    for at in pictured:
        shown = min(int(rows[at]), limit)
        part = f"of{shown}-" if shown < rows[at] else ""
        name = f"{shards[at]:08d}-{part}{digests[at]:016x}-v{contact_sheet.VERSION}"
        plan[name] = (int(shards[at]), shown, int(rows[at]))
    only_failed = np.setdiff1d(np.flatnonzero(failed), pictured, assume_unique=True)
    for at in history.some(only_failed, max_failed):
        name = f"{shards[at]:08d}-failures-{digests[at]:016x}-v{contact_sheet.VERSION}"
        plan[name] = (int(shards[at]), 0, int(rows[at]))
    return plan


def _read(
    output_uri: str,
    plan: dict[str, tuple[int, int, int]],
    existing: set[str],
    suffix: str,
    tells: bool,
) -> tuple[Sheets, list[str]]:
    """Each planned shard's sheet, from an earlier report or read now; and errors of reading."""
    known = _known(output_uri) if "state.json" in existing else {}
    sheets = {
        key: known[key]
        for key in plan
        if key in known and all(f"{file['name']}.js" in existing for file in known[key]["files"])
    }
    unreadable: list[str] = []

    def read(key: str) -> None:
        shard, shown, total = plan[key]
        try:
            if shown:
                sheet = contact_sheet.write_sheet(output_uri, shard, suffix, key, shown, total)
            else:
                sheet = contact_sheet.read_failures(output_uri, shard, suffix)
            sheets[key] = sheet
        except BROKEN as error:
            unreadable.append(f"Shard {shard} cannot be read: {error}"[:300])

    missing = [key for key in plan if key not in sheets]
    pool = ThreadPoolExecutor(READERS)
    every_s = 0.5 if sys.stderr.isatty() else 10
    try:
        done = pool.map(read, missing)
        bar: dict[str, Any] = {"unit": " shards", "delay": every_s, "mininterval": every_s}
        for _ in tqdm(done, "report", len(missing), disable=not tells, **bar):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
        if missing or len(known) != len(sheets):
            state = json.dumps(sheets, separators=(",", ":")).encode()
            storage.write_bytes(storage.join(output_uri, "report", "state.json"), state)
    return {key: sheets[key] for key in plan if key in sheets}, unreadable


def _known(output_uri: str) -> Sheets:
    try:
        known: Sheets = json.loads(
            storage.read_bytes(storage.join(output_uri, "report", "state.json"))
        )
    except ValueError:  # nothing that cannot be made again
        return {}
    return known


def _pages(sheets: Sheets) -> Iterator[list[str]]:
    """Names of the scripts of each page: whole ones, until a page is full."""
    page: list[str] = []
    shown = 0
    for sheet in sheets.values():
        for file in sheet["files"]:
            if page and shown + file["shown"] > contact_sheet.PICTURES_PER_FILE:
                yield page
                page, shown = [], 0
            page.append(file["name"])
            shown += file["shown"]
    if page:
        yield page


def _write_prompts(
    folder: str, sheets: Sheets, pages: list[list[str]], existing: set[str]
) -> dict[str, Any]:
    """Write the index of prompts in parts, each named by what is in it; return their names."""
    page_of = {name: number for number, page in enumerate(pages) for name in page}
    prompts = dict.fromkeys(
        (text, page_of[file["name"]])
        for sheet in sheets.values()
        for file in sheet["files"]
        for text in file["prompts"]
    )
    names, every = [], list(prompts)
    for start in range(0, len(every), PROMPTS_PER_FILE):
        part = every[start : start + PROMPTS_PER_FILE]
        name = f"prompts-{hashlib.sha256(repr(part).encode()).hexdigest()[:16]}"
        if f"{name}.js" not in existing:
            contact_sheet.write_script(folder, name, part)
        names.append(name)
    return {"prompts": names, "numPrompts": len(prompts)}


def _facts(
    output_uri: str, lock: Lock | None, sheets: Sheets, pages: list[list[str]]
) -> dict[str, Any]:
    files = [file for sheet in sheets.values() for file in sheet["files"]]
    reasons = _reasons(sheets, pages)
    return {
        "title": output_uri.rstrip("/").rsplit("/", 1)[-1] or "Generated images",
        "recipe": _recipe(lock) if lock else "",
        "made_by": _made_by(lock) if lock else {},
        "expected": (lock.num_records, lock.num_shards) if lock else None,
        "shown": sum(file["shown"] for file in files),
        "flagged": sum(file["flagged"] for file in files),
        "reasons": reasons,
        "num_reasons_read": sum(reason["count"] for reason in reasons),
    }


def _reasons(sheets: Sheets, pages: list[list[str]]) -> list[dict[str, Any]]:
    """Failures of all shards by reason, the most frequent first, with a few examples each."""
    page_of = {name: number for number, page in enumerate(pages, 1) for name in page}
    reasons: dict[str, dict[str, Any]] = {}
    for sheet in sheets.values():
        shown = {
            record: page_of[file["name"]] for file in sheet["files"] for record in file["failed"]
        }
        for shape, one in sheet["failures"].items():
            key = shape if shape in reasons or len(reasons) < MAX_REASONS else "other"
            text = "other reasons" if key == "other" else one["text"]
            reason = reasons.setdefault(key, {"text": text, "count": 0, "examples": []})
            reason["count"] += one["count"]
            room = contact_sheet.EXAMPLES - len(reason["examples"])
            for example in one["examples"][: max(room, 0)]:
                place = {"page": shown.get(example["record"]), "file": sheet["file"]}
                reason["examples"].append(example | place)
    return sorted(reasons.values(), key=lambda one: -one["count"])


def _recipe(lock: Lock) -> str:
    job = lock.segments[-1].job
    sampler = job["sampler"]
    name = sampler["name"] or "its own sampler"
    return f"{lock.segments[-1].model_name}, {name}, {sampler['steps']} steps"


def _made_by(lock: Lock) -> dict[str, str]:
    """What made the last segment's pictures."""
    segment, machine = lock.segments[-1], lock.determinism
    libraries = ", ".join(f"{n} {machine[n]}" for n in ("torch", "diffusers") if n in machine)
    found = {
        "Model": segment.model_name,
        "its SHA-256": segment.model_sha256,
        "Adapters": "; ".join(segment.loras_sha256),
        "Device": str(machine.get("device", "")),
        "Libraries": libraries,
    }
    return {name: value for name, value in found.items() if value}


def _remove_old(folder: str, existing: set[str], sheets: Sheets, others: list[str | None]) -> None:
    """Remove scripts that no page names any more: of shards made again, or no longer shown."""
    names = {file["name"] for sheet in sheets.values() for file in sheet["files"]}
    keep = {f"{name}{end}.js" for name in names for end in ("", "-large")}
    keep |= {f"{name}.js" for name in others} | {"state.json"}
    for name in existing - keep:
        storage.remove_folder(storage.join(folder, name))
