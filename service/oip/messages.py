"""Requests and answers of the Open Inference Protocol over HTTP: JSON, whose tensors may follow it as raw bytes.

The header Inference-Header-Content-Length says where the JSON ends and the bytes begin. It and `binary_data_size` are the
protocol's extension for binary tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from service.http.errors import BadRequestError, TooLargeError
from service.oip import tensors
from service.oip.tensors import Tensor

JSON_BYTES = 4 * 2**20  # largest JSON: it is parsed at once, while Python can do nothing else
MAX_ID = 256  # characters
MOST_CHARACTERS = 26  # of a number and its comma


@dataclass(frozen=True, slots=True)
class Infer:
    """A request, in either protocol."""

    inputs: list[Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: str = ""
    outputs: Mapping[str, bool] | None = None  # whether each is wanted as raw bytes; None: all outputs
    binary: bool = False  # whether all outputs are wanted as raw bytes, if none are named


def read(body: bytes | bytearray, header_length: str | None, max_rows: int) -> Infer:
    """Parse a request.

    Args:
        body: as received.
        header_length: the header Inference-Header-Content-Length; None if the body is JSON as a whole.
        max_rows: largest number of elements of an input of BYTES.

    Raises:
        TooLargeError: the JSON is too long, or an input has too many rows.
        BadRequestError: the JSON, an input, or a field is not valid.
    """
    length = len(body)
    if header_length is not None:
        length = int(header_length[:20]) if header_length.isdecimal() else -1
        if not 0 <= length <= len(body):
            raise BadRequestError(
                f"Inference-Header-Content-Length is {header_length[:40]!r}, but the body has {len(body)} bytes."
            )
    if length > JSON_BYTES:
        raise TooLargeError(
            f"The JSON of the request has {length} bytes; at most {JSON_BYTES} are allowed. Send the inputs as binary tensor data."
        )
    whole = memoryview(body)
    try:
        record = orjson.loads(whole[:length])
    except orjson.JSONDecodeError as error:
        raise BadRequestError(
            f'The request is not JSON ({error}); send {{"inputs": [{{"name": …, "datatype": …, "shape": …, "data": …}}]}}.'
        ) from None
    fields = _object(record, "The request")
    given = _list(fields.get("inputs"), "`inputs`")
    if not given:
        raise BadRequestError("The request has no `inputs`.")
    found: list[Tensor] = []
    place = length
    for one in given:
        entry = _object(one, "An input")
        name, datatype, shape = tensors.check_form(
            entry.get("name"), entry.get("datatype"), entry.get("shape"), max_rows
        )
        size = _object(entry.get("parameters", {}), f"`parameters` of {name[:80]!r}").get("binary_data_size")
        if size is None:
            found.append(tensors.from_values(name, datatype, shape, entry.get("data")))
            continue
        if type(size) is not int or size < 0 or place + size > len(whole):
            raise BadRequestError(
                f"Input {name[:80]!r} says binary_data_size {str(size)[:20]}, but {len(whole) - place} bytes are left of the body."
            )
        found.append(tensors.from_raw(name, datatype, shape, whole[place : place + size]))
        place += size
    if place != len(whole):
        raise BadRequestError(
            f"{len(whole) - place} bytes of the body belong to no input; is Inference-Header-Content-Length set, and are all sizes right?"
        )
    parameters = _object(fields.get("parameters", {}), "`parameters`")
    binary = _boolean(parameters, "binary_data_output", default=False)
    return Infer(found, parameters, _id(fields.get("id", "")), _outputs(fields.get("outputs"), binary=binary), binary)


def _outputs(given: object, *, binary: bool) -> dict[str, bool] | None:
    """The outputs that were named. No output at all means all of them."""
    if not given:
        return None
    found: dict[str, bool] = {}
    for one in _list(given, "`outputs`"):
        entry = _object(one, "An output")
        if not isinstance(name := entry.get("name"), str) or name in found:
            raise BadRequestError("An output has no name, or is named twice.")
        parameters = _object(entry.get("parameters", {}), f"`parameters` of {name[:80]!r}")
        if parameters.get("classification"):
            raise BadRequestError("`classification` is not supported; ask for `label`, `class_name` and `probs`.")
        found[name] = _boolean(parameters, "binary_data", default=binary)
    return found


def write(
    model: str, version: int, request: Infer, parameters: Mapping[str, Any], outputs: Sequence[Tensor]
) -> tuple[bytes, bytes]:
    """Return the JSON of an answer, and the raw bytes that follow it."""
    listed: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for one in outputs:
        entry: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": one.shape}
        if request.binary if request.outputs is None else request.outputs[one.name]:
            raw.append(one.raw())
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        elif isinstance(one.values, list):
            entry["data"] = [text.decode() for text in one.values]
        else:
            entry["data"] = one.values.reshape(-1)
        listed.append(entry)
    answer: dict[str, Any] = {
        "model_name": model,
        "model_version": str(version),
        "parameters": parameters,
        "outputs": listed,
    }
    if request.id:
        answer["id"] = request.id
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), b"".join(raw)


def _id(given: object) -> str:
    if not isinstance(given, str) or len(given) > MAX_ID:
        raise BadRequestError(f"`id` must be a text of at most {MAX_ID} characters.")
    return given


def _boolean(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    if not isinstance(given := parameters.get(name, default), bool):
        raise BadRequestError(f"`{name}` must be true or false.")
    return given


def _object(given: object, what: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadRequestError(f"{what} must be a JSON object.")
    return cast(dict[str, Any], given)


def _list(given: object, what: str) -> list[Any]:
    if not isinstance(given, list):
        raise BadRequestError(f"{what} must be a JSON list.")
    return cast(list[Any], given)


def most_bytes(model: str, request: Infer, outputs: Sequence[Tensor]) -> int:
    """Return an upper bound of the length of the JSON of an answer, from what does not depend on its values."""
    length = 300 + len(model) + len(orjson.dumps(request.id))
    for one in outputs:
        binary = request.binary if request.outputs is None else request.outputs[one.name]
        length += 150 + 21 * len(one.shape) + (0 if binary else MOST_CHARACTERS * math.prod(one.shape))
    return length
