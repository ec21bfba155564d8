"""A data set's page while its job goes: what it says, and what it costs."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.manifest import Manifest
from rayjobs.reports import contact_sheet, dataset_report, live, rewriter
from rayjobs.reports.live import LivePage
from tests.reports.test_dataset_report import png, put, put_lock, row


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose pages are due all the time."""
    for name, value in (("POLL_S", 0.01), ("FIRST_S", 0.0), ("SHORTEST_S", 0.0), ("MAX_SHARE", 1)):
        monkeypatch.setattr(rewriter, name, value)


@pytest.fixture
def picture_bytes(picture: Callable[[int], Image.Image]) -> bytes:
    return png(picture(1))


def fill(uri: str, shard: int, picture: bytes) -> dict[str, Any]:
    return put(uri, shard, [row(4 * shard + n, picture) for n in range(4)])


def live_page(uri: str, num_shards: int) -> LivePage:
    manifest = Manifest(uri)
    return LivePage(manifest, manifest.committed(num_shards), 4 * num_shards - 4)


def page_of(uri: str) -> str:
    place = storage.join(uri, "index.html")
    return storage.read_bytes(place).decode() if storage.exists(place) else ""


def until(uri: str, text: str) -> str:
    end = time.monotonic() + 10
    while text not in (page := page_of(uri)):
        assert time.monotonic() < end, page[:3000]
        time.sleep(0.01)
    return page


def test_the_page_goes_with_the_job_and_tells_of_its_end(
    tmp_path: Path, quick: None, picture_bytes: bytes
) -> None:
    """An earlier run's shard counts on the page, and not as this run's work."""
    uri = str(tmp_path)
    put_lock(uri, 40, 10)
    fill(uri, 7, picture_bytes)

    def run() -> None:
        with live_page(uri, 10):
            assert page_of(uri) == ""
            fill(uri, 0, picture_bytes)
            # Each shard of these took 10 s, and begins where the one before ends.
            first = until(uri, "4 of 36 images of this run, 0.4 images/s, 80.0 s left")
            assert "<b>In progress</b>" in first
            assert "<b>8</b><span>images finished" in first
            assert "<b>2 of 10</b>" in first
            fill(uri, 1, picture_bytes)
            until(uri, "8 of 36 images of this run")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    last = page_of(uri)
    assert re.search(r"<b>Interrupted</b> at [-0-9: ]+ UTC, after 8 of 36 images", last)
    dataset_report.write(uri)
    assert '<p class="now">' not in page_of(uri)
    assert "<b>12</b><span>images finished" in page_of(uri)


def test_whoever_is_refused_does_not_touch_the_page(
    tmp_path: Path, quick: None, picture_bytes: bytes
) -> None:
    def run() -> None:
        with live_page(str(tmp_path), 4) as page:
            page._next = float("inf")
            fill(str(tmp_path), 0, picture_bytes)
            raise BadInput("another run began another job here")

    with pytest.raises(BadInput):
        run()
    assert page_of(str(tmp_path)) == ""


def test_a_long_job_s_pages_read_little_and_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_bytes: bytes
) -> None:
    """Of 2,000 shards: each entry once, some of the shards, and a page only when it is due."""
    uri = str(tmp_path)
    entries = [fill(uri, shard, picture_bytes) for shard in range(8)]
    finished, entries_read, shards, rows = 0, Counter[int](), list[int](), contact_sheet.rows

    def read_entry(manifest: Manifest, shard: int) -> dict[str, Any]:
        entries_read[shard] += 1
        return entries[shard % 8] | {"shard": shard, "failed": shard % 2}

    def read_rows(output_uri: str, shard: int, *rest: Any) -> Iterator[dict[str, Any]]:
        shards.append(shard)
        return rows(output_uri, shard % 8, *rest)

    def names(manifest: Manifest) -> tuple[np.ndarray, set[int]]:
        return np.arange(finished), set()

    monkeypatch.setattr(Manifest, "_names", names)
    monkeypatch.setattr(Manifest, "_read_entry", read_entry)
    monkeypatch.setattr(contact_sheet, "rows", read_rows)
    monkeypatch.setattr(live, "MAX_PICTURES", 64)
    page = live_page(uri, 2000)
    page._write(page._wait_s())
    assert time.monotonic() < page._next <= time.monotonic() + rewriter.FIRST_S  # nothing yet
    for number in range(10):
        finished = 200 * number + 200
        page._write(page._wait_s())
    assert "8,000 of 8,000 images of this run" in page_of(uri)
    assert set(entries_read.values()) == {1}
    pictured = 64 // 4
    # A doubled data set replaces half of the sample, in pictures as in failures.
    assert len(shards) < 8 * (pictured + dataset_report.READ_WHILE_RUNNING)
    page._cost_s = 60.0
    assert page._wait_s() == 60 / rewriter.MAX_SHARE
    page._cost_s = 0.01
    assert page._wait_s() == rewriter.SHORTEST_S
    page._first = time.monotonic() - 1e6
    assert page._wait_s() == rewriter.LONGEST_S


def test_entries_are_found_wherever_they_are_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_bytes: bytes
) -> None:
    monkeypatch.setattr("rayjobs.dataset.manifest.GROUP", 2)
    manifest = Manifest(str(tmp_path))
    for shard in (0, 1, 2, 4):
        fill(str(tmp_path), shard, picture_bytes)
    names = manifest._names()
    manifest.compact()
    seen = np.array([True, False, False, False, True, False])
    assert sorted(entry["shard"] for entry in manifest.unseen(seen)) == [1, 2]
    # Listed before they were gathered, and read after: they come the next time.
    monkeypatch.setattr(manifest, "_names", lambda: names)
    assert [entry["shard"] for entry in manifest.unseen(seen)] == [2]
