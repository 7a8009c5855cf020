"""Parses request bodies: media types and JSON fields. Pixels are decoded in images.py."""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import orjson
from pydantic import BaseModel, ValidationError

from models_store.manifest import InputSpec
from service.http import images
from service.http.errors import BadRequestError, MediaTypeError
from service.http.images import Encoded, Images, Limits
from service.http.large_json import LARGE_BYTES, cut
from service.http.schemas import Options, PredictRequest

JSON = "application/json"
NPY = "application/x-npy"
NPZ = "application/x-npz"
ENCODED = ("image/png", "image/jpeg", "image/webp")
SPELLINGS = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
# What the first bytes of a body say, for clients that do not name its type.
MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
    b"\x93NUMPY": NPY,
    b"PK\x03\x04": NPZ,
}
ANY = "application/octet-stream"
EXAMPLE = '{"inputs": [[[[0.0, ...]]]]}'
if TYPE_CHECKING:
    from service.inference.opening import Ensemble
    from service.inference.policy import Mode

Model = TypeVar("Model", bound=BaseModel)
Open = Callable[[InputSpec, Limits], Images | Encoded]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose fields are valid and whose pixels are not decoded yet."""

    options: Options
    open: Open  # returns arrays, or encoded images that remain to be decoded
    encoded: bool = False  # True if `open` returns encoded images
    named: int = 0  # number of rows with named fields, which take longer than their bytes suggest
    version: int | None = None  # that must answer; None: the active one, or its canary
    texts: Sequence[str] | None = None  # which the ensemble's tokenizer turns into ids; `open` is not used then
    check: Callable[[Ensemble, Mode], None] | None = None  # refuses what a version, in its mode, cannot answer


def refuse_coded(coding: str | None) -> None:
    """Refuse a body that is compressed, by the header Content-Encoding.

    Raises:
        MediaTypeError: it is.
    """
    if coding is not None and (coding := coding.strip().lower()) not in ("", "identity"):
        raise MediaTypeError(f"Content-Encoding {coding[:80]!r} is not supported; send the body uncompressed.")


def read_request(
    content_type: str,
    query: Sequence[tuple[str, str]],
    body: bytes | bytearray,
    specs: Sequence[InputSpec],
    max_rows: int,
) -> Asked:
    """Parse a body. With an array or an image, the other fields are query parameters.

    Args:
        content_type: the Content-Type header.
        query: names and values of the query parameters.
        body: the body as received.
        specs: the inputs of all ensembles that are served.
        max_rows: largest number of images in one request.

    Raises:
        TooLargeError: more than `max_rows` images.
        MediaTypeError: the media type is not supported.
        BadRequestError: invalid JSON, or a field that is unknown, missing, duplicate, or invalid.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    media_type = SPELLINGS.get(media_type, media_type)
    if media_type == ANY:
        media_type = next((kind for magic, kind in MAGIC.items() if body.startswith(magic)), ANY)
    if media_type == "multipart/form-data":
        raise MediaTypeError(
            "Forms (multipart/form-data) are not read. Send the file itself as the body: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' URL; "
            'several files as JSON: {"images": [base64, ...]}.'
        )
    if media_type == JSON:
        if query:
            raise BadRequestError(
                f"Query parameter {query[0][0]!r} with a JSON body; its fields go into the body: {EXAMPLE}."
            )
        return _read_json(bytes(body), specs, max_rows)
    if media_type == NPY:
        return Asked(_read_query(query), partial(images.from_npy, bytes(body)))
    if media_type == NPZ:
        return Asked(_read_query(query), partial(images.from_npz, bytes(body)))
    if media_type in ENCODED:
        return Asked(_read_query(query), partial(images.open_encoded, [bytes(body)], "The body"), encoded=True)
    raise MediaTypeError(
        f"Content-Type {media_type[:80] or 'none'!r} is not supported; send {JSON}, {NPY} (numpy.save), {NPZ} (numpy.savez, for named fields), {' or '.join(ENCODED)}."
    )


def _read_json(body: bytes, specs: Sequence[InputSpec], max_rows: int) -> Asked:
    rows = None
    if len(body) > LARGE_BYTES:
        body, rows = cut(body, specs, max_rows)
    try:
        record = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"The body is not JSON ({error}); send an object like {EXAMPLE}.") from None
    if not isinstance(record, dict):
        raise BadRequestError(
            f"The body is a JSON {type(cast(object, record)).__name__}; send an object like {EXAMPLE}."
        )
    fields = cast(dict[str, Any], record)
    # orjson silently keeps the last of duplicate keys. In a valid request every colon follows a key, so counting colons
    # is a cheap check for duplicates.
    if body.count(b":") != len(fields):
        _refuse_duplicates(body)
    request = validated(PredictRequest, PredictRequest.model_validate, fields)
    if sum(given is not None for given in (request.inputs, request.images, request.texts)) != 1:
        raise BadRequestError(
            f'A request has one of `inputs`, `images` and `texts`: {EXAMPLE}, {{"images": [base64, ...]}} or {{"texts": ["..."]}}.'
        )
    if request.texts is not None:
        return Asked(request, images.none, texts=request.texts)
    if isinstance(request.inputs, dict):
        return Asked(request, partial(images.from_columns, request.inputs), named=len(request.inputs))
    if request.inputs is not None:
        if not (request.inputs and isinstance(request.inputs[0], dict)):  # values of named fields may be texts
            _refuse_texts(body, fields)
        if rows is not None and not request.inputs:
            return Asked(request, partial(images.from_rows, rows))
        named = len(request.inputs) if request.inputs and isinstance(request.inputs[0], dict) else 0
        return Asked(request, partial(images.from_lists, request.inputs), named=named)
    encoded = [_from_base64(text, i) for i, text in enumerate(request.images or ())]
    return Asked(request, partial(images.open_encoded, encoded, "`images[{}]`"), encoded=True)


def _read_query(query: Sequence[tuple[str, str]]) -> Options:
    fields = dict(query)
    if len(fields) != len(query):
        raise BadRequestError(
            f"A query parameter is given twice: {', '.join(name for name, _ in query)}. Give each once."
        )
    return validated(Options, Options.model_validate_strings, fields)


def validated(model: type[Model], validate: Callable[[Any], Model], record: dict[str, Any]) -> Model:
    """Return the fields of a request as a model.

    Args:
        model: the fields that it may have.
        validate: how `model` reads them.
        record: the fields.

    Raises:
        BadRequestError: a field is unknown, missing, or invalid.
    """
    known = ", ".join(model.model_fields)
    # Checked before pydantic, which would write an error for each of a million unknown fields.
    if unknown := next((name for name in record if name not in model.model_fields), None):
        raise BadRequestError(f"Field {unknown[:80]!r} is unknown. The fields of a request are {known}.")
    try:
        return validate(record)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        # Without pydantic's names of alternatives, such as list[any].
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:80]
        raise BadRequestError(f"Field {place!r}: {first['msg']}. The fields of a request are {known}.") from None


def _refuse_duplicates(body: bytes) -> None:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise BadRequestError(f"Field {twice[:80]!r} is given twice; give each field once.")
        return found

    try:
        json.loads(body, object_pairs_hook=unique)
    except (RecursionError, ValueError):
        raise BadRequestError(
            f"The body is nested too deeply to be a request; send an object like {EXAMPLE}."
        ) from None


def _refuse_texts(body: bytes, fields: dict[str, Any]) -> None:
    # With one string among the numbers, numpy would convert all of them to strings, each as long as the longest. It
    # would also read true as 1.
    texts = [value for value in fields.values() if isinstance(value, str)]
    quotes = 2 * (len(fields) + len(texts))
    words = sum(isinstance(value, bool) for value in fields.values())
    words += sum(text.count("true") + text.count("false") for text in texts)
    if body.count(b'"') != quotes or body.count(b"true") + body.count(b"false") != words:
        raise BadRequestError("`inputs` holds a value that is not a number (null, text, true or false).")


def _from_base64(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(
            f"`images[{index}]` is not base64. Send the bytes of a PNG or JPEG file in base64; URLs are not fetched."
        ) from None
