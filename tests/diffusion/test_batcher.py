"""Who goes next, in pure Python."""

from dataclasses import dataclass

from rayjobs.diffusion.batcher import Batcher


@dataclass(eq=False)
class Row:
    id: int
    shape: tuple[int, ...] = (4, 8, 8)
    num_chunks: int = 1
    share: float = 1.0
    reuses: bool = False
    refiner: str | None = None


def ids(rows: list[Row]) -> list[int]:
    return [row.id for row in rows]


def test_first_come_first_served_up_to_the_most() -> None:
    batcher: Batcher[Row] = Batcher(3)
    rows = [Row(n) for n in range(5)]
    for row in rows:
        batcher.add(row)
    assert ids(batcher.choose()) == [0, 1, 2]
    batcher.discard(rows[1])
    assert ids(batcher.choose()) == [0, 2, 3]
    assert len(batcher) == 4


def test_shapes_take_turns_and_never_mix() -> None:
    batcher: Batcher[Row] = Batcher(8)
    for n in range(6):
        batcher.add(Row(n, (4, 8, 8 + n % 3)))
    turns = [batcher.choose() for _ in range(6)]
    assert all(len({row.shape for row in turn}) == 1 for turn in turns)
    assert [ids(turn) for turn in turns[:3]] == [[0, 3], [1, 4], [2, 5]]
    assert [ids(turn) for turn in turns[3:]] == [[0, 3], [1, 4], [2, 5]]


def test_empty_and_unknown_rows_do_no_harm() -> None:
    batcher: Batcher[Row] = Batcher(2)
    assert batcher.choose() == []
    row = Row(1)
    batcher.discard(row)
    batcher.add(row)
    batcher.discard(row)
    batcher.discard(row)
    assert len(batcher) == 0


def test_a_row_that_takes_half_its_slots_leaves_the_others() -> None:
    batcher: Batcher[Row] = Batcher(2)
    for n, share in enumerate([0.5, 1.0, 1.0, 0.5, 0.5]):
        batcher.add(Row(n, share=share))
    assert ids(batcher.choose()) == [0, 1, 3]


def test_rows_that_reuse_have_calls_of_their_own_and_the_fuller_call_is_first() -> None:
    batcher: Batcher[Row] = Batcher(3)
    rows = [Row(n, reuses=n in (1, 3, 4)) for n in range(5)]
    for row in rows:
        batcher.add(row)
    assert ids(batcher.choose()) == [1, 3, 4]
    rows[1].reuses = False
    assert ids(batcher.choose()) == [0, 1, 2]
    batcher.discard(rows[0])
    assert ids(batcher.choose()) == [1, 2]  # of two alike that of the oldest row
