"""The report: what it shows, what it reads again, and that a browser shows it from disk."""

import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayjobs import storage
from rayjobs.dataset import lock, records
from rayjobs.dataset.formats import FORMATS
from rayjobs.reports import contact_sheet, dataset_report
from rayjobs.reports.history import History

NASTY = "a </script><img src=x onerror=alert(1)> \"quoted\" & 'so' 🦊 \u2028 " + "long " * 1000
SUFFIX = {"parquet": ".parquet", "webdataset": ".tar", "folder": ""}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def row(record: int, image: bytes | None, **columns: Any) -> dict[str, Any]:
    known = {"record": record, "prompt": f"prompt {record // 8}", "seed": record % 8, "steps": 20}
    known |= {"sampler": "euler", "guidance_scale": 5.0, "width": 64, "height": 64, "blank": False}
    known |= {"status": "ok", "error": None, "warnings": None, "negative_prompt": ""}
    if image is None:
        known |= {"status": "failed", "error": f"row {record}: cannot decode 'pic{record}.png'"}
    return known | {"image": image and {"bytes": image, "path": None}} | columns


def put(uri: str, shard: int, rows: list[dict[str, Any]], form: str = "parquet") -> dict[str, Any]:
    """Store a finished shard and its manifest entry, as a worker would have."""
    schema = records.schema()
    files = FORMATS[form].encode(shard, rows, schema)
    for name, data in files.items():
        storage.write_bytes(storage.join(uri, "data", name), data)
    entry = {
        "shard": shard,
        "generation": 0,
        "file": f"data/shard-{shard:08d}{SUFFIX[form]}",
        "sha256": hashlib.sha256(b"".join(files.values())).hexdigest(),
        "bytes": sum(map(len, files.values())),
        "rows": len(rows),
        "failed": sum(one["status"] != "ok" for one in rows),
        "seconds": 10.0 + 20 * (shard % 3 == 2),
        "worker": f"worker{shard % 3}",
        "node": f"node{shard % 2}",
        "finished_at": 1.8e9 + 10.0 * shard,
        "class": "abcdefabcdef",
        "class_changed": False,
    }
    storage.write_bytes(
        storage.join(uri, "manifest", f"{shard:08d}.json"), json.dumps(entry).encode()
    )
    return entry


def put_lock(uri: str, num_records: int, num_shards: int) -> None:
    job = {"sampler": {"name": "euler", "steps": 20}, "output": {"format": "parquet"}}
    hashes = {"prompts_sha256": "0" * 64, "model_sha256": "0" * 64}
    sizes = {"num_prompts": 1, "num_records": num_records, "num_shards": num_shards}
    segment = lock.Segment(job=job, model_name="a model", guided=True, **hashes, **sizes)
    assert lock.create_lock(lock.Lock(segments=(segment,), determinism={}), uri)


def scripts(uri: str) -> dict[str, Any]:
    """What each script under report/ hands to the page."""
    folder = storage.join(uri, "report")
    found = {}
    for name in storage.list_files(folder):
        if name.endswith(".js"):
            text = storage.read_bytes(storage.join(folder, name)).decode("ascii")
            assert "<" not in text
            match = re.fullmatch(r"report\.take\((\".*?\"),(.*)\);\n", text)
            assert match
            found[json.loads(match[1])] = json.loads(match[2])
    return found


def page_data(uri: str) -> tuple[str, dict[str, Any]]:
    page = storage.read_bytes(storage.join(uri, "index.html")).decode()
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', page)
    assert match
    return page, json.loads(match[1])


@pytest.fixture
def small(picture: Callable[[int], Image.Image]) -> Callable[[int], bytes]:
    return lambda number: png(picture(number))


@pytest.mark.parametrize("form", ["parquet", "webdataset", "folder"])
def test_counts_reasons_and_pictures_of_a_partial_data_set(
    tmp_path: Path, small: Callable[[int], bytes], form: str
) -> None:
    uri = str(tmp_path)
    for shard in (0, 2, 3):
        numbers = range(shard * 8, shard * 8 + 8)
        put(uri, shard, [row(n, None if n % 8 == 3 else small(n)) for n in numbers], form)
    put_lock(uri, 40, 5)
    assert dataset_report.write(uri) == f"{uri}/index.html"
    page, data = page_data(uri)
    assert "<b>24</b><span>images finished" in page
    assert "<b>3 of 5</b>" in page
    assert "All 24 images are shown." in page
    # Three reasons that differ in a number and a name are one.
    assert re.search(r"<summary><b>3</b> row 3: cannot decode &#x27;pic3.png&#x27;", page)
    assert "#page=1&amp;record=3" in page
    assert f"data/shard-00000002{SUFFIX[form]}" in page
    assert data["suffix"] == SUFFIX[form]
    shown = [scripts(uri)[name] for name in data["pages"][0]]
    assert [one["of"]["record"] for sheet in shown for one in sheet["rows"]] == [
        *range(8),
        *range(16, 32),
    ]
    thumbs = [one["thumb"] for sheet in shown for one in sheet["rows"]]
    assert [bool(thumb) for thumb in thumbs] == [n % 8 != 3 for n in range(24)]
    assert all(thumb.startswith("data:image/webp") for thumb in thumbs if thumb)
    assert not re.search(r"(src|href)=[\"'](https?:|/)", page)


def test_prompts_are_text_whatever_is_in_them(
    tmp_path: Path, small: Callable[[int], bytes]
) -> None:
    uri = str(tmp_path)
    seed = 2**63 - 1
    rows = [row(0, small(0), prompt=NASTY, seed=seed), row(1, None, prompt=NASTY, error=NASTY)]
    put(uri, 0, rows)
    dataset_report.write(uri)
    page, data = page_data(uri)
    assert "<img src=x" not in page
    found = scripts(uri)
    sheet = found[data["pages"][0][0]]
    assert sheet["prompts"] == [NASTY]
    assert sheet["rows"][0]["of"]["seed"] == str(seed)  # a browser's number would be rounded
    assert found[data["prompts"][0]] == [[NASTY[: contact_sheet.MAX_TEXT_LENGTH], 0]]


def test_made_again_it_reads_only_what_is_new(
    tmp_path: Path, small: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    read: list[int] = []
    rows = contact_sheet.rows

    def counted(output_uri: str, shard: int, *rest: Any) -> Iterable[dict[str, Any]]:
        read.append(shard)
        return rows(output_uri, shard, *rest)

    monkeypatch.setattr(contact_sheet, "rows", counted)
    for shard in range(3):
        put(uri, shard, [row(8 * shard + n, small(n)) for n in range(8)])
    dataset_report.write(uri)
    assert sorted(read) == [0, 1, 2]
    old = set(scripts(uri))
    put(uri, 3, [row(24 + n, small(n)) for n in range(8)])
    put(uri, 1, [row(8 + n, small(50 + n)) for n in range(8)])  # made again
    dataset_report.write(uri)
    assert sorted(read[3:]) == [1, 3]
    assert len(scripts(uri)) == len(old) + 1  # what nothing names any more is gone
    before = storage.read_bytes(storage.join(uri, "index.html"))
    dataset_report.write(uri)
    assert len(read) == 5
    assert storage.read_bytes(storage.join(uri, "index.html")) == before


def test_a_large_data_set_is_sampled_evenly_and_much_the_same_as_it_grows() -> None:
    def pictured(number: int, rows: int, most: int) -> np.ndarray:
        history = History()
        for shard in range(number):
            entry = {"shard": shard, "sha256": "0" * 64, "file": "x.parquet", "rows": rows}
            history.add(entry | {"failed": 0})
        return history.pictured(most)

    half, whole = (pictured(number, 64, 20_000) for number in (15_000, 30_000))
    assert len(whole) == 20_000 // 64
    assert np.diff(whole).max() < 3 * 30_000 / len(whole)
    # Every fourth shard begins a prompt: no place within a prompt is favoured.
    assert np.bincount(whole % 4).min() > 0.8 * len(whole) / 4
    assert len(set(half) & set(whole)) > 0.45 * len(whole)
    assert len(pictured(100, 10_000, 20_000)) == 64  # a part of each
    shown = [n for n in range(10_000) if contact_sheet.is_shown(n, 312, 10_000)]
    assert 256 <= len(shown) <= 312 + 16
    assert max(np.diff(shown)) < 1000


def test_a_sample_says_so_and_still_counts_every_failure(
    tmp_path: Path, small: Callable[[int], bytes]
) -> None:
    uri = str(tmp_path)
    for shard in range(40):
        rows = [row(8 * shard + n, small(n) if n else None) for n in range(8)]
        put(uri, shard, rows)
    dataset_report.write(uri, max_pictures=80)
    page, data = page_data(uri)
    assert "A sample: 80 of 320 images (25.00%)" in page
    assert "<summary><b>40</b>" in page
    assert len([name for names in data["pages"] for name in names]) == 10


def test_broken_shards_and_pictures_are_named_beside_the_others(
    tmp_path: Path, small: Callable[[int], bytes]
) -> None:
    uri = str(tmp_path)
    put(uri, 0, [row(n, small(n)) for n in range(4)])
    put(uri, 1, [row(4 + n, small(n)) for n in range(4)])
    put(uri, 2, [row(8, b"\x89PNG\r\n\x1a\nno picture"), row(9, small(9))])
    (tmp_path / "data" / "shard-00000001.parquet").write_bytes(b"PAR1 no parquet PAR1")
    dataset_report.write(uri)
    page, data = page_data(uri)
    assert "Shard 1 cannot be read" in page
    rows = [one for name in data["pages"][0] for one in scripts(uri)[name]["rows"]]
    assert [one["of"]["record"] for one in rows] == [0, 1, 2, 3, 8, 9]
    assert rows[4]["of"]["status"] == "unreadable"


def test_large_pictures_have_a_large_view_of_their_own(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 24, 3), np.uint8)
    image = png(Image.fromarray(noise).resize((768, 1024), Image.Resampling.BICUBIC))
    put(str(tmp_path), 0, [row(0, image, width=768, height=1024), row(1, None)])
    dataset_report.write(str(tmp_path))
    found = scripts(str(tmp_path))
    (name,) = page_data(str(tmp_path))[1]["pages"][0]
    large = found[found[name]["large"]]
    assert large[0].startswith("data:image/webp")
    assert large[1] is None
    assert len(found[name]["rows"][0]["thumb"]) < 12_000 < len(large[0]) < len(image) / 4


@pytest.mark.parametrize("name", ["duplicates", "semantic"])
def test_the_largest_groups_of_duplicates_are_shown(
    tmp_path: Path, small: Callable[[int], bytes], name: str
) -> None:
    uri = str(tmp_path)
    for shard in range(2):
        put(uri, shard, [row(4 * shard + n, small(0)) for n in range(4)])
    members = [(0, record) for record in (0, 1, 5)] + [(7, record) for record in (2, 6)]
    table = {
        "group": [group for group, _ in members],
        "record": [record for _, record in members],
        "image_id": ["x"] * 5,
        "file": [f"data/shard-{record // 4:08d}.parquet" for _, record in members],
    }
    pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    dataset_report.write(uri)
    page, data = page_data(uri)
    assert "5 images in 2 groups" in page
    assert f"<div id='{name}'>" in page
    groups = scripts(uri)[data[name]]
    assert [(one["size"], [r["record"] for r in one["rows"]]) for one in groups] == [
        (3, [0, 1, 5]),
        (2, [2, 6]),
    ]


def test_speed_counts_every_image_once_and_no_pause() -> None:
    history = History()
    for shard in range(20):
        history.add(
            {
                "shard": shard,
                "sha256": "f" * 64,
                "file": "data/shard-00000000.tar",
                "rows": 100,
                "failed": shard % 2,
                "seconds": 50.0,
                "finished_at": 1e9 + 50 * (shard + 1) + 10_000 * (shard >= 10),
                "worker": str(shard % 2),
                "node": "n",
            }
        )
    assert history.span == (1e9, 1e9 + 11_000)
    assert history.active_s == pytest.approx(1000)
    assert history.speed(120).sum() * 11_000 / 120 == pytest.approx(2000)
    assert history.failures(7).sum() == pytest.approx(10)
    assert [one["failed"] for one in history.workers()] == [10, 0]
    assert history.workers()[0]["images_per_s"] == pytest.approx(2.0)
    assert history.pauses == [(1e9 + 500, 1e9 + 10_500)]
    assert history.rate == pytest.approx(2.0)


def test_a_worker_s_time_counts_once_however_many_shards_it_has_open() -> None:
    history = History()
    for shard, (worker, ends_at, seconds) in enumerate(
        [("a", 100, 50), ("a", 120, 50), ("b", 90, 30), ("b", 200, 10)]
    ):
        entry = {"shard": shard, "sha256": "f" * 64, "file": "x.tar", "rows": 10, "failed": 0}
        history.add(entry | {"finished_at": 1.8e9 + ends_at, "seconds": seconds, "worker": worker})
    assert history.busy_s.tolist() == pytest.approx([70, 40], rel=1e-6)
    assert history.active_s == pytest.approx(80)  # 50 to 120, and 190 to 200
    assert [one["images_per_s"] for one in history.workers()] == pytest.approx([20 / 70, 20 / 40])


def test_on_s3(bucket: str, small: Callable[[int], bytes]) -> None:
    uri = f"{bucket}/set"
    put(uri, 0, [row(n, small(n)) for n in range(4)])
    assert dataset_report.write(uri) == f"{uri}/index.html"
    dataset_report.write(uri)
    assert len(scripts(uri)) == 2


def test_a_data_set_without_a_finished_shard(tmp_path: Path) -> None:
    put_lock(str(tmp_path), 10, 2)
    dataset_report.write(str(tmp_path))
    page, data = page_data(str(tmp_path))
    assert "<b>0 of 2</b>" in page
    assert data["pages"] == []


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_a_browser_shows_every_page_from_disk(
    tmp_path: Path, small: Callable[[int], bytes]
) -> None:
    uri = str(tmp_path / "set")
    for shard in range(5):
        numbers = range(64 * shard, 64 * shard + 64)
        put(uri, shard, [row(n, small(n), prompt=f"{n // 8} {NASTY}") for n in numbers])
    dataset_report.write(uri)

    def dom(fragment: str) -> str:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000"]
        command = [str(CHROMIUM), *flags, "--dump-dom", f"file://{uri}/index.html{fragment}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    first, second = dom(""), dom("#page=2")
    for text, page, shown in ((first, 1, 192), (second, 2, 128)):
        assert f'data-page="{page}"' in text
        assert f"Page {page} of 2: {shown} pictures" in text
        assert len(re.findall(r'<img src="data:image/webp;base64,[^"]+"[^>]* alt="', text)) == shown
        assert "<img src=x" not in text
    assert 'id="record-0"' in first
    assert 'id="record-0"' not in second
    assert 'id="record-319"' in second
