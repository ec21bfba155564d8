"""The manifest of many shards: compaction changes where entries lie, never what they say."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayjobs import storage
from rayjobs.dataset.manifest import GROUP, Manifest
from rayjobs.dataset.records import canonical_json

NUM_SHARDS = 2 * GROUP + 500
FEWER = GROUP + 50
Entries = Mapping[int, dict[str, Any]]


def entry(shard: int) -> dict[str, Any]:
    return {
        "shard": shard,
        "generation": 0,
        "file": f"data/shard-{shard:08d}.parquet",
        "sha256": f"{shard:064x}",
        "bytes": shard + 1,
        "rows": 64,
        "failed": shard % 3,
        "seconds": 1.5,
        "finished_at": 1.7e9 + shard / 8,
        "worker": "host-1",
        "node": "host",
        "class": "0123456789ab",
        "class_changed": False,
    }


def facts(shard: int) -> dict[str, Any]:
    given = ("generation", "file", "sha256", "bytes", "shard")
    return {key: value for key, value in entry(shard).items() if key not in given}


def place(uri: str, shards: range) -> Manifest:
    """A manifest with an entry for each of the shards, put where a commit puts it."""
    made = Manifest(uri)
    Path(made.entry_uri(0)).parent.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        Path(made.entry_uri(shard)).write_bytes(canonical_json(entry(shard)))
    return made


def agree(manifest: Manifest, expected: Entries) -> None:
    """All ways of asking give the expected entries, and no other."""
    found = list(manifest.entries())
    assert [one["shard"] for one in found] == sorted(expected)
    assert found == [expected[shard] for shard in sorted(expected)]
    assert np.flatnonzero(manifest.committed(NUM_SHARDS)).tolist() == sorted(expected)
    for shard in (0, 7, GROUP - 1, GROUP, 2 * GROUP - 1, 2 * GROUP, NUM_SHARDS - 1, NUM_SHARDS):
        assert manifest.is_committed(shard) == (shard in expected)
        assert manifest.entry(shard) == expected.get(shard)


def singles(manifest: Manifest) -> int:
    names = storage.list_files(storage.join(manifest.uri, "manifest"))
    return sum(name.endswith(".json") for name in names)


def test_compaction_changes_no_answer(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path))

    def commit(shard: int) -> dict[str, Any]:
        name = manifest.format.name(shard)
        return manifest.commit(shard, {name: b"%d" % shard}, facts(shard))

    place(manifest.uri, range(100, NUM_SHARDS))
    expected = {shard: entry(shard) for shard in range(100, NUM_SHARDS)}
    with ThreadPoolExecutor(4) as pool:
        expected |= {one["shard"]: one for one in pool.map(commit, range(100))}
    agree(manifest, expected)
    manifest.compact()
    assert singles(manifest) == NUM_SHARDS - 2 * GROUP  # the last group is not complete
    agree(manifest, expected)
    manifest.compact()
    agree(manifest, expected)


def test_the_first_commit_counts_after_compaction_too(tmp_path: Path) -> None:
    manifest = place(str(tmp_path), range(GROUP))
    storage.write_bytes(storage.join(manifest.data, manifest.format.name(7)), b"first")
    manifest.compact()
    late = manifest.commit(7, {manifest.format.name(7): b"other bits"}, facts(7))
    assert late == entry(7)
    assert manifest.entry(7) == entry(7)
    assert singles(manifest) == 0


def test_a_later_generation_overrules_the_compact_file(tmp_path: Path) -> None:
    manifest = place(str(tmp_path), range(FEWER))
    manifest.compact()
    old = manifest.entry(7)
    assert old is not None
    new = manifest.replace(old, {manifest.format.name(7): b"mended"}, facts(7) | {"failed": 0})
    assert new["generation"] == 1
    expected = {shard: entry(shard) for shard in range(FEWER)} | {7: new}
    agree(manifest, expected)
    manifest.compact()
    assert singles(manifest) == FEWER - GROUP
    agree(manifest, expected)
    newer = manifest.replace(new, {manifest.format.name(7): b"again"}, facts(7))
    assert newer["generation"] == 2
    agree(manifest, expected | {7: newer})


def test_a_crash_within_compaction_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = place(str(tmp_path), range(FEWER))
    expected = {shard: entry(shard) for shard in range(FEWER)}
    remove = storage.remove_files

    def killed(folder: str, names: Iterable[str]) -> None:
        remove(folder, [name for name in names if int(Path(name).stem) % GROUP < 400])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_files", killed)
        with pytest.raises(KeyboardInterrupt):
            manifest.compact()
    assert storage.exists(manifest.compact_uri(0))
    assert FEWER - GROUP < singles(manifest) < FEWER
    agree(manifest, expected)
    manifest.compact()
    assert singles(manifest) == FEWER - GROUP
    agree(manifest, expected)


def test_a_million_shards_are_known_by_a_thousand_names(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path))
    Path(manifest.compact_uri(0)).parent.mkdir()
    for group in range(1000):
        if group != 500:
            Path(manifest.compact_uri(group)).touch()  # never opened
    done = manifest.committed(1000 * GROUP)
    assert done.nbytes == 1000 * GROUP
    assert np.flatnonzero(~done).tolist() == list(range(500 * GROUP, 501 * GROUP))
