"""Conditions on records, such as `clip_score >= 0.25`: how they are written and when they hold.

Owns their grammar and the types of their values. Knows nothing of data sets.
"""

import csv
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from pyarrow import types

from rayjobs.config import BadInput
from rayjobs.dataset.records import Row

TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "contains": lambda column, value: value in column,
    "in": lambda column, values: column in values,
}
GRAMMAR = re.compile(r"\s*(.+?)\s*(==|!=|<=|>=|<|>|\scontains\s|\sin\s)\s*(.+?)\s*", re.DOTALL)
BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Condition:
    """One condition; its value is text until `typed` has seen the columns."""

    text: str
    column: str
    test: str
    value: Any

    def typed(self, schema: pa.Schema) -> "Condition":
        """With a value of the column's type; raises BadInput when there is none."""
        if self.column not in schema.names:
            raise BadInput(
                f"where: {self.text!r}: there is no column {self.column!r}; there are "
                + ", ".join(schema.names)
            )
        kind = schema.field(self.column).type
        try:
            return replace(self, value=self._value(kind))
        except (ValueError, TypeError, pa.ArrowException):
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise BadInput(
                f"where: {self.text!r} does not fit the column {self.column!r}, which is {kind}; "
                f"there are {columns}"
            ) from None

    def holds(self, row: Row) -> bool:
        """Whether it holds of a record; of null nothing does."""
        value = row.get(self.column)
        return value is not None and TESTS[self.test](value, self.value)

    def _value(self, kind: pa.DataType) -> Any:
        if self.test == "contains":
            if types.is_string(kind) or types.is_large_string(kind):
                return _unquoted(self.value)
            if not (types.is_list(kind) or types.is_large_list(kind)):
                raise TypeError
            return _scalar(_unquoted(self.value), kind.value_type)
        if self.test == "in":
            listed = re.sub(r"^[\[(](.*)[\])]$", r"\1", self.value, flags=re.DOTALL)
            (texts,) = csv.reader([listed], skipinitialspace=True)
            return [_scalar(text.strip(), kind) for text in texts]
        if types.is_nested(kind) or (types.is_boolean(kind) and self.test not in ("==", "!=")):
            raise TypeError
        return _scalar(_unquoted(self.value), kind)


def parse(text: str) -> Condition:
    """`COLUMN OP VALUE`; raises ValueError when it is not that."""
    match = GRAMMAR.fullmatch(text)
    if match is None:
        tests = " ".join(TESTS)
        raise ValueError(f"{text!r} is no condition; write COLUMN OP VALUE with one of {tests}")
    column, test, value = match.groups()
    return Condition(text, column, test.strip(), value)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _scalar(text: str, kind: pa.DataType) -> Any:
    """As the column holds it: 0.3 is not 0.3 in 32 bits. A whole column may meet a fraction."""
    if types.is_boolean(kind):
        if text.lower() not in BOOLEANS:
            raise ValueError
        return BOOLEANS[text.lower()]
    if types.is_integer(kind):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if types.is_floating(kind):
        return pa.scalar(float(text), kind).as_py()
    if types.is_nested(kind):
        raise TypeError
    return pa.scalar(text, pa.string()).cast(kind).as_py()
