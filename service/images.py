"""From bytes to images. A request is decoded and refused here, alone, before it meets any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import ValidationError

from service.errors import BadRequestError, MediaTypeError, TooLargeError
from service.schemas import PredictRequest

Images = NDArray[np.float32]


def read_request(content_type: str, body: bytes) -> PredictRequest:
    """Parse a body.

    Raises:
        MediaTypeError: not a media type we read.
        BadRequestError: broken JSON, unknown or missing fields.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(
            f'Content-Type {media_type or "none"!r} is not read here; send application/json with {{"inputs": [...]}}.'
        )
    try:
        record = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(
            f'The body is not JSON ({error}); send an object like {{"inputs": [[[[0.0, ...]]]]}}.'
        ) from None
    if not isinstance(record, dict):
        raise BadRequestError(
            f'The body is a JSON {type(record).__name__}; send an object like {{"inputs": [[[[0.0, ...]]]]}}.'
        )
    try:
        return PredictRequest.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        known = ", ".join(PredictRequest.model_fields)
        raise BadRequestError(f"Field {place!r}: {first['msg']}. The fields of a request are {known}.") from None


def as_images(inputs: list[Any], shape: tuple[int, int, int], max_rows: int) -> Images:
    """Nested lists as float32 (batch, C, H, W) in [0, 1].

    Raises:
        BadRequestError: another shape, something that is no number, or a value outside [0, 1].
        TooLargeError: too many images.
    """
    if len(inputs) > max_rows:
        raise TooLargeError(f"{len(inputs)} images in one request; at most {max_rows} are taken. Send them in parts.")
    try:
        array = np.array(inputs)
    except (ValueError, OverflowError):
        raise BadRequestError(
            f"`inputs` is ragged: its lists differ in length. Every image must be {_shape(shape)}."
        ) from None
    # bool, str, None and mixtures end up as other kinds of array.
    if array.dtype.kind not in "iuf":
        raise BadRequestError(
            "`inputs` holds something that is no number (null, text, true or false); send floats in [0, 1]."
        )
    if array.shape[1:] != shape or array.ndim != 4 or len(array) == 0:
        raise BadRequestError(
            f"`inputs` has the shape {array.shape}; this ensemble takes (batch, {', '.join(map(str, shape))}) with at least one image. "
            + (
                "A single image needs a batch axis around it."
                if array.shape == shape
                else "The axes are batch, channel, row, column."
            )
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise BadRequestError(
            f"`inputs` has values from {low:g} to {high:g}; pixels must lie in [0, 1]. Divide bytes by 255; do not normalise, the ensemble does."
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _shape(shape: tuple[int, int, int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
