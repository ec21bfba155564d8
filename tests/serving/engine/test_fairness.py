"""Who goes next: by shape, by caller, by what is due."""

from dataclasses import dataclass, field

import pytest

from serve.engine.fairness import FairBatcher, FairQueue, RowPriority


@dataclass(frozen=True)
class Row:
    id: int
    shape: tuple[int, ...] = (4, 8, 8)
    num_slots: int = 2
    share_left: float = 1.0
    share: float = 1.0
    reuses: bool = False
    controls: tuple[object, ...] = ()
    ip_adapters: tuple[object, ...] = ()
    request: object = field(default_factory=object)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def batcher(max_rows: int, slots: int = 99) -> FairBatcher[Row]:
    return FairBatcher(max_rows, lambda shape: slots, Clock())


def add(to: FairBatcher[Row], row: Row, caller: str = "a", at: float = 0, work: float = 1) -> Row:
    to.priorities[row.request] = RowPriority(caller, at, work)
    to.add(row)
    return row


def ids(rows: list[Row]) -> list[int]:
    return sorted(row.id for row in rows)


def test_a_call_is_full_and_no_fuller() -> None:
    found = batcher(8, slots=5)
    for number in range(4):
        add(found, Row(number))
    assert len(found.choose()) == 2
    add(found, Row(9, shape=(4, 16, 16), num_slots=8))
    found.charge(found.usage, 1.0)
    assert ids(found.choose()) == [9]  # alone it may be larger than the bound


def test_a_slot_that_a_row_gives_back_is_for_others() -> None:
    found = batcher(2, slots=4)
    for number in range(5):
        half = number in (0, 2)
        add(found, Row(number, num_slots=1 if half else 2, share=0.5 if half else 1.0))
    assert ids(found.choose()) == [0, 1, 2]


def test_shapes_share_the_time() -> None:
    found, spent = batcher(4), {8: 0.0, 64: 0.0}
    add(found, Row(0, shape=(4, 8, 8)))
    add(found, Row(1, shape=(4, 64, 64)))
    for _ in range(2000):
        (row,) = found.choose()
        seconds = {8: 0.01, 64: 1.0}[row.shape[-1]]
        spent[row.shape[-1]] += seconds
        found.charge(found.usage, seconds)
    assert spent[8] == pytest.approx(spent[64], rel=0.1)


def test_a_shape_that_comes_back_has_saved_nothing_up() -> None:
    found = batcher(4)
    add(found, Row(0, shape=(4, 8, 8)))
    for _ in range(100):
        found.choose()
        found.charge(found.usage, 1.0)
    new = add(found, Row(1, shape=(4, 64, 64)))
    turns = []
    for _ in range(10):
        turns += ids(found.choose())
        found.charge(found.usage, 1.0)
    assert 4 <= turns.count(new.id) <= 6


def test_old_rows_pull_their_shape_forward() -> None:
    clock = Clock()
    found = FairBatcher[Row](4, lambda shape: 99, clock)
    add(found, Row(0, shape=(4, 8, 8)), at=0)
    add(found, Row(1, shape=(4, 64, 64)), at=100)
    clock.now = 100
    turns = []
    for _ in range(120):
        turns += ids(found.choose())
        found.charge(found.usage, 1.0)
    assert turns.count(0) > 5 * turns.count(1)


def test_callers_share_a_shape_s_slots() -> None:
    found = batcher(4)
    for number in range(20):
        add(found, Row(number), caller="many")
    lone = add(found, Row(99), caller="one", at=5)
    assert lone in found.choose()
    served = {"many": 0, "one": 0}
    for number in range(100, 110):
        add(found, Row(number), caller="one", at=5)
    for _ in range(50):
        for row in found.choose():
            served[found.priorities[row.request].caller] += 1
        found.charge(found.usage, 1.0)
    assert served["many"] == pytest.approx(served["one"], rel=0.1)


def test_short_rows_go_first_until_long_ones_are_due() -> None:
    found = batcher(1)
    add(found, Row(0), at=0, work=10)
    add(found, Row(1), at=5, work=1)
    assert ids(found.choose()) == [1]
    found.charge(found.usage, 1)
    add(found, Row(2), at=60, work=1)
    found.discard(found.chosen[0])
    assert ids(found.choose()) == [0]  # it has waited long enough


def test_no_row_starves_under_a_stream_of_short_ones() -> None:
    found, clock = batcher(1), 0.0
    long = add(found, Row(0), at=0, work=10)
    for number in range(1, 200):
        add(found, Row(number), at=clock, work=1)
        (row,) = found.choose()
        found.charge(found.usage, 1.0)
        clock += 1.0
        if row is long:
            return
        found.discard(row)
    raise AssertionError("the long row was never served")


def test_leaving_pays_no_debts_and_keeps_none_for_ever() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.order(["a", "b"])
    queue.charge("a", 1)
    queue.order(["b"])
    assert queue.order(["a", "b"]) == ["b", "a"]
    for number in range(100):
        queue.order([f"caller {number}", "b"])
        queue.charge("b", 1)
    assert len(queue._used) < 5


def test_a_row_that_is_nearly_done_goes_first() -> None:
    found = batcher(1)
    add(found, Row(0, share_left=1.0), at=0, work=1)
    add(found, Row(1, share_left=0.1), at=1, work=10)
    assert ids(found.choose()) == [0]
    add(found, Row(2, share_left=0.1), at=0, work=5)
    assert ids(found.choose()) == [2]


def test_a_batch_says_whether_it_tells_what_others_cost() -> None:
    found = batcher(4)
    add(found, Row(0))
    found.choose()
    assert found.usage is not None
    assert found.usage.is_plain
    add(found, Row(1, reuses=True))
    found.choose()
    assert not found.usage.is_plain
