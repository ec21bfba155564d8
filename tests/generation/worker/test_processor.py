"""The Ray Data step on a real Ray cluster of one machine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from rayjobs.config import BadInput, changed
from rayjobs.generation import ProcessorConfig, build_processor
from rayjobs.generation.config import ECONOMY
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.lock import job_part
from rayjobs.generation.spec.records import Record, derived_seed
from rayjobs.generation.worker import generator as generator_module
from rayjobs.generation.worker.generator import RecordGenerator
from rayjobs.generation.worker.pictures import NO_SOURCES
from rayjobs.generation.worker.processor import ImageStep

# Ray Data 2.60 reads its own deprecated switches.
CONFIG = ProcessorConfig.model_validate(
    {
        "model": {"uri": "starter"},
        "sampler": {"name": "euler_a", "steps": 2, "guidance_scale": 3.0},
        "engine": {"batch_size": 4},
    }
)


@pytest.fixture
def cluster(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "enable_progress_bars", False)


@pytest.fixture
def checkpoints(cluster: None, tmp_path: Path) -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "checkpoints")
    )
    yield
    context.checkpoint_config = None


@pytest.fixture(scope="module")
def step() -> ImageStep:
    return ImageStep(CONFIG.model_dump(mode="json"))


def made(asked: list[tuple[str, int, int]]) -> list[bytes]:
    """The pictures that a job's generator gives for these prompts, seeds and steps."""
    job = CONFIG.job()
    determinism.pin(job.workers)
    generator = RecordGenerator(job, "starter", guided=True)
    settings: dict[str, Any] = {
        "negative_prompt": None,
        "sampler": "euler_a",
        "guidance_scale": 3.0,
        "guidance_rescale": 0.0,
        "clip_skip": None,
        "width": None,
        "height": None,
        "init_image": None,
        "init_uri": None,
        "strength": 0.5,
    }
    records = [
        Record(number=number, prompt=prompt, seed=seed, steps=steps, **settings)
        for number, (prompt, seed, steps) in enumerate(asked)
    ]
    rows = {record.number: row for record, row in generator.generate(records)}
    return [rows[number]["image"]["bytes"] for number in range(len(asked))]


@pytest.mark.ray
def test_the_same_bytes_as_a_job_and_failed_rows_are_kept(cluster: None) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 0, "prompt": "a red star", "seed": 7, "steps": None, "index": 0},
        {"id": 1, "prompt": "a blue ring", "seed": None, "steps": None, "index": 5},
        {"id": 2, "prompt": "a blue ring", "seed": None, "steps": 0, "index": 0},
        {"id": 3, "prompt": None, "seed": 3, "steps": 2, "index": 0},
        {"id": 4, "prompt": "a pink heart", "seed": 9, "steps": 3, "index": 0},
    ]
    process = build_processor(
        CONFIG,
        preprocess=lambda row: {**row, "topic": f"t{row['id']}"},
        postprocess=lambda row: {**row, "size": len((row["image"] or {"bytes": b""})["bytes"])},
    )
    found = sorted(process(ray.data.from_items(rows)).take_all(), key=lambda row: row["id"])
    assert [(row["id"], row["topic"]) for row in found] == [(n, f"t{n}") for n in range(5)]
    assert [row["status"] for row in found] == ["ok", "ok", "failed", "failed", "ok"]
    assert "steps is 0; it must be in" in found[2]["error"]
    assert (found[3]["error"], found[3]["size"]) == ("there is no prompt", 0)
    seed = derived_seed(0, "a blue ring", 5)
    asked = [("a red star", 7, 2), ("a blue ring", seed, 2), ("a pink heart", 9, 3)]
    good = [row for row in found if row["status"] == "ok"]
    assert [row["image"]["bytes"] for row in good] == made(asked)
    assert [(row["prompt"], row["seed"], row["steps"]) for row in good] == asked
    assert len({row["image_id"] for row in good}) == 3


@pytest.mark.ray
def test_checkpoints_that_would_not_work_are_refused(checkpoints: None) -> None:
    process = build_processor(CONFIG)
    brought = ray.data.from_items([{"id": 0, "prompt": "a red star"}])
    with pytest.raises(BadInput, match=r"begins with .*second run would make every image again"):
        process(brought)
    with pytest.raises(BadInput, match="begins with"):
        process(ray.data.range(2).union(brought.map(lambda row: row)))
    process(ray.data.range(2).map(lambda row: {**row, "prompt": "a red star"}))


@pytest.mark.ray
def test_without_checkpoints_any_source_goes(cluster: None) -> None:
    build_processor(CONFIG)(ray.data.from_items([{"prompt": "a red star"}]))


@pytest.mark.model
def test_rows_keep_their_order_and_their_values(step: ImageStep) -> None:
    batch = pa.table(
        {
            "prompt": [f"a star {n}" for n in range(10)],
            "steps": [3.0, np.nan, 2.5, *[None] * 7],
            "record": list(range(10)),
        }
    )
    parts = list(step(batch))
    assert [len(part) for part in parts] == [4, 4, 2]
    whole = pa.concat_tables(parts)
    assert whole["prompt"].to_pylist() == batch["prompt"].to_pylist()
    assert whole["record"].to_pylist() == list(range(10))
    assert whole["steps"].to_pylist()[:4] == [3, 2, None, 2]
    assert whole["error"][2].as_py() == "steps is 2.5, which is not a whole number"
    assert whole["status"].to_pylist().count("ok") == 9
    (empty,) = step(batch.slice(0, 0))
    assert empty.schema == whole.schema


@pytest.mark.model
def test_rows_have_a_syntax_of_their_own(step: ImageStep) -> None:
    text, syntaxes = "a (red:1.5) star", ["a1111", None, "plain", "compel"]
    batch = pa.table(
        {"prompt": [text] * 4, "seed": [1] * 4, "steps": [9] * 4, "prompt_syntax": syntaxes}
    )
    whole = pa.concat_tables(step(batch))
    assert whole["prompt_syntax"].to_pylist() == syntaxes
    weighted, usual, plain, unknown = whole.to_pylist()
    assert "prompt_syntax is 'compel'" in unknown["error"]
    assert weighted["image_id"] != usual["image_id"] == plain["image_id"]
    assert weighted["image_sha256"] != usual["image_sha256"] == plain["image_sha256"]


@pytest.mark.model
def test_what_rows_leave_out_is_in_their_identity_only_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data sets that are older than these keys go on, and others are others."""
    usual = CONFIG.job()
    generator = RecordGenerator(usual, "starter", guided=True)
    settings = {"guidance_scale": 3.0, "guidance_rescale": 0.0, "clip_skip": None, "strength": 0.5}
    sizes = {"width": None, "height": None, "init_image": None, "init_uri": None}
    record = Record(
        number=0, prompt="a", negative_prompt=None, seed=0, sampler="euler", steps=2,
        **settings, **sizes,
    )  # fmt: skip
    found = {}
    for key, value in {
        "steps": 2,
        "cache_interval": 2,
        "guidance_interval": [0, 0.5],
        "timesteps": [900, 90],
        "sigmas": [9.0, 1.0, 0.0],
    }.items():
        job = changed(usual, [f"sampler.{key}={value}"])
        given = {} if key == "steps" else {key: value}
        ((_, row),) = generator.generate([replace(record, economy=given)])
        found[key] = row["image_id"], row["image_sha256"]
        title = key.replace("_", " ").capitalize()
        assert (title.encode() in row["image"]["bytes"]) is True
        assert ((key in job_part(job)["sampler"]), job_part(job) == job_part(usual)) == (
            True,
            key == "steps",
        )
    assert all(len(set(column)) == 5 for column in zip(*found.values(), strict=True))
    monkeypatch.setattr(generator_module, "image_id", lambda decides: decides)
    named = replace(record, economy=dict(ECONOMY))
    assert generator.image_id(record, NO_SOURCES) == generator.image_id(named, NO_SOURCES)
    assert not {*ECONOMY} & {*generator.image_id(named, NO_SOURCES)}
    assert not {*ECONOMY} & {*job_part(usual)["sampler"]}


def test_columns_that_do_not_go_are_named(step: ImageStep) -> None:
    with pytest.raises(BadInput, match="no prompt column; they have text"):
        list(step(pa.table({"text": ["a"]})))
    with pytest.raises(BadInput, match="a column 'image', which records need"):
        list(step(pa.table({"prompt": ["a"], "image": ["b"]})))
