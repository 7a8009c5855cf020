"""Large JSON bodies: bounded before they are parsed, and parsed one image at a time.

A parser holds Python's lock until it is done, and creates an object for every number and every list. So the brackets,
quotes and commas of a large body are counted first. Then `inputs` is cut out as bytes, and each image is parsed
separately: requests on other connections wait for at most one image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models_store.manifest import InputSpec
from service.http.errors import BadRequestError, TooLargeError

LARGE_BYTES = 64 * 1024  # smaller bodies are parsed at once
_FIELDS = 32  # generous bound on the brackets, names, strings and commas of the other fields of a request
_INPUTS = re.compile(rb'"inputs"\s*:\s*\[')
# Not within a text, where quotes have a backslash.
_TEXTS = re.compile(rb'"texts"\s*:\s*\[')
# A list of rows with named fields, or an object with a batch of each field.
_NAMED = re.compile(rb'"inputs"\s*:\s*(\[\s*)?\{')


@dataclass(frozen=True, slots=True)
class Row:
    """One element of `inputs` as JSON text."""

    text: bytes
    lists: int  # number of lists in it, the outermost included


def lists_of(shape: Sequence[int]) -> int:
    """Number of lists in one input of this shape, the outermost included."""
    return 1 + sum(math.prod(shape[:axis]) for axis in range(1, len(shape)))


def cut(body: bytes, specs: Sequence[InputSpec], max_rows: int) -> tuple[bytes, list[Row] | None]:
    """Cut the elements of `inputs` out of a body.

    Args:
        body: the complete body.
        specs: the inputs of all ensembles that are served. A body with more lists or fields than any of them allows is
            refused unparsed.
        max_rows: largest number of images in one request.

    Returns:
        The body with an empty list for `inputs`, and the elements. If the body has no `inputs`: the unchanged body and
        None.

    Raises:
        BadRequestError: the body cannot be a valid request.
        TooLargeError: more than `max_rows` images.
    """
    if _NAMED.search(body) is not None:
        _bound_named(body, specs, max_rows)
        return body, None
    if _TEXTS.search(body) is not None:
        _bound_texts(body, max_rows)
        return body, None
    if max(body.count(b"["), body.count(b"]")) > _most_lists(len(body), specs, max_rows) + _FIELDS:
        raise BadRequestError(
            "The body has more lists than a request of that size can have. `inputs` is (batch, C, H, W): see /ensembles for the shapes."
        )
    if body.count(b'"') > 2 * (max_rows + _FIELDS):
        raise BadRequestError(
            f"The body has more strings than {max_rows} encoded images and the other fields of a request need."
        )
    found = _INPUTS.search(body)
    if found is None:
        _bound_rest(body, max_rows)
        return body, None
    start = found.end() - 1
    codes = np.frombuffer(body, np.uint8, offset=start)
    at = np.flatnonzero((codes == ord("[")) | (codes == ord("]")))
    depth = np.cumsum(np.where(codes[at] == ord("["), 1, -1))
    closed = np.flatnonzero(depth == 0)
    if not len(closed):
        raise BadRequestError("The body is not JSON: the list `inputs` is not closed. Was the body cut off?")
    at, depth = at[: closed[0] + 1], depth[: closed[0] + 1]
    end = start + int(at[-1]) + 1
    rest = body[: start + 1] + body[end - 1 :]
    _bound_rest(rest, max_rows)
    return rest, _rows(body[start:end], at, depth, max_rows)


def _most_lists(size: int, specs: Sequence[InputSpec], max_rows: int) -> int:
    # A number takes at least two bytes, its comma included. Texts may have a single token.
    numbers = [(spec, 1 if spec.kind == "tokens" else math.prod(spec.shape)) for spec in specs]
    return 1 + max(
        (min(max_rows, 1 + size // (2 * count)) * lists_of(spec.shape) for spec, count in numbers), default=0
    )


def _bound_named(body: bytes, specs: Sequence[InputSpec], max_rows: int) -> None:
    """Rows with named fields: each has at most the fields of an ensemble, and each field a name and a text."""
    most = max((len(spec.fields or ()) for spec in specs), default=0)
    if body.count(b"{") > max_rows * (1 + _marks(specs, "{")) + _FIELDS:
        raise TooLargeError(f"More than {max_rows} rows in one request. Send them in parts.")
    tensors = [[field.shape for field in spec.fields or () if field.shape] for spec in specs]
    numbers = max((sum(map(math.prod, shapes)) for shapes in tensors), default=0)
    lists = max((sum(map(lists_of, shapes)) for shapes in tensors), default=0)
    commas = max_rows * (most + 1 + numbers + _marks(specs, ",")) + _FIELDS
    if body.count(b'"') > 4 * (max_rows * most + _FIELDS) or body.count(b",") > commas:
        raise BadRequestError(f"The body has more fields than {max_rows} rows of an ensemble that is served have.")
    if body.count(b"[") > max_rows * (lists + _marks(specs, "[")) + most + _FIELDS:
        raise BadRequestError(
            "The body has more lists than the named fields of an ensemble that is served; see /ensembles for their shapes."
        )


def _bound_texts(body: bytes, max_rows: int) -> None:
    """Texts may hold any marks, so only those outside of strings count."""
    plain = body.replace(b"\\\\", b"__").replace(b'\\"', b"__")  # now every quote begins or ends a string
    codes = np.frombuffer(plain, np.uint8)
    outside = np.cumsum(codes == ord('"'), dtype=np.uint8) % 2 == 0
    commas = int(np.count_nonzero(outside & (codes == ord(","))))
    opened = int(np.count_nonzero(outside & ((codes == ord("[")) | (codes == ord("{")))))
    if commas > max_rows + _FIELDS:
        raise TooLargeError(f"More than {max_rows} texts in one request. Send them in parts.")
    if opened > _FIELDS:
        raise BadRequestError(
            "The body has more lists than a request with `texts` can have; `texts` is a list of strings."
        )


def _marks(specs: Sequence[InputSpec], mark: str) -> int:
    """How often a mark may stand in the names and texts of one row."""
    return max(
        (
            sum(field.name.count(mark) + max((one.count(mark) for one in field.categories or ()), default=0) for field in spec.fields or ())
            for spec in specs
        ),
        default=0,
    )  # fmt: skip


def _bound_rest(rest: bytes, max_rows: int) -> None:
    if rest.count(b",") > max_rows + _FIELDS or rest.count(b"[") + rest.count(b"{") > _FIELDS:
        raise BadRequestError(
            f"The body holds more than {max_rows} images and the other fields of a request. Is an array in a field other than `inputs`?"
        )


def _rows(inputs: bytes, at: np.ndarray, depth: np.ndarray, max_rows: int) -> list[Row]:
    opening = np.diff(depth, prepend=0) > 0
    starts, ends = np.flatnonzero(opening & (depth == 2)), np.flatnonzero(~opening & (depth == 1))
    if len(starts) > max_rows:
        raise TooLargeError(f"{len(starts)} images in one request; at most {max_rows} are allowed. Send them in parts.")
    if b'"' in inputs or b"true" in inputs or b"false" in inputs:
        raise BadRequestError(
            "`inputs` holds a value that is not a number (null, text, true or false); send floats in [0, 1]."
        )
    rows: list[Row] = []
    before = 1
    for first, last in zip(starts.tolist(), ends.tolist(), strict=True):
        begin, end = int(at[first]), int(at[last]) + 1
        if inputs[before:begin].strip() != (b"," if rows else b""):
            raise BadRequestError(
                "`inputs` is not a list of images: two of its elements are not separated by exactly one comma."
            )
        rows.append(Row(inputs[begin:end], (last - first + 1) // 2))
        before = end
    if inputs[before:-1].strip():
        raise BadRequestError("`inputs` is not a list of images; send lists (batch, C, H, W).")
    return rows
