"""`rayjobs submit` and `rayjobs stop`: what a person sees of a job on a cluster.

Owns a job's fingerprint, the order of events and the words. Whatever can be checked here is checked
before a byte is sent.
"""

import hashlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayjobs import keys
from rayjobs.config import load_config
from rayjobs.dataset.records import canonical_json
from rayjobs.submission import package
from rayjobs.submission.client import INTERRUPTED, Jobs

NOT_IDENTITY = ("workers",)
"""Parts of a configuration that change how a job runs, but not what it makes."""


@dataclass(frozen=True)
class Wanted:
    """A job as it is given on the command line; `options` are those beside the overrides."""

    kind: str
    config: str
    overrides: list[str]
    options: list[str]


def submit(wanted: Wanted, address: str | None, python: str, *, wait: bool = True) -> int:
    """Have the cluster run the job; return its exit code, 0 without waiting for it.

    The same job, submitted again while it runs, is followed and not begun. Ctrl-C leaves it.
    """
    kind, overrides, file = wanted.kind, wanted.overrides, Path(wanted.config).name
    config = load_config(keys.model_of(kind), wanted.config, overrides)
    values = config.model_dump(mode="json")
    names = package.files(wanted.config, values)
    brought = {n: path for n, path in names.items() if n != file and not package.is_code(n)}
    base = name_of(kind, values, wanted.options, package.hashes(brought))
    jobs = Jobs(address)
    entrypoint = [python, "-m", "rayjobs", kind, file, *overrides, *wanted.options]
    with tempfile.TemporaryDirectory(prefix="rayjobs-package-") as folder:
        job = jobs.submit(base, entrypoint, lambda: _pack(names, Path(folder)))
    if job.is_new:
        _say(f"submitted {job.id} to {jobs.address}")
    else:
        _say(f"{job.id} runs at {jobs.address} already: {job.command}")
    where = f" --address {address}" if address else ""
    output = values["output"]["uri"]
    way_back = (
        f"it goes on without this; the same command follows it again, `rayjobs status {output}` "
        f"tells how far it is, `rayjobs stop {job.id}{where}` ends it"
    )
    if not wait:
        _say(way_back)
        return 0
    try:
        return jobs.follow(job.id)
    except KeyboardInterrupt:
        _say(f"\n{way_back}")
        return INTERRUPTED


def stop(name: str, address: str | None = None) -> int:
    """End a job on the cluster; what it has finished is kept."""
    jobs = Jobs(address)
    seconds = jobs.stop(name)
    if seconds is None:
        _say(f"{name} had ended already")
    else:
        _say(
            f"stopped {name} in {seconds:.1f} s; what is finished is kept, and submitting it again "
            f"continues: {jobs.command(name)}"
        )
    return 0


def name_of(kind: str, values: dict[str, Any], options: list[str], brought: dict[str, str]) -> str:
    """A job's name on a cluster, the same for what makes the same.

    `brought` are hashes of the files that it brings, by name.
    """
    decides = {key: value for key, value in values.items() if key not in NOT_IDENTITY}
    whole = {"kind": kind, "values": decides, "options": sorted(options), "files": brought}
    return f"rayjobs-{kind}-{hashlib.sha256(canonical_json(whole)).hexdigest()[:12]}"


def _pack(names: dict[str, Path], folder: Path) -> str:
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    packed = package.pack(names, folder / "package.zip", GCS_STORAGE_MAX_SIZE)
    _say(f"package: {packed}")
    return str(packed.path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
