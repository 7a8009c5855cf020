"""Rows of a table with named fields, as features: numbers as they are, categories as one feature for each value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_store.errors import FieldError
from models_store.manifest import InputSpec, TableField

_SHOWN = 10  # categories in a message


def encode(rows: Sequence[Mapping[str, Any]], spec: InputSpec) -> NDArray[np.float32]:
    """Turn rows with named fields into features (rows, features).

    A missing or null number becomes NaN where the input allows missing values.

    Raises:
        FieldError: a field is missing, unknown, of the wrong type, out of range, or has an unknown category; the message
            names row and field.
    """
    assert spec.fields is not None, "the input has named fields"
    out = np.zeros((len(rows), *spec.shape), np.float32)
    known = {field.name for field in spec.fields}
    writers = [_Writer(field, spec) for field in spec.fields]
    for number, (row, values) in enumerate(zip(rows, out, strict=True)):
        if (unknown := next((name for name in row if name not in known), None)) is not None:
            raise FieldError(
                f"row {number} has the unknown field {unknown[:80]!r}. The fields are {', '.join(map(repr, sorted(known)))}"
            )
        column = 0
        for writer in writers:
            try:
                writer.write(values, column, row.get(writer.name))
            except FieldError as error:
                raise FieldError(f"row {number}, field {writer.name!r}, {error}") from None
            column += writer.width
    return out


class _Writer:
    """Writes the features of one field."""

    def __init__(self, field: TableField, spec: InputSpec):
        self.name, self.width = field.name, field.width
        self._categories = field.categories
        self._column = {text: index for index, text in enumerate(field.categories or ())}
        self._missing = spec.missing == "mean"
        most = float(np.finfo(np.float32).max)
        self._low = -most if spec.low is None else max(-most, spec.low)
        self._high = most if spec.high is None else min(most, spec.high)

    def write(self, row: NDArray[np.float32], column: int, value: Any) -> None:
        """Write a value of the field into the features of a row, from this column on."""
        if self._categories is not None:
            row[column + self._index(value, self._categories)] = 1
        elif value is None:
            if not self._missing:
                raise FieldError("is missing; it must be a number")
            row[column] = np.nan
        else:
            row[column] = self._number(value)

    def _index(self, value: Any, categories: list[str]) -> int:
        text = str(value).lower() if isinstance(value, bool) else "" if value is None else value
        if not isinstance(text, str):
            raise FieldError(f"is {_short(value)}; it must be a text, one of {_listed(categories)}")
        if (index := self._column.get(text)) is None:
            what = "is missing" if value is None else f"has the unknown category {_short(value)}"
            raise FieldError(f"{what}; it must be one of {_listed(categories)}")
        return index

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FieldError(f"is {_short(value)}; it must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not self._low <= number <= self._high:  # false for NaN
            raise FieldError(f"is {_short(value)}; it must be a number from {self._low:g} to {self._high:g}")
        return number


def _short(value: Any) -> str:
    return repr(value)[:60]


def _listed(categories: Sequence[str]) -> str:
    more = f" and {len(categories) - _SHOWN} more" if len(categories) > _SHOWN else ""
    return ", ".join(map(repr, categories[:_SHOWN])) + more
