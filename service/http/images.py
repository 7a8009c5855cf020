"""Converts lists, arrays and encoded images to float32 (batch, C, H, W) in [0, 1].

An invalid image is refused here, before its request can share a batch with others.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import numpy as np
import orjson
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from models_store import decoding
from models_store.errors import DecodeError
from models_store.manifest import InputSpec
from service.http.errors import BadRequestError, TooLargeError
from service.http.large_json import Row

Images = NDArray[np.float32]
FORMATS = ("PNG", "JPEG")
MAX_NPY_HEADER = 4096  # bytes
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the decoded images of one request."""

    rows: int  # number of images
    bytes: int  # size of the float32 pixels that the members take as input
    pixels: int  # number of pixels of encoded images, before they are resized
    # Called with the size of the images in bytes before they are allocated; may raise to refuse them.
    hold: Callable[[int], None] = lambda size: None


def from_lists(inputs: list[Any], spec: InputSpec, limits: Limits) -> Images:
    """Convert nested lists of numbers.

    Raises:
        BadRequestError: wrong shape, a value that is not a number, or a value outside [0, 1].
        TooLargeError: too many images.
    """
    _bound(len(inputs), spec, limits)
    try:
        array = np.array(inputs)
    except (ValueError, OverflowError, MemoryError):
        raise BadRequestError(
            f"`inputs` is ragged: its lists differ in length. Every image must be {_shape(spec)}."
        ) from None
    # bool, str, None and mixtures give arrays of another kind.
    if array.dtype.kind not in "iuf":
        raise BadRequestError(
            "`inputs` holds a value that is not a number (null, text, true or false); send floats in [0, 1]."
        )
    return _checked("`inputs`", array, spec)


def from_rows(rows: Sequence[Row], spec: InputSpec, limits: Limits) -> Images:
    """Parse the JSON text of each element of `inputs`, one by one, so that Python's lock is released between them.

    Raises:
        BadRequestError: no image at all, or an image that from_lists would refuse.
        TooLargeError: too many images.
    """
    _bound(len(rows), spec, limits)
    if not rows:
        raise BadRequestError(f"`inputs` is empty; send at least one image, as lists (batch, {_shape(spec)[1:]}.")
    channels, height, _ = spec.shape
    parsed: list[Images] = []
    for index, row in enumerate(rows):
        where = f"`inputs[{index}]`"
        if row.lists != 1 + channels + channels * height or row.text.count(b",") != math.prod(spec.shape) - 1:
            raise BadRequestError(
                f"{where} does not have the shape {_shape(spec)}. The axes are batch, channel, row, column."
            )
        try:
            image = np.array(orjson.loads(row.text))
        except (ValueError, OverflowError):  # orjson's own error is a ValueError
            raise BadRequestError(f"{where} is ragged or not JSON; every image must be {_shape(spec)}.") from None
        if image.dtype.kind not in "iuf":
            raise BadRequestError(f"{where} holds a value that is not a number (null or text); send floats in [0, 1].")
        parsed.append(_checked(where, image[None], spec))
    return np.concatenate(parsed)


def from_npy(body: bytes, spec: InputSpec, limits: Limits) -> Images:
    """Read a file written by numpy.save; pickled objects are refused, never loaded.

    Raises:
        BadRequestError: not such a file, pickled objects, wrong shape or dtype, or a value outside [0, 1].
        TooLargeError: too many images.
    """
    shape, fortran, dtype, start = _npy_header(body)
    if dtype.kind not in "iuf":
        raise BadRequestError(f"The array's dtype is {dtype}; send float32 in [0, 1]. Pickled objects are not read.")
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise BadRequestError(
            f"The array's header says {shape} of {dtype}, but {len(body) - start} bytes follow. Was the file cut off?"
        )
    _check_shape("The array", shape, spec)
    _bound(shape[0], spec, limits)
    flat = np.frombuffer(body, dtype, offset=start)
    return _checked("The array", flat.reshape(shape, order="F" if fortran else "C"), spec)


@dataclass(frozen=True, slots=True)
class Encoded:
    """PNG or JPEG files of which only the headers were read; the pixels are not decoded yet."""

    images: list[Image.Image]
    where: str
    spec: InputSpec
    pixels: int

    def decode(self) -> Images:
        """Decode all files.

        Raises:
            BadRequestError: a file is damaged, or the image has a size that the ensemble does not accept.
        """
        return np.stack(
            [_named(self.where, i, decoding.to_array, image, self.spec) for i, image in enumerate(self.images)]
        )


def open_encoded(files: Sequence[bytes], where: str, spec: InputSpec, limits: Limits) -> Encoded:
    """Read the headers of PNG or JPEG files. In error messages, `where` names a file; {} in it is the file's index.

    Raises:
        BadRequestError: no file at all, or a file that is not PNG or JPEG.
        TooLargeError: too many images, or too many pixels.
    """
    _bound(len(files), spec, limits)
    if not files:
        raise BadRequestError("`images` is empty; send at least one.")
    opened = [_named(where, i, decoding.open_image, file, FORMATS) for i, file in enumerate(files)]
    pixels = sum(image.width * image.height for image in opened)
    if pixels > limits.pixels:
        raise TooLargeError(
            f"{pixels} pixels to decode in one request; at most {limits.pixels} are allowed. Send smaller or fewer images."
        )
    return Encoded(opened, where, spec, pixels)


def _named(where: str, index: int, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return step(*args, **kwargs)
    except DecodeError as error:
        raise BadRequestError(f"{where.format(index)}: {error}") from None


def _bound(rows: int, spec: InputSpec, limits: Limits) -> None:
    allowed = min(limits.rows, limits.bytes // (4 * math.prod(spec.shape)))
    if rows > allowed:
        raise TooLargeError(f"{rows} images in one request; at most {allowed} are allowed. Send them in parts.")
    limits.hold(rows * 4 * math.prod(spec.shape))


def _npy_header(body: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    # The header length takes two bytes in version 1, and four in versions 2 and 3. These two differ only in the
    # encoding of field names.
    lead = 10 if body[6:7] == b"\x01" else 12
    start = lead + int.from_bytes(body[8:lead], "little")
    try:
        if start > MAX_NPY_HEADER:
            raise ValueError("a header longer than any array needs")
        return *_parse_npy_header(body[:start]), start
    except Exception as error:  # documented: ValueError; but the header is parsed as Python and may fail in many ways
        raise BadRequestError(
            f"The body is not a file written by numpy.save ({str(error)[:100]}); send numpy.save(file, images.astype('float32'))."
        ) from None


@lru_cache(maxsize=256)  # numpy parses headers as Python, which is slow, and a client's arrays have few distinct shapes
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(header)
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if not all(0 <= axis < 2**40 for axis in shape):
        raise ValueError("a negative or absurd axis")
    return shape, fortran, dtype


def _check_shape(what: str, shape: tuple[int, ...], spec: InputSpec) -> None:
    if shape[1:] == spec.shape and shape[0] > 0:
        return
    hint = (
        "A single image needs a batch axis around it."
        if shape == spec.shape
        else "The axes are batch, channel, row, column."
    )
    raise BadRequestError(
        f"{what} has the shape {str(shape)[:80]}; this ensemble takes (batch, {_shape(spec)[1:]} with at least one image. {hint}"
    )


def _checked(what: str, array: NDArray[Any], spec: InputSpec) -> Images:
    _check_shape(what, array.shape, spec)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise BadRequestError(
            f"{what} has values from {low!r} to {high!r}; pixels must lie in [0, 1]. Divide bytes by 255; do not normalise, the ensemble does."
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _shape(spec: InputSpec) -> str:
    return "(" + ", ".join(map(str, spec.shape)) + ")"
