"""Prompt files of every format give the same prompts, and say what is wrong with them."""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.generation.config import PromptsConfig
from rayjobs.generation.prompts.snapshot import (
    ROWS_PER_GROUP,
    ImageNames,
    Snapshot,
    check_numbers,
    write_names,
    write_snapshot,
)

PROMPTS = ['a "red" star', "ein blauer Stern, groß", '"quoted" at its start']


def snapshot(tmp_path: Path, **config: object) -> Snapshot:
    path = str(tmp_path / "snapshot.parquet")
    write_snapshot(PromptsConfig.model_validate(config), path)
    return Snapshot(path)


def write(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"prompts.{kind}"
    rows = [{"Prompt": prompt, "seed": n} for n, prompt in enumerate(PROMPTS)]
    if kind == "txt":
        path.write_text("\ufeff" + "\r\n".join([*PROMPTS, "", "  "]), "utf-8")
    elif kind == "csv":
        quoted = ('"{}",{}'.format(row["Prompt"].replace('"', '""'), row["seed"]) for row in rows)
        path.write_text("\n".join(["Prompt,seed", *quoted]), "utf-8")
    elif kind == "tsv":
        path.write_text("\n".join(["Prompt\tseed", *(f"{r['Prompt']}\t{r['seed']}" for r in rows)]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_format(tmp_path: Path, kind: str) -> None:
    found = snapshot(tmp_path, uri=str(write(tmp_path, kind)))
    rows = [found.row(n) for n in range(len(found))]
    assert [row["prompt"] for row in rows] == PROMPTS
    if kind != "txt":
        assert [row["seed"] for row in rows] == [0, 1, 2]


def test_a_spreadsheets_quotes_are_undone(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text('prompt\tnote\n"a ""red"" star"\tx\n')
    assert snapshot(tmp_path, uri=str(path)).row(0) == {"prompt": 'a "red" star', "note": "x"}


def test_a_named_column_and_the_others(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a star", "score": 0.5}\n{"text": "a ring", "score": 1}\n')
    found = snapshot(tmp_path, uri=str(path), column="text")
    assert found.row(1) == {"prompt": "a ring", "score": 1.0}
    assert [field.name for field in found.passed_through] == ["score"]
    with pytest.raises(BadInput, match=r"no column 'words'; it has text, score"):
        snapshot(tmp_path, uri=str(path), column="words")


def test_real_prompts(tmp_path: Path) -> None:
    path = Path("../shared/data/prompts/PartiPrompts.tsv")
    if not path.exists():
        pytest.skip("the real prompts are not at hand")
    assert len(snapshot(tmp_path, uri=str(path))) == 1632


def rows_of(found: Snapshot) -> list[dict[str, Any]]:
    return [found.row(n) for n in range(len(found))]


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_compressed_files(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    whole = path.read_bytes()
    zipped = tmp_path / f"prompts.{kind}.gz"
    zipped.write_bytes(gzip.compress(whole))
    found = snapshot(tmp_path, uri=str(zipped))
    assert [row["prompt"] for row in rows_of(found)] == PROMPTS
    zipped.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(BadInput, match=rf"cannot be read as {kind}: Compressed file ended"):
        snapshot(tmp_path, uri=str(zipped))


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    (folder / "sub").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["a", "b"], "n": [1, 2]}), folder / "0.parquet")
    pq.write_table(pa.table({"prompt": ["c"], "n": [2.5]}), folder / "sub" / "1.parquet")
    (folder / "_SUCCESS.parquet").write_text("no parquet")
    found = snapshot(tmp_path, uri=str(folder))
    assert [(row["prompt"], row["n"]) for row in rows_of(found)] == [("a", 1), ("b", 2), ("c", 2.5)]
    pq.write_table(pa.table({"prompt": ["d"], "n": ["x"]}), folder / "2.parquet")
    with pytest.raises(BadInput, match=r"2\.parquet, row 1: n is string, in rows before int64"):
        snapshot(tmp_path, uri=str(folder))


def test_files_on_s3(bucket: str, tmp_path: Path) -> None:
    path = write(tmp_path, "csv")
    for uri in (f"{bucket}/p.csv", f"{bucket}/p.csv.gz"):
        data = path.read_bytes()
        storage.write_bytes(uri, gzip.compress(data) if uri.endswith("gz") else data)
        assert [row["prompt"] for row in rows_of(snapshot(tmp_path, uri=uri))] == PROMPTS
    storage.put_file(f"{bucket}/all/0.parquet", write(tmp_path, "parquet"))
    assert len(snapshot(tmp_path, uri=f"{bucket}/all")) == len(PROMPTS)


def test_types_do_not_depend_on_where_chunks_end(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for place in (1, ROWS_PER_GROUP - 1, ROWS_PER_GROUP, 2 * ROWS_PER_GROUP + 1):
        rows: list[dict[str, Any]] = [
            {"prompt": "x", "n": k} for k in range(2 * ROWS_PER_GROUP + 5)
        ]
        rows[place] |= {"n": 0.5, "late": ["tag"], "deep": {"a": 1}, "none": None}
        path.write_text("\n".join(map(json.dumps, rows)))
        found = snapshot(tmp_path, uri=str(path))
        assert [str(field.type) for field in found.passed_through] == [
            "double",
            "list<element: string>",
            "struct<a: int64>",
            "string",
        ]
        assert len(found) == len(rows)
        assert found.row(place) == rows[place]
        assert found.row(len(rows) - 1) == rows[-1] | {"late": None, "deep": None, "none": None}


def test_blank_rows_leave_no_gap(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n \n".join(f"p{n}" for n in range(3 * ROWS_PER_GROUP)))
    found = snapshot(tmp_path, uri=str(path))
    assert len(found) == 3 * ROWS_PER_GROUP
    for n in (0, 1, ROWS_PER_GROUP - 1, ROWS_PER_GROUP, 3 * ROWS_PER_GROUP - 1):
        assert found.row(n) == {"prompt": f"p{n}"}
    path = tmp_path / "p.csv"
    path.write_text("prompt,note\na,x\n\n,\nb,y\n")
    assert [row["prompt"] for row in rows_of(snapshot(tmp_path, uri=str(path)))] == ["a", "b"]


def test_a_snapshot_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    hashes = set()
    for _ in range(2):
        snapshot(tmp_path, uri=str(path))
        hashes.add(hashlib.sha256((tmp_path / "snapshot.parquet").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_a_tables_own_ways_of_storing_are_undone(tmp_path: Path) -> None:
    columns = {
        "prompt": pa.array(["a", "b"]).dictionary_encode(),
        "steps": pa.array([20.0, None]),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "tags": pa.array([["t"], []]),
        "day": pa.array([0, 1], pa.date32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    found = snapshot(tmp_path, uri=str(tmp_path / "p.parquet"))
    assert found.row(0)["steps"] == 20
    assert found.row(1)["steps"] is None
    kinds = {field.name: str(field.type) for field in found.passed_through}
    assert (kinds["kind"], kinds["day"]) == ("string", "date32[day]")
    assert found.row(0)["tags"] == ["t"]


def test_useless_values_are_left_to_their_records(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,width,steps,guidance_scale,strength\na,70,0,nan,9\nb,-8,2000,-1,0\n")
    found = snapshot(tmp_path, uri=str(path))
    assert (found.row(0)["width"], found.row(0)["steps"], found.row(1)["steps"]) == (70, 0, 2000)


TEXTS = {
    "latin.txt": (
        "a\ncaf\u00e9\n".encode("latin-1"),
        "line 2: byte 4 (0xe9) is not UTF-8, perhaps W",
    ),
    "wide.csv": (
        "prompt\na\n".encode("utf-16"),
        "line 1: byte 1 (0xff) is not UTF-8, perhaps UTF-16",
    ),
    "nul.txt": (b"a\nb\0c\n", "line 2: has a NUL character"),
    "nul.jsonl": (rb'{"prompt": "a\u0000"}', "line 1: prompt has 'a\\x00', which has a NUL"),
    "half.jsonl": (rb'{"prompt": "\ud800"}', "which is not valid text: half of a surrogate"),
    "empty.csv": (b"", "empty.csv is empty; its first line must name the columns"),
    "empty.txt": (b"", "there is no prompt in"),
    "empty.parquet": (b"", "cannot be read as parquet: Parquet file size is 0 bytes"),
    "no.parquet": (b"prompt\na star\n", "cannot be read as parquet"),
    "no.gz.txt.gz": (b"a star", "cannot be read as txt: Not a gzipped file"),
    "what.doc": (b"a star", "is none of txt, csv"),
    "column.csv": (b"text\na\n", "has no column 'prompt'; it has text"),
    "twice.csv": (b"prompt,seed, seed\na,1,2\n", "has the column 'seed' twice"),
    "twice.tsv": (b"prompt\tx\tx\na\t1\t2\n", "has the column 'x' twice"),
    "nameless.csv": (b",prompt\n0,a\n", "column 1 has no name"),
    "more.csv": (b"prompt,x\na,1\nb, c,2\n", "line 3: has 3 fields where the header has 2; quote"),
    "less.tsv": (b"prompt\tx\na\n", "line 2: has 1 fields where the header has 2; check the tabs"),
    "open.csv": (b'prompt,x\na,1\n"b,2\nc,3\n', "line 3: cannot be read as csv"),
    "bare.csv": (b"prompt,x\n,1\n", "line 2: has no prompt, but x"),
    "bare.jsonl": (b'{"prompt": "a"}\n\n{"seed": 3}\n', "line 3: has no prompt, but seed"),
    "list.jsonl": (b'{"prompt": "a"}\n["b"]\n', "line 2: is a list, not an object such as"),
    "cut.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "line 2: cannot be read as jsonl"),
    "key.jsonl": (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
    "number.jsonl": (b'{"prompt": 5}', "line 1: prompt has 5, which is not text"),
    "steps.jsonl": (b'{"prompt": "a", "steps": "9"}', "steps has '9', which is not a number"),
    "shares.csv": (
        b"prompt,guidance_interval\na,0.2\n",
        "guidance_interval has '0.2', which is not a list of numbers, such as [0.2, 0.8]",
    ),
    "shares.jsonl": (
        b'{"prompt": "a", "guidance_interval": [0.2, "x"]}',
        "guidance_interval has [0.2, 'x'], which is not a number",
    ),
    "sigmas.csv": (b"prompt,sigmas\na,1\n", "has a column 'sigmas', which the records need"),
    "bool.jsonl": (b'{"prompt": "a", "steps": true}', "steps has True, which is not a number"),
    "half_seed.jsonl": (
        b'{"prompt": "a", "seed": 2.5}',
        "seed has 2.5, which is not a whole number",
    ),
    "float_seed.jsonl": (b'{"prompt": "a", "seed": 1e18}', "which is not a whole number"),
    "minus.csv": (
        b"prompt,seed\na,1\nb,-1\n",
        "line 3: seed has '-1', but a seed is in 0 .. 2**63",
    ),
    "large.csv": (b"prompt,seed\na,9223372036854775808\n", "but a seed is in 0 .. 2**63 - 1"),
    "steps.csv": (b"prompt,steps\na,99999999999\n", "which is far too large"),
    "word.csv": (b"prompt,strength\na,much\n", "strength has 'much', which is not a number"),
    "case.csv": (b"prompt,Seed\na,1\n", "has a column 'Seed', which overrides nothing; write it"),
    "taken.csv": (b"prompt,image_id\na,1\n", "has a column 'image_id', which the records need"),
    "mixed.jsonl": (
        b'{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "x"}\n',
        "line 2: n is 'x', which int64 of other rows cannot hold; write it as text",
    ),
    "truth.jsonl": (
        b'{"prompt": "a", "n": 0.5}\n{"prompt": "b", "n": true}\n',
        "line 2: n is True, which double of other rows cannot hold",
    ),
    "vast.jsonl": (b'{"prompt": "a", "n": 99999999999999999999}', "line 1: n is 9999"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 100_000, "line 1: cannot be read as jsonl"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    data, told = TEXTS[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        snapshot(tmp_path, uri=str(path))
    assert told in str(caught.value)
    assert name in str(caught.value)


def test_a_mistake_far_down_is_found(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "x", "n": k} for k in range(3 * ROWS_PER_GROUP)]
    rows[2 * ROWS_PER_GROUP + 7]["n"] = "seven"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match=f"line {2 * ROWS_PER_GROUP + 8}: n is 'seven'"):
        snapshot(tmp_path, uri=str(path))


def test_parquet_columns_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "x", "x"])
    kind = pa.map_(pa.string(), pa.int64())
    cases = [
        (twice, "has the column 'x' twice"),
        (pa.table({"prompt": [1, 2]}), "row 1: prompt has 1, which is not text"),
        (pa.table({"prompt": ["a", "b"], "seed": [1.0, 2.5]}), "row 2: seed has 2.5"),
        (pa.table({"prompt": ["a"], "m": pa.array([[("k", 1)]], kind)}), "column m holds map<"),
    ]
    for table, told in cases:
        pq.write_table(table, path)
        with pytest.raises(BadInput) as caught:
            snapshot(tmp_path, uri=str(path))
        assert told in str(caught.value)


def test_a_named_column_beside_one_called_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("text,prompt\na,b\n")
    with pytest.raises(BadInput, match=r"has a column 'prompt', but prompts\.column is 'text'"):
        snapshot(tmp_path, uri=str(path), column="text")


def test_names_are_a_sequence(tmp_path: Path) -> None:
    names = [f"{n:05}.png" for n in range(2 * ROWS_PER_GROUP + 3)]
    path = str(tmp_path / "names.parquet")
    assert write_names(iter(names), path) == len(names)
    found = ImageNames(path)
    assert len(found) == len(names)
    assert (found[0], found[-1], found[ROWS_PER_GROUP]) == (names[0], names[-1], "04096.png")
    assert found[3:6] == names[3:6]
    assert list(found) == names
    with pytest.raises(IndexError):
        found[len(names)]
    assert write_names([], path) == 0
    assert list(ImageNames(path)) == []


def test_numbers_that_json_readers_cannot_hold(tmp_path: Path) -> None:
    path = str(tmp_path / "s.parquet")
    for kind, small, large in [
        (pa.uint64(), 2**63 - 1, 2**63),
        (pa.struct([("u", pa.list_(pa.uint64()))]), {"u": [1]}, {"u": [1, 2**64 - 1]}),
    ]:
        pq.write_table(pa.table({"k": pa.array([small, None], kind)}), path)
        check_numbers(path)
        pq.write_table(pa.table({"k": pa.array([None, large], kind)}), path)
        with pytest.raises(BadInput, match=r"'k.* has the number \d+, which .*format=parquet"):
            check_numbers(path)


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_empty_objects_may_come_first(tmp_path: Path) -> None:
    """What is in them shows more than a chunk of rows later."""
    empty = [{"prompt": "a", "m": {}, "n": [{}]}] * 4096
    later = {"prompt": "b", "m": {"a": 1}, "n": [{"b": {"c": "x"}}]}
    (tmp_path / "p.jsonl").write_text(lines(*[{}] * 4096, *empty, later))
    total = write_snapshot(PromptsConfig(uri=f"{tmp_path}/p.jsonl"), f"{tmp_path}/s")
    rows = Snapshot(f"{tmp_path}/s")
    assert (total, rows.row(4096)) == (4097, later)
    assert rows.row(0) == {"prompt": "a", "m": {"a": None}, "n": [{"b": None}]}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", lines({"prompt": "a", "m": {}}), "m has only {} in it; drop it"),
        ("a.csv", "prompt;seed\na;1\n", "separated by ';', not as in csv; write commas"),
        ("b.csv", "prompt\tseed\na\t1\n", "name a tab-separated file .tsv"),
        ("a.tsv", "prompt,seed\na,1\n", "separated by ',', not as in tsv; write tabs"),
        ("c.csv", "prompt,seed\ra,1\rb,2\r", "its lines end as old Macs' do; convert it: tr"),
        (
            "p.parquet",
            "version https://git-lfs.github.com/spec/v1\n",
            "fetch it with: git lfs pull",
        ),
    ],
)
def test_hints_are_right(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(BadInput, match=re.escape(told)):
        write_snapshot(PromptsConfig(uri=f"{tmp_path}/{name}"), f"{tmp_path}/s")


def test_long_cells_and_folders_that_are_columns(tmp_path: Path) -> None:
    long = "word " * 40_000
    (tmp_path / "a.csv").write_text(f'prompt,t\n"{long}",1\n')
    assert write_snapshot(PromptsConfig(uri=f"{tmp_path}/a.csv"), f"{tmp_path}/s") == 1
    assert Snapshot(f"{tmp_path}/s").row(0)["prompt"] == long
    for folder in ("lang=d%20e/y=1", "lang=en/y=2", "lang=__HIVE_DEFAULT_PARTITION__/y=3"):
        path = tmp_path / "hive" / folder / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"prompt": ["a"], "y": [7]}), path)
    write_snapshot(PromptsConfig(uri=f"{tmp_path}/hive"), f"{tmp_path}/s")
    rows = Snapshot(f"{tmp_path}/s")
    assert [rows.row(n)["lang"] for n in range(3)] == [None, "d e", "en"]
    assert rows.row(0)["y"] == 7, "the file's own column wins"
