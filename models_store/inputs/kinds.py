"""What each kind of input must be, and rows of it for checks. The manifest says which kind an ensemble takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models_store.manifest import PADDING, InputSpec

Inputs = NDArray[Any]  # (batch, *shape): float32, or int64 for tokens
NOUNS = {"image": "image", "features": "row", "tokens": "text"}  # one row of each kind, in messages


def dtype(spec: InputSpec) -> np.dtype[Any]:
    """The type of the members' input."""
    return np.dtype(np.int64 if spec.kind == "tokens" else np.float32)


def shown(spec: InputSpec) -> str:
    """The shape of one row, for messages."""
    if spec.kind == "tokens":
        return f"(length,) with a length from 1 to {spec.shape[0]}"
    return f"({', '.join(map(str, spec.shape))}{',' if len(spec.shape) == 1 else ''})"


def batch_shown(spec: InputSpec) -> str:
    """The shape of a batch, for messages."""
    if spec.kind == "tokens":
        return f"(batch, length) with a length from 1 to {spec.shape[0]}"
    return f"(batch, {', '.join(map(str, spec.shape))})"


def fits(spec: InputSpec, shape: Sequence[int]) -> bool:
    """Whether an array of this shape, its batch axis included, can be an input."""
    if spec.kind == "tokens":
        return len(shape) == 2 and 1 <= shape[1] <= spec.shape[0]
    return tuple(shape[1:]) == spec.shape


def fault(spec: InputSpec, inputs: NDArray[Any]) -> str | None:
    """What is wrong with the values of an input of the right shape, worded to follow its name; None if they are allowed.

    Args:
        spec: the input of an ensemble.
        inputs: numbers, (batch, *shape), at least one row.
    """
    if spec.kind == "tokens":
        return _fault_of_tokens(spec, inputs)
    if inputs.dtype.kind not in "iuf":
        return f"holds {inputs.dtype}; send numbers"
    low, high = float(inputs.min()), float(inputs.max())
    if spec.kind == "image":
        if low >= 0 and high <= 1:  # false for NaN
            return None
        return (
            f"has values from {low!r} to {high!r}; pixels must lie in [0, 1]. Divide bytes by 255; do not normalise, "
            "the ensemble does"
        )
    if spec.missing == "mean" and np.isnan(low):
        low, high = (
            float(f(inputs, initial=v, where=~np.isnan(inputs))) for f, v in ((np.min, np.inf), (np.max, -np.inf))
        )
        if low > high:  # every value is missing
            return None
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"has a value that is {_which(inputs, spec)}; every feature must be a finite number"
    # Limits are compared as float32, too, which the members take.
    bottom = -np.inf if spec.low is None else min(spec.low, float(np.float32(spec.low)))
    top = np.inf if spec.high is None else max(spec.high, float(np.float32(spec.high)))
    if low < bottom or high > top:
        return f"has values from {low!r} to {high!r}; the ensemble takes features from {bottom:g} to {top:g}"
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(low)) or not np.isfinite(np.float32(high)):
            return f"has values from {low!r} to {high!r}, which float32 cannot hold"
    return _fault_of_fields(spec, inputs)


def _fault_of_fields(spec: InputSpec, inputs: NDArray[Any]) -> str | None:
    end = 0
    for field in spec.fields or ():
        begin, end = end, end + field.width
        if field.low is None and field.high is None:
            continue
        own = inputs[:, begin:end]
        low, high = (float(f(own, initial=v, where=~np.isnan(own))) for f, v in ((np.min, np.inf), (np.max, -np.inf)))
        bottom = -np.inf if field.low is None else min(field.low, float(np.float32(field.low)))
        top = np.inf if field.high is None else max(field.high, float(np.float32(field.high)))
        if low < bottom or high > top:
            return f"has values from {low!r} to {high!r} in the field {field.name!r}, which takes numbers from {bottom:g} to {top:g}"
    return None


def _which(inputs: NDArray[Any], spec: InputSpec) -> str:
    row, *place = np.argwhere(
        np.isnan(inputs) if spec.missing == "refuse" and np.isnan(inputs).any() else np.isinf(inputs)
    )[0]
    what = "NaN" if np.isnan(inputs[(row, *place)]) else "infinite"
    return f"{what} (row {row}, feature {', '.join(map(str, place))})"


def _fault_of_tokens(spec: InputSpec, inputs: NDArray[Any]) -> str | None:
    assert spec.vocabulary is not None, "tokens have a vocabulary"
    if inputs.dtype.kind not in "iu":
        return f"holds {inputs.dtype}; token ids are integers"
    low, high = int(inputs.min()), int(inputs.max())
    if low < 0 or high >= spec.vocabulary:
        return (
            f"has token ids from {low} to {high}; they go from 1 to {spec.vocabulary - 1}, and {PADDING} fills texts up"
        )
    is_padding = inputs == PADDING
    if is_padding.all(axis=1).any():
        return f"has a text without tokens (row {int(is_padding.all(axis=1).argmax())}); a text has at least one"
    if (inner := (is_padding[:, :-1] & ~is_padding[:, 1:]).any(axis=1)).any():
        return (
            f"has the padding {PADDING} before a token (row {int(inner.argmax())}); it stands at the end of a text only"
        )
    return None


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Put batches of one kind together; texts are filled up to the longest with the padding."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    longest = max(part.shape[1] for part in parts)
    return np.concatenate([_filled(part, longest) for part in parts])


def arranged(spec: InputSpec, inputs: NDArray[Any]) -> Inputs:
    """Checked inputs as the members take them: contiguous, of their type; texts of a closed length are filled up."""
    if spec.kind == "tokens":
        if spec.open_length:  # as short as its texts allow
            longest = int((inputs != PADDING).sum(axis=1).max())
            inputs = inputs[:, :longest]
        else:
            inputs = _filled(inputs, spec.shape[0])
    return np.ascontiguousarray(inputs, dtype=dtype(spec))


def from_texts(spec: InputSpec, texts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Lists of token ids as one array, filled up to the longest.

    Raises:
        ValueError: a value is not an integer that int64 can hold, or a text is too long.
    """
    if any(len(text) > spec.shape[0] for text in texts):
        raise ValueError("a text is too long")
    rows = [np.array(text) for text in texts]
    if any(row.ndim != 1 or (len(row) and row.dtype.kind not in "iu") for row in rows):
        raise ValueError("a text is not a list of integers")
    longest = max((len(row) for row in rows), default=0)
    found = np.full((len(rows), longest), PADDING, np.int64)
    for row, ids in zip(found, rows, strict=True):
        row[: len(ids)] = ids
    return found


def _filled(inputs: Inputs, length: int) -> Inputs:
    return np.pad(inputs, ((0, 0), (0, length - inputs.shape[1])), constant_values=PADDING)


def alone(spec: InputSpec, row: Inputs) -> Inputs:
    """One row (1, *shape) as a client would send it alone: without the padding that its batch needed."""
    if not spec.open_length:
        return row
    return row[:, : max(1, int((row != PADDING).sum()))]


def identity(row: Inputs) -> bytes:
    """The bytes of one row (*shape), the same whatever it was batched with."""
    return (row[row != PADDING] if row.dtype.kind == "i" else row).tobytes()


def _within(spec: InputSpec, features: Inputs) -> Inputs:
    found = features.clip(-np.inf if spec.low is None else spec.low, np.inf if spec.high is None else spec.high)
    end = 0
    for field in spec.fields or ():
        begin, end = end, end + field.width
        if field.low is not None or field.high is not None:
            low = -np.inf if field.low is None else field.low
            found[:, begin:end] = found[:, begin:end].clip(low, np.inf if field.high is None else field.high)
    return found


def blank(spec: InputSpec) -> Inputs:
    """A plain row (1, *shape): a black image, zeros within the range of features, or a text of one token repeated."""
    if spec.kind == "tokens":
        return np.full((1, *spec.shape), PADDING + 1, np.int64)
    zeros = np.zeros((1, *spec.shape), np.float32)
    return zeros if spec.kind == "image" else _within(spec, zeros)


def noise(spec: InputSpec, rows: int, seed: int = 0) -> Inputs:
    """Random rows: uniform pixels, normal features, or uniform token ids in texts of several lengths."""
    rng = np.random.default_rng(seed)
    if spec.kind == "image":
        return rng.random((rows, *spec.shape), np.float32)
    if spec.kind == "features":
        return _within(spec, rng.standard_normal((rows, *spec.shape), np.float32))
    assert spec.vocabulary is not None, "tokens have a vocabulary"
    ids = rng.integers(0, spec.vocabulary, (rows, *spec.shape))
    ids[ids == PADDING] = PADDING + 1
    lengths = 1 + np.arange(rows) * (spec.shape[0] - 1) // max(1, rows - 1)
    return np.where(np.arange(spec.shape[0]) < lengths[::-1, None], ids, PADDING)


def probes(spec: InputSpec, given: Inputs | None = None) -> Inputs:
    """Rows to test a network with, (batch, *shape): up to two of `given`, noise, and extreme rows.

    Without `given`, two more rows of noise are used. The rows differ in size on purpose: statistics of a batch, such as
    its mean or largest value, then change with the rows in it.
    """
    random = noise(spec, 4)
    first = random[2:] if given is None or len(given) == 0 else given[:2]
    if spec.kind == "tokens":
        # The shortest text, too, whose padding is the longest.
        return joined([np.asarray(first, np.int64), random])
    if spec.kind == "image":
        extremes = np.stack([np.zeros(spec.shape, np.float32), np.ones(spec.shape, np.float32)])
        return np.concatenate([first, random[:1], 0.1 * random[1:2], extremes]).astype(np.float32)
    low, high = (
        (first.min(axis=0), first.max(axis=0)) if given is not None else (-np.ones(spec.shape), np.ones(spec.shape))
    )
    centre, reach = (high + low) / 2, (high - low) / 2 + 1e-3
    spread = np.stack([centre + reach * random[0], centre + 0.1 * reach * random[1], low - reach, high + reach])
    return np.concatenate([first, _within(spec, spread)]).astype(np.float32)


def nudged(inputs: Inputs) -> Inputs:
    """The same numbers with different rounding in their last bits; token ids have none."""
    if inputs.dtype.kind in "iu":
        return inputs
    return (inputs * np.float32(1 + 2**-22) + np.float32(1e-7)).astype(np.float32)


def statistics(inputs: Inputs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two simple numbers of each row, for drift: mean and standard deviation of its values.

    Of texts: their length, and the share of distinct tokens in it.
    """
    if inputs.dtype.kind not in "iu":
        flat = inputs.reshape(len(inputs), -1).astype(np.float64)
        if np.isnan(flat).any():  # missing features
            flat = np.where(np.isnan(flat), 0, flat)
        return flat.mean(axis=1), flat.std(axis=1)
    texts = [row[row != PADDING] for row in inputs]
    lengths = np.array([len(text) for text in texts], np.float64)
    distinct = np.array([len(np.unique(text)) for text in texts], np.float64)
    return lengths, distinct / np.maximum(lengths, 1)
