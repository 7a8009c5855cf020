"""Named fields and tensors as features: numbers as they are, categories as one feature for each value, tensors number by number."""

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


def from_columns(columns: Mapping[str, Any], spec: InputSpec) -> NDArray[np.float32]:
    """Turn a batch of each field into features (rows, features).

    Args:
        columns: by name: arrays or lists (batch, *shape) of tensors, (batch,) of numbers, and lists of texts of categories.
        spec: the input.

    Raises:
        FieldError: a field is missing or unknown, has another number of rows or another shape, or holds a wrong value.
    """
    assert spec.fields is not None, "the input has named fields"
    known = [field.name for field in spec.fields]
    if (wrong := next((name for name in columns if name not in known), None)) is not None:
        raise FieldError(f"the field {wrong[:80]!r} is unknown. The fields are {', '.join(map(repr, known))}")
    if (missing := next((name for name in known if name not in columns), None)) is not None:
        raise FieldError(f"the field {missing!r} is missing. The fields are {', '.join(map(repr, known))}")
    if (
        single := next((name for name in known if not isinstance(columns[name], list | tuple | np.ndarray)), None)
    ) is not None:
        raise FieldError(f"the field {single!r} is not a list; each field is a batch")
    sizes = {name: len(columns[name]) for name in known}
    if len(set(sizes.values())) > 1:
        raise FieldError(
            f"the fields have different numbers of rows: {', '.join(f'{n} {size}' for n, size in sizes.items())}"
        )
    out = np.zeros((next(iter(sizes.values())), *spec.shape), np.float32)
    column = 0
    for field in spec.fields:
        writer, given = _Writer(field, spec), columns[field.name]
        try:
            if field.categories is None:
                out[:, column : column + writer.width] = writer.batch(given)
            else:
                for number, (row, value) in enumerate(zip(out, given, strict=True)):
                    try:
                        writer.write(row, column, value.item() if isinstance(value, np.generic) else value)
                    except FieldError as error:
                        raise FieldError(f"row {number}, {error}") from None
        except FieldError as error:
            raise FieldError(f"field {field.name!r}, {error}") from None
        column += writer.width
    return out


class _Writer:
    """Writes the features of one field."""

    def __init__(self, field: TableField, spec: InputSpec):
        self.name, self.width = field.name, field.width
        self._categories, self._shape = field.categories, field.shape
        self._column = {text: index for index, text in enumerate(field.categories or ())}
        self._missing = spec.missing == "mean"
        most = float(np.finfo(np.float32).max)
        self._low = max([-most, *(low for low in (spec.low, field.low) if low is not None)])
        self._high = min([most, *(high for high in (spec.high, field.high) if high is not None)])

    def write(self, row: NDArray[np.float32], column: int, value: Any) -> None:
        """Write a value of the field into the features of a row, from this column on."""
        if self._categories is not None:
            row[column + self._index(value, self._categories)] = 1
        elif self._shape is not None and value is None:
            raise FieldError(f"is missing; it must hold numbers of the shape {self._shape}")
        elif self._shape is not None:
            row[column : column + self.width] = self.batch([value])[0]
        elif value is None:
            if not self._missing:
                raise FieldError("is missing; it must be a number")
            row[column] = np.nan
        else:
            row[column] = self._number(value)

    def batch(self, values: Any) -> NDArray[np.float32]:
        """The features (batch, width) of many values of a number or a tensor."""
        if isinstance(values, list | tuple):
            values = self._numbers(values)
        array = np.asarray(values)
        shape = self._shape or ()
        fits = array.shape[1:] == shape or (shape in ((), (1,)) and array.shape[1:] in ((), (1,)))
        if array.dtype.kind not in "iuf" or not fits:
            shown = f"it must hold numbers of the shape {shape}" if shape else "it must be a number"
            raise FieldError(f"has {_what(array)}; {shown}")
        inside = (array >= self._low) & (array <= self._high)
        if self._missing:
            inside |= np.isnan(array)
        if not inside.all():
            strange = array[~inside].flat[0]
            raise FieldError(f"has the value {strange!s}; it must hold numbers from {self._low:g} to {self._high:g}")
        return array.reshape(len(array), self.width).astype(np.float32)

    def _numbers(self, values: Any) -> NDArray[Any]:
        """Lists as an array of numbers; as objects if they hold anything else, such as truth values, which numpy would convert."""
        try:
            array = np.array(values, object)
        except ValueError:  # lists of different lengths
            return np.empty(0, object)
        kinds: set[Any] = {type(one) for one in array.flat}
        if kinds <= {int, float}:
            return np.array(values)
        if self._missing and kinds <= {int, float, type(None)}:
            return array.astype(np.float64)
        return array

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


def _what(array: NDArray[Any]) -> str:
    if array.dtype.kind in "iuf":
        return f"rows of the shape {array.shape[1:]}"
    return (
        "values that are not numbers, or lists of different lengths"
        if array.ndim < 2 and not array.size
        else "values that are not numbers"
    )


def split(spec: InputSpec) -> list[tuple[TableField, slice]]:
    """The fields and the features of each."""
    ends = np.cumsum([field.width for field in spec.fields or ()]).tolist()
    return [(field, slice(end - field.width, end)) for field, end in zip(spec.fields or (), ends, strict=True)]


def _short(value: Any) -> str:
    return repr(value)[:60]


def _listed(categories: Sequence[str]) -> str:
    more = f" and {len(categories) - _SHOWN} more" if len(categories) > _SHOWN else ""
    return ", ".join(map(repr, categories[:_SHOWN])) + more
