"""Export: what is chosen, converted and split; resume; what other software loads."""

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset import records
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.tools import export
from rayjobs.generation.tools.export_config import ExportConfig
from rayjobs.generation.tools.verify import verify
from rayjobs.generation.worker.shards import ShardWorker
from rayjobs.quality import duplicates

pytestmark = pytest.mark.model

PROMPTS = "prompt,width,topic\na red star,,sky\na blue ring,,shape\na wide star,70,sky\n"


def configure(folder: Path, **output: Any) -> GenerateConfig:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"uri": str(folder / "p.csv")},
        "seeds": {"count": 6},
        "sampler": {"name": "euler", "steps": 2, "guidance_scale": 1.0},
        "output": {"uri": str(folder / "source"), "images_per_shard": 4} | output,
        "engine": {"batch_size": 4},
    }
    return GenerateConfig.model_validate(values)


def generate(folder: Path, num_shards: int = 5, **output: Any) -> str:
    """A data set of 18 records in 5 shards, of which the last 6 records failed."""
    (folder / "p.csv").write_text(PROMPTS)
    config = configure(folder, **output)
    lock = job.prepare(config)
    list(ShardWorker(config, lock).make(range(num_shards)))
    return config.output.uri


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = generate(tmp_path_factory.mktemp("source"))
    duplicates.write(uri)
    return uri


def rows(uri: str, form: str = "parquet") -> list[dict[str, Any]]:
    manifest = Manifest(uri, form)
    shards = [entry["shard"] for entry in manifest.entries() if entry["rows"]]
    return [row for shard in shards for row in FORMATS[form].read(manifest.data, shard)]


def configure_export(target: str | Path, **changes: Any) -> ExportConfig:
    output = {"uri": str(target)} | changes.pop("output", {})
    return ExportConfig.model_validate({"output": output} | changes)


def test_good_records_as_they_are(source: str, tmp_path: Path) -> None:
    summary = export.run(source, configure_export(tmp_path / "out"))
    assert (summary.num_records, summary.num_missing, summary.splits) == (12, 0, {"train": 12})
    assert rows(str(tmp_path / "out")) == [r for r in rows(source) if r["status"] == "ok"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()}
    assert export.run(source, configure_export(tmp_path / "out")).num_records == 12
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()} == before


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["prompt contains star"], range(6)),
        (["seed in 1, 3", "topic == sky"], [1, 3]),
        (["seed >= 2.5", "blank == false", "topic != 'sky'"], [9, 10, 11]),
        (["status == failed"], range(12, 18)),
        (["status in ok, failed", "seed < 1"], [0, 6, 12]),
        (["error contains width"], []),
        (["negative_prompt != x"], []),
    ],
)
def test_conditions(source: str, tmp_path: Path, where: list[str], expected: Any) -> None:
    export.run(source, configure_export(tmp_path, where=where))
    assert [row["record"] for row in rows(str(tmp_path))] == list(expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"where": ["clip_score > 0.2"]}, "no column 'clip_score'; there are image, image_id"),
        ({"where": ["seed == red"]}, "'seed == red' does not fit .* int64"),
        ({"where": ["blank > true"]}, "blank.*bool"),
        ({"where": ["seed contains 1"]}, "'seed', which is int64"),
        ({"where": ["image == x"]}, "image"),
        ({"columns": ["topics"]}, "columns: there is no 'topics'; there are"),
    ],
)
def test_what_does_not_fit_is_named(source: str, tmp_path: Path, changes: Any, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        export.run(source, configure_export(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists() or not storage.list_files(str(tmp_path / "out"))


def test_overrides_and_their_mistakes() -> None:
    config = export.load(
        ["output.uri=out", "where=[seed >= 1, prompt contains star]", "splits={a: 0.5, b: 0.5}"]
    )
    assert config.where == ("seed >= 1", "prompt contains star")
    assert config.splits == {"a": 0.5, "b": 0.5}
    for overrides, named in [
        (["splits={a: 0.5}"], "splits: the shares sum to 0.5"),
        (["where=seed = 1"], "'seed = 1' is no condition"),
        (["output.sizes=3"], "unknown key; did you mean 'size'"),
    ]:
        with pytest.raises(BadInput, match=named) as caught:
            export.load(["output.uri=out", *overrides])
        assert "/dev/null" not in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_others_load_its_splits(source: str, tmp_path: Path, form: str) -> None:
    target = tmp_path / "out"
    output = {"format": form, "image_format": "jpeg", "size": 32}
    config = configure_export(target, output=output, splits={"train": 0.6, "test": 0.4})
    summary = export.run(source, config)
    assert sum(summary.splits.values()) == 12
    assert min(summary.splits.values()) > 0
    loaded = datasets.load_dataset(str(target), cache_dir=str(tmp_path / "cache"))
    assert {name: part.num_rows for name, part in loaded.items()} == summary.splits
    for part in loaded.values():
        image = part[0]["jpg" if form == "webdataset" else "image"]
        assert image.size == (32, 32)
    for row in rows(str(target), form):
        data = row["image"]["bytes"]
        assert (row["width"], Image.open(io.BytesIO(data)).format) == (32, "JPEG")
        assert row["image_sha256"] == hashlib.sha256(data).hexdigest()


def test_a_part_of_the_columns_without_duplicates(source: str, tmp_path: Path) -> None:
    config = configure_export(tmp_path / "out", columns=["seed"], drop_duplicates=True)
    summary = export.run(source, config)
    found = rows(str(tmp_path / "out"))
    assert list(found[0]) == ["image", "record", "prompt", "seed"]
    groups = pq.read_table(Path(source) / "duplicates.parquet")["group"].to_pylist()
    assert summary.num_records == 12 - (len(groups) - len(set(groups)))
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(BadInput, match=r"duplicates.parquet is missing; `rayjobs report"):
        export.run(generate(other, 0), config)


def test_only_the_first_of_a_group_is_kept(tmp_path: Path) -> None:
    uri = generate(tmp_path)
    members = {"group": [0, 0, 0, 1, 1], "record": [7, 2, 5, 3, 11]}
    rest = {"image_id": [""] * 5, "file": [""] * 5, "distance": [0] * 5}
    pq.write_table(pa.table(members | rest), Path(uri) / "duplicates.parquet")
    export.run(uri, configure_export(tmp_path / "out", drop_duplicates=True))
    left = [row["record"] for row in rows(str(tmp_path / "out"))]
    assert left == [0, 1, 2, 3, 4, 6, 8, 9, 10]


def test_what_shows_the_same_is_dropped_where_that_is_asked(tmp_path: Path) -> None:
    uri = generate(tmp_path)
    config = configure_export(tmp_path / "out", drop_duplicates="semantic")
    with pytest.raises(BadInput, match=r"semantic.parquet is missing; `rayjobs report"):
        export.run(uri, config)
    pq.write_table(pa.table({"group": [0, 0], "record": [3, 8]}), Path(uri) / "semantic.parquet")
    export.run(uri, config)
    assert 8 not in [row["record"] for row in rows(str(tmp_path / "out"))]
    with pytest.raises(BadInput, match="drop_duplicates: "):
        export.run(uri, configure_export(tmp_path / "out"))


def test_another_export_is_refused_with_the_difference(source: str, tmp_path: Path) -> None:
    export.run(source, configure_export(tmp_path / "out", where=["seed == 1"]))
    with pytest.raises(BadInput, match=r'where: \["seed == 1"\] there, \["seed == 2"\] now'):
        export.run(source, configure_export(tmp_path / "out", where=["seed == 2"]))
    with pytest.raises(BadInput, match="holds a generated data set"):
        export.run(source, configure_export(source))


def test_it_goes_on_and_follows_shards_that_were_made_again(tmp_path: Path) -> None:
    uri = generate(tmp_path, 2, format="webdataset", image_format="jpeg")
    config = configure_export(tmp_path / "out", where=["status in ok, failed", "seed == 0"])
    assert (s := export.run(uri, config)).num_missing == 3
    assert s.num_records == 2
    generate(tmp_path, 5, format="webdataset", image_format="jpeg")
    assert (s := export.run(uri, config)).num_missing == 0
    assert s.num_records == 3
    assert [row["topic"] for row in rows(config.output.uri)] == ["sky", "shape", "sky"]
    # The next generation of some shards: the conditions hold of all of their records, or of none.
    source = Manifest(uri, "webdataset")
    schema = records.schema([pa.field("topic", pa.string())])
    for shard, seed in ((0, 0), (1, 1), (2, 0)):
        old = source.entry(shard)
        assert old is not None
        changed = [
            r | {"seed": seed} for r in source.format.read(source.data, shard, schema=schema)
        ]
        facts = {k: old[k] for k in ("rows", "failed", "seconds", "finished_at", "class")}
        source.replace(old, source.format.encode(shard, changed, schema), facts)
    export.run(uri, config)
    assert [row["record"] for row in rows(config.output.uri)] == [0, 1, 2, 3, 8, 9, 10, 11, 12]
    data = {name.split(".")[0] for name in storage.list_files(str(tmp_path / "out" / "data"))}
    assert data == {f"shard-{number:08d}" for number in (0, 2, 3)}


def test_splits_on_s3(source: str, bucket: str) -> None:
    target = storage.join(bucket, "out")
    splits = {"train": 0.5, "val": 0.25, "test": 0.25}
    summary = export.run(source, configure_export(target, splits=splits))
    assert summary.num_records == 12
    card = storage.read_bytes(storage.join(target, "README.md")).decode()
    assert "data/shard-0000000[0-9].parquet" in card
    by_split: dict[int, set[str]] = {}
    for entry in Manifest(target).entries():
        if entry["rows"]:
            found = FORMATS["parquet"].read(storage.join(target, "data"), entry["shard"])
            by_split.setdefault(entry["shard"] // 10, set()).update(r["image_id"] for r in found)
    assert sum(map(len, by_split.values())) == len(set.union(*by_split.values())) == 12


def test_lance(source: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on the way and run again: nobody reads a part, and then all of it is there."""
    uri, written = f"{bucket}/lance", list[int]()
    config = configure_export(uri, output={"format": "lance"}, splits={"train": 0.5, "test": 0.5})

    def die(self: Manifest, shard: int, *args: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return commit(self, shard, *args)

    commit = Manifest.commit
    monkeypatch.setattr(Manifest, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        export.run(source, config)
    assert not storage.list_files(f"{uri}/_versions")
    monkeypatch.setattr(Manifest, "commit", commit)
    counts = export.run(source, config).splits
    assert sum(counts.values()) == 12

    def read(version: Any = None) -> Any:
        options = {"aws_endpoint": os.environ["AWS_ENDPOINT_URL"], "allow_http": "true"}
        return lance.dataset(uri, version, storage_options=options)

    good = [row for row in rows(source) if row["status"] == "ok"]
    assert sorted(read().to_table().to_pylist(), key=lambda row: row["record"]) == good
    assert {name: read(name).count_rows() for name in counts} == counts
    version = read().version
    export.run(source, config)
    assert read().version == version
    assert verify(uri).faults == []


@pytest.mark.slow
def test_lance_whose_process_is_killed_at_any_time(source: str, tmp_path: Path) -> None:
    """As soon as a file of a kind is there: a shard, an entry, Lance's own first and last ones."""
    good = [row for row in rows(source) if row["status"] == "ok"]
    command = [sys.executable, "-m", "rayjobs", "export", source, "output.format=lance"]
    for number, seen in enumerate(("data/*", "manifest/*", "_versions/*", "README.md", "*.none")):
        target = tmp_path / str(number)
        with subprocess.Popen([*command, f"output.uri={target}"]) as process:
            while process.poll() is None:
                if any(target.glob(seen)):
                    process.kill()
        subprocess.run([*command, f"output.uri={target}"], check=True)
        found = lance.dataset(str(target)).to_table().to_pylist()
        assert sorted(found, key=lambda row: row["record"]) == good
        assert verify(str(target)).faults == []


def test_lance_files_load_by_split(source: str, tmp_path: Path) -> None:
    splits = {"train": 0.5, "test": 0.5}
    done = export.run(source, configure_export(tmp_path, output={"format": "lance"}, splits=splits))
    loaded = datasets.load_dataset(str(tmp_path))
    assert {name: len(part) for name, part in loaded.items()} == done.splits
    assert loaded["train"][0]["image"].height == 64
