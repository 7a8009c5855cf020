"""Tensors of the Open Inference Protocol: a name, a datatype, a shape, and values as JSON lists or as raw bytes.

Raw bytes are little-endian and row-major. An element of BYTES is its length in four bytes, then its content.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from service.http.errors import BadRequestError, TooLargeError

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"), "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
}  # fmt: skip
BYTES = "BYTES"
MAX_AXES = 16
MAX_SIZE = 2**40  # of an axis, and of a tensor
LENGTH_BYTES = 4  # of the length before each element of BYTES


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor. `values` has the shape of the tensor; of BYTES it is a flat list."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[Any] | list[bytes]

    @classmethod
    def of(cls, name: str, datatype: str, values: NDArray[Any]) -> Tensor:
        """Return numbers as a tensor of `datatype`."""
        return cls(name, datatype, values.shape, np.ascontiguousarray(values, DATATYPES[datatype]))

    @classmethod
    def of_texts(cls, name: str, texts: Sequence[str]) -> Tensor:
        """Return one text for each row as a tensor of BYTES."""
        return cls(name, BYTES, (len(texts),), [text.encode() for text in texts])

    def raw(self) -> bytes:
        """Return the values as raw bytes."""
        if isinstance(self.values, list):
            return b"".join(len(one).to_bytes(LENGTH_BYTES, "little") + one for one in self.values)
        return self.values.tobytes()

    def texts(self) -> list[str]:
        """Return the elements of BYTES as texts.

        Raises:
            BadRequestError: an element is not UTF-8.
        """
        assert isinstance(self.values, list), "only BYTES hold texts"
        try:
            return [one.decode() for one in self.values]
        except UnicodeDecodeError as error:
            raise BadRequestError(f"Input {self.name!r} holds a text that is not UTF-8: {error.reason}.") from None


def check_form(name: object, datatype: object, shape: object, max_rows: int) -> tuple[str, str, tuple[int, ...]]:
    """Check the name, datatype and shape of an input.

    Raises:
        BadRequestError: one of them is missing or not valid.
        TooLargeError: more than `max_rows` elements of BYTES, each of which takes an object.
    """
    if not isinstance(name, str) or not name:
        raise BadRequestError("An input has no `name`; GET /v2/models/NAME says how the inputs are named.")
    where = f"Input {name[:80]!r}"
    if not isinstance(datatype, str) or (datatype not in DATATYPES and datatype != BYTES):
        raise BadRequestError(
            f"{where} has the datatype {str(datatype)[:20]!r}; this service reads {', '.join([*DATATYPES, BYTES])}."
        )
    axes = list(cast(Sequence[object], shape)) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    sizes: tuple[int, ...] = tuple(axis for axis in axes[: MAX_AXES + 1] if type(axis) is int and 0 < axis < MAX_SIZE)
    if not 1 <= len(axes) <= MAX_AXES or len(sizes) < len(axes) or math.prod(sizes) >= MAX_SIZE:
        raise BadRequestError(
            f"{where} has the shape {str(axes[:MAX_AXES])[:80]}; a shape is a list of one to {MAX_AXES} sizes, each at least 1."
        )
    if datatype == BYTES:
        rows, *rest = sizes
        if rest not in ([], [1]):
            raise BadRequestError(
                f"{where} has the shape {list(sizes)}; an input of BYTES has one element in each row: [n] or [n, 1]."
            )
        if rows > max_rows:
            raise TooLargeError(f"{where} has {rows} rows; at most {max_rows} are allowed. Send them in parts.")
    return name, datatype, sizes


def from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> Tensor:
    """Read an input from raw bytes, without copying numbers.

    Raises:
        BadRequestError: there are more or fewer bytes than its shape says.
    """
    count = math.prod(shape)
    if datatype == BYTES:
        return Tensor(name, datatype, shape, _elements(name, count, raw))
    dtype = DATATYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadRequestError(
            f"Input {name[:80]!r} has {len(raw)} bytes; its shape {list(shape)} of {datatype} needs {count * dtype.itemsize}."
        )
    return Tensor(name, datatype, shape, np.frombuffer(raw, dtype).reshape(shape))


def _elements(name: str, count: int, raw: bytes | memoryview) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(raw) and len(found) < count:
        start = place + LENGTH_BYTES
        place = start + int.from_bytes(raw[place:start], "little")
        if place > len(raw):
            break
        found.append(bytes(raw[start:place]))
    if place != len(raw) or len(found) != count:
        raise BadRequestError(
            f"Input {name[:80]!r} does not hold {count} elements of BYTES; each is its length in four bytes, little-endian, and then its content."
        )
    return found


def _flat(where: str, values: Sequence[object]) -> tuple[Sequence[object], tuple[int, ...]]:
    """Return the values of lists within lists, and the shape of those."""
    nesting = [len(values)]
    while values and isinstance(values[0], list):
        rows = [cast(list[object], row) for row in values if isinstance(row, list)]
        if len(rows) < len(values) or len(set(map(len, rows))) > 1 or len(nesting) == MAX_AXES:
            raise BadRequestError(f"{where} is ragged: its lists differ in length or depth.")
        nesting.append(len(rows[0]))
        values = list(itertools.chain.from_iterable(rows))
    return values, tuple(nesting)


def from_values(name: str, datatype: str, shape: tuple[int, ...], values: object) -> Tensor:
    """Read an input from a JSON list, flat or nested, in row-major order.

    Raises:
        BadRequestError: it is not a list of as many values as its shape says, or they are not of its datatype.
    """
    where, count = f"Input {name[:80]!r}", math.prod(shape)
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise BadRequestError(f"{where} has neither `data`, a list, nor `binary_data_size`.")
    if datatype == BYTES:
        flat = list(cast(Sequence[object], values))
        elements = [one if isinstance(one, bytes) else one.encode() for one in flat if isinstance(one, (str, bytes))]
        if not len(flat) == len(elements) == count:
            raise BadRequestError(f"{where} must hold {count} texts, as its shape {list(shape)} says.")
        return Tensor(name, datatype, shape, elements)
    flat, nesting = _flat(where, cast(Sequence[object], values))
    dtype = DATATYPES[datatype]
    if len(flat) != count or (len(nesting) > 1 and nesting != shape):
        raise BadRequestError(
            f"{where} has values of the shape {list(nesting)}; its shape {list(shape)} needs {count}, flat or nested alike."
        )
    # Types are checked before numpy sees the values: with one text among them, it would make each number a text as long.
    if not set(map(type, flat)) <= ({bool} if datatype == "BOOL" else {int, float}):
        raise BadRequestError(f"{where} holds values that are not {datatype} (null, text, true or false?).")
    array: NDArray[Any] = np.array(flat)
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if count and array.dtype.kind not in kinds:
        raise BadRequestError(f"{where} holds values that are not {datatype} (null, text, true or false?).")
    if (
        dtype.kind in "iu"
        and count
        and not np.iinfo(dtype).min <= int(array.min()) <= int(array.max()) <= np.iinfo(dtype).max
    ):
        raise BadRequestError(f"{where} holds values that {datatype} cannot.")
    with np.errstate(over="ignore"):  # infinity is refused later, with a better message
        return Tensor(name, datatype, shape, array.reshape(shape).astype(dtype, copy=False))
