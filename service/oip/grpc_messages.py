"""Requests and answers of the Open Inference Protocol over gRPC, to and from what the service knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from service.http.bodies import Asked
from service.http.errors import BadRequestError
from service.http.intake import Body
from service.oip import inference, tensors
from service.oip.messages import MAX_ID, Infer
from service.oip.routes import version_of
from service.oip.schema import message
from service.oip.tensors import BYTES, Tensor
from service.predicting import Told

InferRequest, InferResponse = message("ModelInferRequest"), message("ModelInferResponse")
# The field of InferTensorContents that holds each datatype; FP16 has none.
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", BYTES: "bytes_contents",
}  # fmt: skip


class GrpcInfer:
    """One request: what was asked decides how the answer is written."""

    def __init__(self, body: Body):
        self._body = body
        self._request: Infer | None = None

    def read(self, specs: object) -> Asked:
        """Parse the message.

        Raises:
            BadRequestError: it, an input, or a parameter is not valid.
        """
        try:
            found = InferRequest.FromString(bytes(self._body.data))
        except DecodeError:
            raise BadRequestError("The message is not a ModelInferRequest of the Open Inference Protocol.") from None
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
            [_input(one, raw[number] if raw else None) for number, one in enumerate(found.inputs)],
            _values(found.parameters), found.id, outputs or None, True,
        )  # fmt: skip
        version = version_of({"version": found.model_version} if found.model_version else {})
        return inference.asked(self._request, found.model_name, version)

    def write(self, told: Told) -> bytes:
        """Write the answer. Numbers are raw bytes, so its length does not depend on them."""
        assert self._request is not None, "it was read"
        manifest = told.manifest
        answer = InferResponse(model_name=manifest.name, model_version=str(manifest.version), id=self._request.id)
        for name, value in inference.parameters_of(told).items():
            kind = "string_param" if isinstance(value, str) else "int64_param"
            setattr(answer.parameters[name], kind, value)
        for one in inference.outputs(told, self._request.outputs):
            answer.outputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
            answer.raw_output_contents.append(one.raw())
        return answer.SerializeToString()


def _input(given: Any, raw: bytes | None) -> Tensor:
    name, datatype, shape = tensors.check_form(given.name, given.datatype, list(given.shape))
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
