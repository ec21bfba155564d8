"""The arithmetic of segments: which shard holds which records of a data set that grew."""

from typing import Any

from rayjobs.dataset.lock import Lock, Segment


def segment(num_records: int, first_record: int = 0, first_shard: int = 0) -> Segment:
    values: dict[str, Any] = {
        "job": {"output": {"images_per_shard": 4, "format": "parquet"}},
        "prompts_sha256": "",
        "num_prompts": 1,
        "model_name": "",
        "model_sha256": "",
        "guided": True,
        "num_records": num_records,
        "num_shards": -(-num_records // 4),
        "first_record": first_record,
        "first_shard": first_shard,
    }
    return Segment.model_validate(values)


def test_shards_and_records_of_segments() -> None:
    lock = Lock(segments=(segment(6), segment(9, 6, 2)), determinism={})
    records = [list(lock.segment_of(shard).records_of(shard)) for shard in range(lock.num_shards)]
    assert records == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12, 13], [14]]
    for shard, numbers in enumerate(records):
        for number in numbers:
            assert lock.segment_of_record(number).shard_of(number) == shard


def test_counts_of_some_shards() -> None:
    last = segment(9, 6, 2)
    assert [last.count_records(shards) for shards in ([], [2], [4], [2, 4], [2, 3, 4])] == [
        *(0, 4, 1, 5, 9)
    ]
