"""Requests and answers of the Open Inference Protocol over gRPC, to and from what the service knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from service.http.bodies import Asked
from service.http.errors import BadRequestError, TooLargeError
from service.http.intake import Body
from service.oip import inference, tensors
from service.oip.messages import MAX_ID, Infer
from service.oip.routes import version_of
from service.oip.schema import message
from service.oip.tensors import BYTES, Tensor
from service.predicting import Answered

NOT_A_REQUEST = "The message is not a ModelInferRequest of the Open Inference Protocol."
MOST_FIELDS = 1024  # of a message: inputs, outputs, parameters and raw contents
BESIDE_BYTES = 2**20  # of a message, without raw contents
RAW_CONTENTS = 7 << 3 | 2  # tag of raw_input_contents
VARINT, LENGTHS = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # bytes of those of fixed length
InferRequest, InferResponse = message("ModelInferRequest"), message("ModelInferResponse")
# The field of InferTensorContents that holds each datatype; FP16 has none.
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", BYTES: "bytes_contents",
}  # fmt: skip


class GrpcInfer:
    """One request: what was asked decides how the answer is written."""

    def __init__(self, body: Body, max_rows: int):
        self._body, self._max_rows = body, max_rows
        self._request: Infer | None = None

    def read(self, specs: object) -> Asked:
        """Parse the message.

        Raises:
            BadRequestError: it, an input, or a parameter is not valid.
            TooLargeError: it holds too much beside raw bytes.
        """
        data = bytes(self._body.data)
        _bound(data)
        try:
            found = InferRequest.FromString(data)
        except DecodeError:
            raise BadRequestError(NOT_A_REQUEST) from None
        if not found.inputs:
            raise BadRequestError("The request has no inputs.")
        if len(found.id) > MAX_ID:
            raise BadRequestError(f"`id` has more than {MAX_ID} characters.")
        raw = found.raw_input_contents
        if raw and len(raw) != len(found.inputs):
            raise BadRequestError(f"{len(found.inputs)} inputs, but {len(raw)} raw_input_contents; send one for each.")
        outputs = {one.name: True for one in found.outputs}
        if len(outputs) < len(found.outputs):
            raise BadRequestError("An output is named twice.")
        self._request = Infer(
            [_input(one, raw[number] if raw else None, self._max_rows) for number, one in enumerate(found.inputs)],
            _values(found.parameters), found.id, outputs or None, True,
        )  # fmt: skip
        version = version_of({"version": found.model_version} if found.model_version else {})
        return inference.asked(self._request, found.model_name, version)

    def write(self, answered: Answered) -> bytes:
        """Write the answer. Numbers are raw bytes, so its length does not depend on them."""
        assert self._request is not None, "it was read"
        manifest = answered.manifest
        answer = InferResponse(model_name=manifest.name, model_version=str(manifest.version), id=self._request.id)
        for name, value in inference.parameters_of(answered).items():
            kind = "string_param" if isinstance(value, str) else "int64_param"
            setattr(answer.parameters[name], kind, value)
        for one in inference.outputs(answered, self._request.outputs):
            answer.outputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
            answer.raw_output_contents.append(one.raw())
        return answer.SerializeToString()


def _bound(message: bytes) -> None:
    """Refuse a message that would take much more memory and time than its bytes, before it is parsed.

    Only the fields at its top are visited: `raw_input_contents` may fill the message, all others together are small.
    """
    place = fields = beside = 0
    while place < len(message):
        begun = place
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == LENGTHS:
            size, place = _varint(message, place)
            place += size
        elif kind == VARINT:
            _, place = _varint(message, place)
        elif kind in FIXED:
            place += FIXED[kind]
        else:
            raise BadRequestError(NOT_A_REQUEST)
        fields += 1
        beside += 0 if tag == RAW_CONTENTS else place - begun
        if fields > MOST_FIELDS or beside > BESIDE_BYTES:
            raise TooLargeError(
                f"The message holds more than {MOST_FIELDS} fields, or {BESIDE_BYTES} bytes beside raw_input_contents. Send the values of inputs there."
            )
    if place != len(message):
        raise BadRequestError(NOT_A_REQUEST)


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return an integer in the encoding of protocol buffers, and the place after it."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise BadRequestError(NOT_A_REQUEST)


def _input(given: Any, raw: bytes | None, max_rows: int) -> Tensor:
    shape = list(given.shape[: tensors.MAX_AXES + 1])
    name, datatype, shape = tensors.check_form(given.name, given.datatype, shape, max_rows)
    if raw is not None:
        return tensors.from_raw(name, datatype, shape, raw)
    if (field := CONTENTS.get(datatype)) is None:
        raise BadRequestError(f"Input {name[:80]!r}: {datatype} is read from raw_input_contents only.")
    return tensors.from_values(name, datatype, shape, list(getattr(given.contents, field)))


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if (kind := value.WhichOneof("parameter_choice")) is not None:
            found[name] = getattr(value, kind)
    return found
