"""Converts lists, arrays, named fields and encoded images to what members take: (batch, *shape).

An invalid input is refused here, before its request can share a batch with others.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import numpy as np
import orjson
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from models_store.errors import DecodeError, FieldError, TextError
from models_store.inputs import decoding, fields, kinds
from models_store.inputs.kinds import Inputs
from models_store.inputs.texts import Tokenizer
from models_store.manifest import InputSpec
from service.http.errors import BadRequestError, TooLargeError
from service.http.large_json import Row, lists_of

Images = Inputs  # of any kind; most are images
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_NPY_HEADER = 4096  # bytes
MAX_AXES = 16
MAX_CODE = 0x10FFFF  # the last character of Unicode
PIXELS_OF_A_CHARACTER = 16  # the time to find the tokens of a character, in that of decoding a pixel
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the decoded images of one request."""

    rows: int  # number of images, or other inputs
    bytes: int  # size of what the members take as input
    pixels: int  # number of pixels of encoded images, before they are resized
    # Called with the size of the images in bytes before they are allocated; may raise to refuse them.
    hold: Callable[[int], None] = lambda size: None


def from_lists(inputs: list[Any], spec: InputSpec, limits: Limits) -> Images:
    """Convert nested lists of numbers, or rows with named fields.

    Raises:
        BadRequestError: wrong shape, a value that is not a number, or a value that is not allowed; a field that is
            unknown, missing or wrong.
        TooLargeError: too many images.
    """
    _bound(len(inputs), spec, limits)
    if inputs and isinstance(inputs[0], dict):
        return _from_fields(inputs, spec)
    try:
        array = kinds.from_texts(spec, inputs) if spec.kind == "tokens" else np.array(inputs)
    except (TypeError, ValueError, OverflowError, MemoryError):
        if spec.kind == "tokens":
            raise BadRequestError(
                f"`inputs` must be a list of texts, each a list of token ids {_shape(spec)}; ids are whole numbers."
            ) from None
        raise BadRequestError(
            f"`inputs` is ragged: its lists differ in length. Every {_noun(spec)} must be {_shape(spec)}."
        ) from None
    # bool, str, None and mixtures give arrays of another kind.
    if array.dtype.kind not in "iuf":
        raise BadRequestError(
            "`inputs` holds a value that is not a number (null, text, true or false); send floats in [0, 1]."
            if spec.kind == "image"
            else "`inputs` holds a value that is not a number (null, text, true or false)."
        )
    return _checked("`inputs`", array, spec)


def _from_fields(rows: list[Any], spec: InputSpec) -> Images:
    if spec.fields is None:
        raise BadRequestError(
            f"`inputs` holds objects, but this ensemble has no named fields; send lists {kinds.batch_shown(spec)}."
        )
    if wrong := next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None):
        raise BadRequestError(f"`inputs[{wrong}]` is not an object of named fields, as the others are.")
    try:
        return fields.encode(rows, spec)
    except FieldError as error:
        raise BadRequestError(f"`inputs`: {error}.") from None


def from_texts(texts: Sequence[str], spec: InputSpec, tokenizer: Tokenizer | None, limits: Limits) -> Images:
    """Turn texts into token ids.

    Raises:
        BadRequestError: the ensemble takes no texts, or a text has no token or too many.
        TooLargeError: too many texts.
    """
    if tokenizer is None:
        what = "token ids" if spec.kind == "tokens" else spec.kind
        raise BadRequestError(
            f"This ensemble takes {what} and has no tokenizer; send `inputs` {kinds.batch_shown(spec)}."
        )
    if not texts:
        raise BadRequestError("`texts` is empty; send at least one.")
    _bound(len(texts), spec, limits)
    if (pixels := work_of(texts)) > limits.pixels:
        raise TooLargeError(
            f"{pixels // PIXELS_OF_A_CHARACTER} characters in one request; at most {limits.pixels // PIXELS_OF_A_CHARACTER} are allowed. Send fewer texts at a time."
        )
    try:
        return _checked("`texts`", kinds.from_texts(spec, tokenizer.fitting(texts, spec)), spec)
    except TextError as error:
        raise BadRequestError(f"`texts`: {error}.") from None


def work_of(texts: Sequence[str]) -> int:
    """The work of turning texts into token ids, in pixels that are decoded in the same time."""
    return PIXELS_OF_A_CHARACTER * sum(map(len, texts))


def none(spec: InputSpec, limits: Limits) -> Images:
    """Stand for the inputs of a request that has texts."""
    raise BadRequestError(f"This is answered for inputs {kinds.batch_shown(spec)} only; send `inputs`.")


def from_columns(columns: Mapping[str, Any], spec: InputSpec, limits: Limits) -> Images:
    """Convert a batch of each named field.

    Raises:
        BadRequestError: a field is unknown, missing or wrong.
        TooLargeError: too many rows.
    """
    if spec.fields is None:
        raise BadRequestError(
            f"`inputs` is an object, but this ensemble has no named fields; send lists {kinds.batch_shown(spec)}."
        )
    first: Any = next(iter(columns.values()), ())
    _bound(len(first) if hasattr(first, "__len__") else 1, spec, limits)
    try:
        rows = fields.from_columns(columns, spec)
    except FieldError as error:
        raise BadRequestError(f"`inputs`: {error}.") from None
    return _checked("`inputs`", rows, spec)


def from_npz(body: bytes, spec: InputSpec, limits: Limits) -> Images:
    """Read a file written by numpy.savez: an array for each named field. Compressed files are refused: their size is unknown.

    Raises:
        BadRequestError: not such a file, or a field that is unknown, missing or wrong.
        TooLargeError: too many rows.
    """
    limits.hold(len(body))
    try:
        _bound_zip(body, len(spec.fields or ()) + 1)
        with zipfile.ZipFile(io.BytesIO(body)) as file:
            entries = file.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in entries):
                raise ValueError("it is compressed")
            # Entries may overlap: a small file could otherwise be read many times over.
            if sum(one.file_size for one in entries) > len(body) or len({one.filename for one in entries}) < len(
                entries
            ):
                raise ValueError("its entries overlap")
            arrays = {one.filename.removesuffix(".npy"): file.read(one) for one in entries}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, RuntimeError, EOFError) as error:
        raise BadRequestError(
            f"The body is not a file written by numpy.savez ({str(error)[:100]}); send numpy.savez(file, name=array, ...)."
        ) from None
    return from_columns({name: _array(name, content) for name, content in arrays.items()}, spec, limits)


def _bound_zip(body: bytes, most: int) -> None:
    """Check the end of a zip file, before its directory is read: an object is made for every entry."""
    end = body[-22:]
    entries, size = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if end[:4] != b"PK\5\6":
        raise ValueError("its end is missing")
    if entries > most or size > 1024 * most:
        raise ValueError(f"more than {most} arrays, or names of more than 1000 bytes")


def _array(name: str, content: bytes) -> NDArray[Any]:
    shape, fortran, dtype, start = _npy_header(content)
    right_size = math.prod(shape) * dtype.itemsize == len(content) - start
    if dtype.kind not in "iufU" or not dtype.itemsize or not 1 <= len(shape) <= MAX_AXES or not right_size:
        raise BadRequestError(
            f"The array {name[:80]!r} holds {dtype} {str(shape)[:80]}; send a batch of numbers, or of texts."
        )
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise BadRequestError(f"The array {name[:80]!r} cannot be read: {error}.") from None
    if dtype.kind == "U" and len(content) > start:
        codes = np.frombuffer(content, np.dtype(np.uint32).newbyteorder(dtype.byteorder), offset=start)
        if int(np.max(codes)) > MAX_CODE:
            raise BadRequestError(f"The array {name[:80]!r} holds texts that are not Unicode.")
    return array


def from_rows(rows: Sequence[Row], spec: InputSpec, limits: Limits) -> Images:
    """Parse the JSON text of each element of `inputs`, one by one, so that Python's lock is released between them.

    Raises:
        BadRequestError: no image at all, or an image that from_lists would refuse.
        TooLargeError: too many images.
    """
    _bound(len(rows), spec, limits)
    if not rows:
        raise BadRequestError(
            f"`inputs` is empty; send at least one {_noun(spec)}, as lists {kinds.batch_shown(spec)}."
        )
    lists, numbers = lists_of(spec.shape), math.prod(spec.shape)
    parsed: list[Images] = []
    for index, row in enumerate(rows):
        where = f"`inputs[{index}]`"
        commas = row.text.count(b",")
        if row.lists != lists or (commas >= numbers if spec.kind == "tokens" else commas != numbers - 1):
            raise BadRequestError(f"{where} does not have the shape {_shape(spec)}.{_axes(spec)}")
        try:
            image = np.array(orjson.loads(row.text))
        except (ValueError, OverflowError):  # orjson's own error is a ValueError
            raise BadRequestError(
                f"{where} is ragged or not JSON; every {_noun(spec)} must be {_shape(spec)}."
            ) from None
        if image.dtype.kind not in "iuf":
            raise BadRequestError(f"{where} holds a value that is not a number (null or text).")
        parsed.append(_checked(where, image[None], spec))
    return kinds.joined(parsed)


def from_npy(body: bytes, spec: InputSpec, limits: Limits) -> Images:
    """Read a file written by numpy.save; pickled objects are refused, never loaded.

    Raises:
        BadRequestError: not such a file, pickled objects, wrong shape or dtype, or a value that is not allowed.
        TooLargeError: too many images.
    """
    shape, fortran, dtype, start = _npy_header(body)
    if dtype.kind not in "iuf":
        raise BadRequestError(f"The array's dtype is {dtype}; send numbers. Pickled objects are not read.")
    if math.prod(shape) * dtype.itemsize != len(body) - start:
        raise BadRequestError(
            f"The array's header says {shape} of {dtype}, but {len(body) - start} bytes follow. Was the file cut off?"
        )
    _check_shape("The array", shape, spec)
    _bound(shape[0], spec, limits)
    flat = np.frombuffer(body, dtype, offset=start)
    return _checked("The array", flat.reshape(shape, order="F" if fortran else "C"), spec)


def from_array(what: str, array: NDArray[Any], spec: InputSpec, limits: Limits) -> Images:
    """Check an array of numbers, which `what` names in messages.

    Raises:
        BadRequestError: wrong shape, or a value that is not allowed.
        TooLargeError: too many images.
    """
    _check_shape(what, array.shape, spec)
    _bound(array.shape[0], spec, limits)
    return _checked(what, array, spec)


@dataclass(frozen=True, slots=True)
class Encoded:
    """PNG, JPEG or WebP files of which only the headers were read; the pixels are not decoded yet."""

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
    """Read the headers of PNG, JPEG or WebP files. In error messages, `where` names a file; {} in it is the file's index.

    Raises:
        BadRequestError: no file at all, or a file that is not PNG, JPEG or WebP.
        TooLargeError: too many images, or too many pixels.
    """
    if spec.kind != "image":
        raise BadRequestError(f"{where.format(0)} is an image, but this ensemble takes {spec.kind}; send `inputs`.")
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
    size = kinds.dtype(spec).itemsize * math.prod(spec.shape)
    allowed = min(limits.rows, limits.bytes // size)
    if rows > allowed:
        raise TooLargeError(f"{rows} {_noun(spec)}s in one request; at most {allowed} are allowed. Send them in parts.")
    limits.hold(rows * size)


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
    if len(shape) and shape[0] > 0 and kinds.fits(spec, shape):
        return
    hint = f" A single {_noun(spec)} needs a batch axis around it." if shape == spec.shape else _axes(spec)
    raise BadRequestError(
        f"{what} has the shape {str(shape)[:80]}; this ensemble takes {kinds.batch_shown(spec)} and at least one {_noun(spec)}.{hint}"
    )


def _checked(what: str, array: NDArray[Any], spec: InputSpec) -> Images:
    _check_shape(what, array.shape, spec)
    if (fault := kinds.fault(spec, array)) is not None:
        raise BadRequestError(f"{what} {fault}.")
    return kinds.arranged(spec, array)


def _shape(spec: InputSpec) -> str:
    return kinds.shown(spec)


def _noun(spec: InputSpec) -> str:
    return kinds.NOUNS[spec.kind]


def _axes(spec: InputSpec) -> str:
    return " The axes are batch, channel, row, column." if spec.kind == "image" else ""
