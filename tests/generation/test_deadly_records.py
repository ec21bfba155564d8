"""Records and pictures that end the process that makes them: found out, and no others blamed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs import storage
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.records import Record
from rayjobs.generation.tools.verify import verify
from rayjobs.generation.worker.attempts import Attempts
from rayjobs.generation.worker.generator import RecordGenerator
from rayjobs.generation.worker.shards import CRASHES_WORKER, ShardWorker
from tests.generation.jobs import values

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]


def test_a_picture_that_kills_its_decoder(
    tmp_path: Path, picture: Any, frail_decoders: None
) -> None:
    """31 records are good, one failed; mended, one is made and 31 are copied."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(32):
        picture(number).save(pictures / f"{number:02d}.png")
    (pictures / "07.png").write_bytes(b"KILLED")
    output = str(tmp_path / "out")
    config = GenerateConfig.model_validate(
        values(output, 2)
        | {"prompts": {"inline": ["a red star"]}, "seeds": {"count": 1}}
        | {
            "init": {"uri": str(pictures)},
            "sampler": {"name": "euler_a", "steps": 2, "guidance_scale": 1.0},
            "output": {"uri": output, "images_per_shard": 32},
        }
    )
    lock = job.prepare(config)
    (entry,) = ShardWorker(config, lock).make([0])
    assert (entry["rows"], entry["failed"]) == (32, 1)
    manifest = Manifest(output)
    before = list(manifest.format.read(manifest.data, 0))
    assert "it ends the process that decodes it" in before[7]["error"]

    picture(7).save(pictures / "07.png")
    heard: list[int] = []
    worker = ShardWorker(config, lock, redo={}, report=lambda images, _: heard.append(images))
    (entry,) = worker.make([0])
    assert (entry["generation"], entry["failed"], sum(heard)) == (1, 0, 1)
    again = list(manifest.format.read(manifest.data, 0))
    assert again[7]["status"] == "ok"
    assert [row for row in again if row["record"] != 7] == [r for r in before if r["record"] != 7]
    assert verify(output).faults == []


FRAGILE = """
import os, sys
from rayjobs.config import load_config
from rayjobs.diffusion.engine import Engine
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.worker.shards import ShardWorker
add = Engine.add
def fragile(self, request):
    if request.seed == 3 and "blue" in request.prompt:
        os._exit(9)
    return add(self, request)
Engine.add = fragile
config = load_config(GenerateConfig, sys.argv[1])
codes = []
while not codes or codes[-1] == 9 and len(codes) < 10:
    if (worker := os.fork()) == 0:
        list(ShardWorker(config, job.prepare(config)).make(range(2)))
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
print(codes)
"""
"""Workers forked one after the other, so that libraries are loaded once."""


@pytest.mark.slow
def test_a_record_that_kills_its_worker_is_found_out(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    output = str(tmp_path / "out")
    tiny = {"model": {"uri": str(folders["sdxl"])}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values(output, 16) | tiny))
    command = [sys.executable, "-c", FRAGILE, str(tmp_path / "job.yaml")]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    # Three attempts at the shard, two at its record alone.
    assert done.stdout.split("\n")[-2] == "[9, 9, 9, 9, 9, 0]"
    manifest = Manifest(output)
    assert [entry["failed"] for entry in manifest.entries()] == [0, 1]
    rows = list(manifest.format.read(manifest.data, 1))
    assert [row["error"] for row in rows if row["status"] != "ok"] == [CRASHES_WORKER]
    assert storage.list_files(storage.join(output, "attempts")) == []


def test_only_the_death_of_the_very_process_is_evidence(tmp_path: Path) -> None:
    """A record that is made alone dies 40 times with its driver or its node, and is not blamed."""
    alive = {"a": True, "b": False}
    for run in range(20):
        for _ in range(2):
            attempts = Attempts(str(tmp_path), f"run {run}", "b", alive.__getitem__)
            attempt = attempts.begin(0, attempts.last(0))
            assert (attempt.number, attempt.culprits) == (1, [])
            attempts.begin_record(0, attempt, 3)
    for number, culprits in ((1, []), (2, []), (3, [3])):
        mine = Attempts(str(tmp_path), "run 20", "a", alive.__getitem__)
        attempt = mine.begin(0, mine.last(0))
        assert (attempt.number, attempt.culprits) == (number, culprits)
        mine.begin_record(0, attempt, 3)
    (tmp_path / "attempts" / "00000000.json").write_text(
        '{"number": 9, "record": 5, "deaths": {"3": 2}}'  # as older versions wrote it
    )
    other = Attempts(str(tmp_path), "run 21")
    assert other.begin(0, other.last(0)).deaths == {3: 2}


@pytest.mark.parametrize("redo", [None, {0: {}}], ids=["first", "retry"])
def test_a_deadly_record_ends(
    tmp_path: Path, redo: Any, monkeypatch: pytest.MonkeyPatch, picture: Any
) -> None:
    """Also one that is made again: its shard is begun five times, then it is marked failed."""
    (tmp_path / "p.csv").write_text("prompt,init_image\na,\nb,c.png\nc,d.png\n")
    (tmp_path / "d.png").write_bytes(b"no picture")
    keys = {"prompts": {"uri": str(tmp_path / "p.csv")}, "seeds": {"count": 1}}
    sampler = {"sampler": {"name": "euler", "steps": 2, "guidance_scale": 1.0}}
    config = GenerateConfig.model_validate(values(str(tmp_path / "out"), 2) | keys | sampler)
    lock = job.prepare(config)
    if redo is not None:
        assert [entry["failed"] for entry in ShardWorker(config, lock).make([0])] == [2]
    picture(1).save(tmp_path / "d.png")
    generate = RecordGenerator._request

    def deadly(self: RecordGenerator, record: Record, init: Any) -> Any:
        if record.number == 1:
            raise SystemExit
        return generate(self, record, init)

    monkeypatch.setattr(RecordGenerator, "_request", deadly)
    for _ in range(5):
        with pytest.raises(SystemExit):
            list(ShardWorker(config, lock, redo=redo).make([0]))
    (entry,) = ShardWorker(config, lock, redo=redo).make([0])
    assert (entry["failed"], entry["generation"]) == (1, 0 if redo is None else 1)
    manifest = Manifest(str(tmp_path / "out"))
    errors = [row["error"] for row in manifest.format.read(manifest.data, 0)]
    assert errors == [None, CRASHES_WORKER, None]
    assert storage.list_files(str(tmp_path / "out" / "attempts")) == []
