"""Who goes next: by shape, by caller, by what is due; and how large a call may be."""

from dataclasses import dataclass, field

import pytest

from serve.engine.fairness import FairBatcher, Ticket, Turns
from serve.engine.forecast import Forecast


@dataclass(frozen=True)
class Row:
    id: int
    shape: tuple[int, ...] = (4, 8, 8)
    num_slots: int = 2
    share_left: float = 1.0
    request: object = field(default_factory=object)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def batcher(max_rows: int, places: int = 99) -> FairBatcher[Row]:
    return FairBatcher(max_rows, lambda shape: places, Clock())


def add(to: FairBatcher[Row], row: Row, caller: str = "a", at: float = 0, work: float = 1) -> Row:
    to.tickets[row.request] = Ticket(caller, at, work)
    to.add(row)
    return row


def ids(rows: list[Row]) -> list[int]:
    return sorted(row.id for row in rows)


def test_a_call_is_full_and_no_fuller() -> None:
    found = batcher(8, places=5)
    for number in range(4):
        add(found, Row(number))
    assert len(found.choose()) == 2
    add(found, Row(9, shape=(4, 16, 16), num_slots=8))
    found.charge(found.receipt, 1.0)
    assert ids(found.choose()) == [9]  # alone it may be larger than the bound


def test_shapes_share_the_time() -> None:
    found, spent = batcher(4), {8: 0.0, 64: 0.0}
    add(found, Row(0, shape=(4, 8, 8)))
    add(found, Row(1, shape=(4, 64, 64)))
    for _ in range(2000):
        (row,) = found.choose()
        seconds = {8: 0.01, 64: 1.0}[row.shape[-1]]
        spent[row.shape[-1]] += seconds
        found.charge(found.receipt, seconds)
    assert spent[8] == pytest.approx(spent[64], rel=0.1)


def test_a_shape_that_comes_back_has_saved_nothing_up() -> None:
    found = batcher(4)
    add(found, Row(0, shape=(4, 8, 8)))
    for _ in range(100):
        found.choose()
        found.charge(found.receipt, 1.0)
    new = add(found, Row(1, shape=(4, 64, 64)))
    turns = []
    for _ in range(10):
        turns += ids(found.choose())
        found.charge(found.receipt, 1.0)
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
        found.charge(found.receipt, 1.0)
    assert turns.count(0) > 5 * turns.count(1)


def test_callers_share_a_shape_s_places() -> None:
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
            served[found.tickets[row.request].caller] += 1
        found.charge(found.receipt, 1.0)
    assert served["many"] == pytest.approx(served["one"], rel=0.1)


def test_short_rows_go_first_until_long_ones_are_due() -> None:
    found = batcher(1)
    add(found, Row(0), at=0, work=10)
    add(found, Row(1), at=5, work=1)
    assert ids(found.choose()) == [1]
    found.charge(found.receipt, 1)
    add(found, Row(2), at=60, work=1)
    found.discard(found.chosen[0])
    assert ids(found.choose()) == [0]  # it has waited long enough


def test_no_row_starves_under_a_stream_of_short_ones() -> None:
    found, clock = batcher(1), 0.0
    long = add(found, Row(0), at=0, work=10)
    for number in range(1, 200):
        add(found, Row(number), at=clock, work=1)
        (row,) = found.choose()
        found.charge(found.receipt, 1.0)
        clock += 1.0
        if row is long:
            return
        found.discard(row)
    raise AssertionError("the long row was never served")


def test_leaving_pays_no_debts_and_keeps_none_for_ever() -> None:
    turns: Turns[str] = Turns()
    turns.order(["a", "b"])
    turns.charge("a", 1)
    turns.order(["b"])
    assert turns.order(["a", "b"]) == ["b", "a"]
    for number in range(100):
        turns.order([f"caller {number}", "b"])
        turns.charge("b", 1)
    assert len(turns._used) < 5


KEY, LARGE = ("w", (4, 8, 8)), ("w", (4, 16, 16))


def test_a_step_s_time_is_learned() -> None:
    found = Forecast(16, 10.0)
    for places in (1, 2, 4, 8, 16, 3, 5):
        found.saw_step(KEY, places, 0.1 + 0.02 * places)
    assert found.step_s(KEY, 12) == pytest.approx(0.34)
    most = found.bound(KEY)
    assert found.work_s(KEY, 140, 0) == pytest.approx(140 / most * found.step_s(KEY, most))
    assert found.step_s(LARGE, 16) == pytest.approx(4 * 0.42)  # by area, until it is seen
    found.saw_image(KEY, 0.5)
    assert found.work_s(KEY, 0, 3) == pytest.approx(1.5)


def test_how_long_rows_take_as_they_leave_one_by_one() -> None:
    found = Forecast(16, 0.2)
    for places in (1, 2, 4, 8, 16, 3, 5):
        found.saw_step(KEY, places, 0.1 + 0.02 * places)
    assert found.bound(KEY) == 5
    assert found.drain_s(KEY, []) == 0
    assert found.drain_s(KEY, [(20, 2), (10, 2)]) == pytest.approx(10 * 0.18 + 10 * 0.14)
    assert found.drain_s(KEY, [(7, 1)] * 3) == pytest.approx(7 * 0.16)
    # Ten rows of one place in calls of five: each has half of the steps.
    assert found.drain_s(KEY, [(8, 1)] * 10) == pytest.approx(2 * 8 * 0.2)
    found.saw_image(KEY, 0.5)
    assert found.drain_s(KEY, [(7, 1)] * 3) == pytest.approx(7 * 0.16 + 1.5)


def test_calls_are_no_longer_than_is_bearable() -> None:
    found = Forecast(16, 0.2)
    assert found.bound(KEY) == 16
    for places in (2, 4, 8):
        found.saw_step(KEY, places, 0.15 + 0.005 * places)
    assert found.bound(KEY) == 10


def test_calls_are_no_larger_than_pays() -> None:
    found = Forecast(16, 10.0)
    for places in (2, 4, 8):
        found.saw_step(KEY, places, 0.1 * places)
        found.saw_step(LARGE, places, 0.2 + 0.05 * places)
    assert found.bound(KEY) == 1  # a device that is full: more rows only wait for each other
    assert found.bound(LARGE) == 14


def test_a_row_that_is_nearly_done_goes_first() -> None:
    found = batcher(1)
    add(found, Row(0, share_left=1.0), at=0, work=1)
    add(found, Row(1, share_left=0.1), at=1, work=10)
    assert ids(found.choose()) == [0]
    add(found, Row(2, share_left=0.1), at=0, work=5)
    assert ids(found.choose()) == [2]


def test_calls_fit_the_memory() -> None:
    found = Forecast(16, 10)
    found.free_bytes = 1000
    for places in (2, 8):
        found.saw_step(KEY, places, 0.1, num_bytes=100 * places)
    assert found.bound(KEY) == 9
    found.ran_out(KEY, 8)
    assert found.bound(KEY) == 4
    found.ran_out(KEY, 2)
    assert found.bound(KEY) == 1
    assert found.bound(LARGE) == 16
