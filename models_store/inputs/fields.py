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
    for number, (row, values) in enumerate(zip(rows, out, strict=True)):
        if unknown := next((name for name in row if name not in known), None):
            raise FieldError(
                f"row {number} has the unknown field {unknown[:80]!r}. The fields are {', '.join(map(repr, sorted(known)))}"
            )
        column = 0
        for field in spec.fields:
            _write(
                values[column : column + field.width],
                row.get(field.name),
                field,
                spec,
                f"row {number}, field {field.name!r},",
            )
            column += field.width
    return out


def _write(place: NDArray[np.float32], value: Any, field: TableField, spec: InputSpec, where: str) -> None:
    if field.categories is not None:
        text = (
            str(value).lower()
            if isinstance(value, bool)
            else value
            if isinstance(value, str)
            else ""
            if value is None
            else None
        )
        if text is None:
            raise FieldError(f"{where} is {_short(value)}; it must be a text, one of {_listed(field.categories)}")
        if text not in field.categories:
            what = "is missing" if value is None else f"has the unknown category {_short(value)}"
            raise FieldError(f"{where} {what}; it must be one of {_listed(field.categories)}")
        place[field.categories.index(text)] = 1
        return
    if value is None:
        if spec.missing == "refuse":
            raise FieldError(f"{where} is missing; it must be a number")
        place[0] = np.nan
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(f"{where} is {_short(value)}; it must be a number")
    low, high = (-math.inf if spec.low is None else spec.low), (math.inf if spec.high is None else spec.high)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max) or not low <= number <= high:
        raise FieldError(
            f"{where} is {_short(value)}; it must be a number from {low:g} to {high:g} that float32 can hold"
        )
    place[0] = number


def _short(value: Any) -> str:
    return repr(value)[:60]


def _listed(categories: Sequence[str]) -> str:
    more = f" and {len(categories) - _SHOWN} more" if len(categories) > _SHOWN else ""
    return ", ".join(map(repr, categories[:_SHOWN])) + more
