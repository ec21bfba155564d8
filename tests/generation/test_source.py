"""Prompt files of every format give the same prompts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayjobs.config import BadInput
from rayjobs.generation.config import PromptsConfig
from rayjobs.generation.source import Snapshot, write_snapshot

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
