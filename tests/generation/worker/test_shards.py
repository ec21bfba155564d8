"""A worker without Ray: shards, records, failures, identity, resume; locally and on S3."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.worker.shards import ShardWorker
from rayjobs.reports import dataset_report

pytestmark = pytest.mark.model


def configure(output: str, **changes: Any) -> GenerateConfig:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"inline": ["a red star", "a blue ring", "a green heart"]},
        "seeds": {"start": 1, "count": 2},
        "sampler": {"name": "euler", "steps": 2, "guidance_scale": 3.0},
        "output": {"uri": output, "images_per_shard": 4},
        "engine": {"batch_size": 4},
    }
    return GenerateConfig.model_validate(values | changes)


def make(config: GenerateConfig, shards: list[int] | None = None) -> list[dict[str, Any]]:
    lock = job.prepare(config)
    worker = ShardWorker(config, lock)
    return list(worker.make(range(lock.num_shards) if shards is None else shards))


def rows(config: GenerateConfig) -> list[dict[str, Any]]:
    uri, found = config.output.uri, []
    for entry in Manifest(uri).entries():
        with storage.open_input(storage.join(uri, entry["file"])) as file:
            found += pq.read_table(file).to_pylist()
    return found


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return storage.join(request.getfixturevalue("bucket"), "out")


def test_a_data_set_and_its_bytes(output: str, tmp_path: Path) -> None:
    config = configure(output)
    entries = make(config)
    assert [entry["rows"] for entry in entries] == [4, 2]
    assert storage.list_files(storage.join(output, "data")) == [
        "shard-00000000.parquet",
        "shard-00000001.parquet",
    ]
    records = rows(config)
    assert [(r["prompt"], r["seed"]) for r in records] == [
        (prompt, seed) for prompt in config.prompts.inline for seed in (1, 2)
    ]
    for record in records:
        image = Image.open(io.BytesIO(record["image"]["bytes"]))
        assert image.size == (64, 64)
        assert record["status"] == "ok"
        assert hashlib.sha256(record["image"]["bytes"]).hexdigest() == record["image_sha256"]
    assert len({record["image_id"] for record in records}) == 6

    # The same job elsewhere, its shards in another order: the same bytes.
    other = configure(str(tmp_path / "other"))
    make(other, [1, 0])
    for entry in entries:
        theirs = storage.read_bytes(storage.join(other.output.uri, entry["file"]))
        assert hashlib.sha256(theirs).hexdigest() == entry["sha256"]

    # Run again: nothing is made; a lost entry brings back just that shard.
    before = Manifest(output).sha256(0)
    assert [entry["generation"] for entry in make(config)] == [0, 0]
    assert Manifest(output).sha256(0) == before
    storage.forget_connections()
    storage.remove(storage.join(output, "manifest", "00000001.json"))
    assert [entry["shard"] for entry in make(config)] == [0, 1]
    assert storage.list_files(storage.join(output, "attempts")) == []
    assert "4 images" not in dataset_report.write(output)
    assert storage.exists(storage.join(output, "index.html"))


def test_a_run_that_ended_before_its_snapshot_goes_on(tmp_path: Path) -> None:
    config = configure(str(tmp_path / "out"))
    job.prepare(config)
    snapshot = tmp_path / "out" / "prompts" / "segment-000.parquet"
    snapshot.unlink()
    assert [entry["rows"] for entry in make(config)] == [4, 2]
    assert snapshot.is_file()


def test_another_job_is_refused_with_the_difference(tmp_path: Path) -> None:
    make(configure(str(tmp_path / "out")), [1])
    changed = configure(str(tmp_path / "out"), sampler={"name": "euler", "steps": 3})
    with pytest.raises(ValueError, match=r"job.sampler.steps: 2 there, 3 now"):
        job.prepare(changed)
    job.prepare(configure(str(tmp_path / "out"), workers={"min": 2}))  # how, not what


def test_image_to_image_from_a_folder_and_bad_pictures(tmp_path: Path, picture: Any) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture(1).save(pictures / "a.png")
    whole = (pictures / "a.png").read_bytes()
    (pictures / "b.png").write_bytes(whole[:300])
    config = configure(
        str(tmp_path / "out"),
        prompts={"inline": ["a red star"]},
        seeds={"count": 1},
        init={"uri": str(pictures), "strength": 0.5},
    )
    (entry,) = make(config)
    assert (entry["rows"], entry["failed"]) == (2, 1)
    good, bad = rows(config)
    assert (good["status"], good["init_image"], good["strength"]) == ("ok", "a.png", 0.5)
    assert (bad["status"], bad["image"]) == ("failed", None)
    assert "init image cannot be read" in bad["error"]
    assert str(tmp_path) not in bad["error"]


def test_rows_with_bad_values_fail_alone(tmp_path: Path) -> None:
    prompts = tmp_path / "p.csv"
    long = "word " * 200
    prompts.write_text(
        f"prompt,width,init_image,steps,topic\ngood,64,,2,x\nwide,70,,2,x\n"
        f"gone,,none.png,2,y\n{long},,,2,y\n"
    )
    config = configure(str(tmp_path / "out"), prompts={"uri": str(prompts)}, seeds={"count": 1})
    make(config)
    good, wide, gone, long_row = rows(config)
    assert (good["status"], good["topic"], good["warnings"]) == ("ok", "x", None)
    assert "width is 70; it must be a multiple of 8" in wide["error"]
    assert "init image cannot be read" in gone["error"]
    assert "cut after 75 tokens" in long_row["warnings"]
    assert long_row["status"] == "ok"


def test_huggingface_loads_it_as_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    config = configure(str(tmp_path / "out"))
    make(config)
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/data/*", cache_dir=str(tmp_path / "cache")
    )["train"]
    assert len(loaded) == 6
    assert loaded[0]["image"].size == (64, 64)


def test_weighted_prompts_are_played_back_from_their_pictures(tmp_path: Path) -> None:
    prompts = {"inline": ["a (red:1.4) star", "a photo of a ring, " * 20], "syntax": "a1111"}
    config = configure(str(tmp_path / "out"), prompts=prompts, seeds={"start": 1})
    make(config)
    plain = configure(str(tmp_path / "plain"), prompts={"inline": ["a (red:1.4) star"]})
    make(plain)
    (weighted, long), of_plain = rows(config), rows(plain)
    assert [row["prompt_syntax"] for row in (weighted, long)] == ["a1111", "a1111"]
    assert weighted["warnings"] is long["warnings"] is None
    assert "prompt_syntax" not in of_plain[0]
    assert weighted["image_id"] != of_plain[0]["image_id"]
    assert weighted["phash"] is not None
    assert weighted["image_sha256"] != of_plain[0]["image_sha256"]

    folder = tmp_path / "pictures"
    folder.mkdir()
    made = [weighted, long, *of_plain]
    for number, row in enumerate(made):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
    again = configure(str(tmp_path / "again"), prompts={"uri": str(folder)}, seeds={"count": 1})
    make(again)
    found = rows(again)
    assert [row["picture"] for row in found] == ["0.png", "1.png", "2.png", "3.png"]
    for name in ("image_id", "image_sha256", "prompt", "seed", "sampler"):
        assert [row[name] for row in found] == [row[name] for row in made]


def test_what_rows_leave_out_is_in_their_records_and_pictures(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a", "guidance_interval": [0, 0.5]}\n{"prompt": "a"}\n')
    changes = {"parameters": {"cache_interval": [1, 2]}, "seeds": {"start": 4}}
    config = configure(str(tmp_path / "out"), prompts={"uri": str(prompts)}, **changes)
    make(config)
    made = rows(config)
    assert [(row["guidance_interval"], row["cache_interval"]) for row in made] == [
        ([0, 0.5], 1),
        ([0, 0.5], 2),
        (None, 1),
        (None, 2),
    ]
    for name in ("image_id", "image_sha256"):
        assert len({row[name] for row in made}) == 4
    plain = configure(str(tmp_path / "plain"), prompts={"inline": ["a"]}, seeds=changes["seeds"])
    make(plain)
    (of_plain,) = rows(plain)
    assert "cache_interval" not in of_plain
    for name in ("image_id", "image_sha256"):
        assert made[2][name] == of_plain[name]

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, row in enumerate(made):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
    again = configure(str(tmp_path / "again"), prompts={"uri": str(folder)}, seeds={"count": 1})
    make(again)
    for name in ("image_id", "image_sha256", "guidance_interval"):
        assert [row[name] for row in rows(again)] == [row[name] for row in made]


def test_a_sampler_of_a_row_is_checked_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,sampler\na star,heun\na ring,edm_euler\n")
    config = configure(str(tmp_path / "out"), prompts={"uri": str(path)})
    with pytest.raises(BadInput, match=r"column sampler of .*p.csv: sampler 'edm_euler' does not"):
        job.prepare(config)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
