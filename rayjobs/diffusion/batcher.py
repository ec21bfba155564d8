"""Who goes into the next UNet call.

Owns the order of rows: first come first served within a shape, shapes by turns. Knows nothing of
tensors: a row is anything with an `id`, the `shape` of its latents and the length of its texts,
that says whose model's row it is, which `share` of its slots it takes now, and whether it `reuses`
deep features.
"""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class _Row(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def refiner(self) -> str | None: ...
    @property
    def num_chunks(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def reuses(self) -> bool: ...


R = TypeVar("R", bound=_Row)
_Shape = tuple[str | int | None, ...]


class BatchPolicy(Protocol[R]):
    """What the engine needs of whoever chooses the rows of a call."""

    max_rows: int

    def __len__(self) -> int: ...
    def add(self, row: R) -> None: ...
    def discard(self, row: R) -> None: ...
    def choose(self) -> list[R]: ...


class Batcher(Generic[R]):
    """At most `max_rows` rows of one shape go together, or more where some take a share of their
    slots; the rest of that shape wait.

    Texts of another length are another shape: what a call computes has its longest text's; rows of
    another model are too. Rows
    that reuse deep features have calls of their own too: those go first that fill one best.
    """

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self._by_shape: OrderedDict[_Shape, list[R]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._by_shape.values())

    def add(self, row: R) -> None:
        self._by_shape.setdefault(_shape(row), []).append(row)

    def discard(self, row: R) -> None:
        """Take a row out, if it is here; its place is free at the next step."""
        rows = self._by_shape.get(_shape(row), [])
        if row in rows:
            rows.remove(row)
        if not rows:
            self._by_shape.pop(_shape(row), None)

    def choose(self) -> list[R]:
        """The rows of the next step, oldest first; none when nothing is here."""
        if not self._by_shape:
            return []
        shape = next(iter(self._by_shape))
        self._by_shape.move_to_end(shape)
        calls: dict[bool, list[R]] = {}
        for row in self._by_shape[shape]:
            rows = calls.setdefault(row.reuses, [])
            if sum(each.share for each in rows) + row.share <= self.max_rows:
                rows.append(row)
        return max(calls.values(), key=lambda rows: sum(row.share for row in rows))


def _shape(row: _Row) -> "_Shape":
    return row.refiner, *row.shape, row.num_chunks
