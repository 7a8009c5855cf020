"""What /docs.json says about the Open Inference Protocol, and the routes that BentoML's own client asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models_store.manifest import InputSpec, Manifest
from service.http.schemas import PredictRequest
from service.oip.inference import IGNORED, inputs_of
from service.oip.messages import MAX_ID
from service.oip.tensors import BYTES

JSON = "application/json"


def infer_body(served: Sequence[Manifest], options: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a request of one row; a batch has a larger first axis, and more data.

    Args:
        served: the manifests of the served ensembles.
        options: the schema of each option of /predict, by name.
    """
    parameters = {name: schema for name, schema in options.items() if name != "ensemble"}
    parameters["binary_data_output"] = {
        "type": "boolean",
        "description": "write the outputs as raw bytes after the JSON",
    }
    specs = {manifest.input.model_dump_json(): manifest.input for manifest in served}
    forms = [_one_row(spec) for spec in specs.values()] or [
        {"type": "array", "items": {"type": "object"}, "minItems": 1}
    ]
    return {
        "type": "object",
        "properties": {
            "inputs": forms[0] if len(forms) == 1 else {"anyOf": forms},
            "id": {"type": "string", "maxLength": MAX_ID},
            "parameters": {
                "type": "object",
                "properties": {**parameters, **{name: {"description": "ignored"} for name in IGNORED - {*parameters}}},
                "additionalProperties": False,
            },
        },
        "required": ["inputs"],
    }


def _one_row(spec: InputSpec) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    for name, datatype, shape in inputs_of(spec):
        sizes = [1, *(1 if size < 0 else size for size in shape[1:])]
        count = math.prod(sizes)
        tensors.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name}, "datatype": {"const": datatype}, "shape": {"const": sizes},
                    "data": {"type": "array", "items": _value(spec, name, datatype), "minItems": count, "maxItems": count},
                },
                "required": ["name", "datatype", "shape", "data"],
            }
        )  # fmt: skip
    return {"type": "array", "prefixItems": tensors, "minItems": len(tensors), "maxItems": len(tensors)}


def _value(spec: InputSpec, name: str, datatype: str) -> dict[str, Any]:
    field = next((one for one in spec.fields or () if one.name == name), None)
    if datatype == BYTES:
        return {"enum": field.categories} if field is not None else {"type": "string"}
    if spec.vocabulary is not None:
        return {"type": "integer", "minimum": 1, "maximum": spec.vocabulary - 1}
    low, high = (0.0, 1.0) if spec.kind == "image" else (spec.low, spec.high)
    if field is not None:
        low, high = low if field.low is None else field.low, high if field.high is None else field.high
    # Numbers that float32 holds.
    return {"type": "number", "minimum": -3e38 if low is None else low, "maximum": 3e38 if high is None else high}


def paths(served: Sequence[Manifest], options: Mapping[str, Any], answers: Any) -> dict[str, dict[str, Any]]:
    """The routes under /v2.

    Args:
        served: the manifests of the served ensembles.
        options: the schema of each option of /predict, by name.
        answers: returns the responses of an operation, given its schema, or None, and the refusals.
    """
    name = {
        "name": "name", "in": "path", "required": True,
        "schema": {"type": "string", **({"enum": [manifest.name for manifest in served]} if served else {})},
    }  # fmt: skip
    version = {
        "name": "version", "in": "path", "required": True,
        "schema": {"type": "string", **({"enum": [str(manifest.version) for manifest in served]} if served else {})},
    }  # fmt: skip

    def get(summary: str, *refusals: int) -> dict[str, Any]:
        return {"summary": summary, "responses": answers(None, *refusals)}

    found: dict[str, dict[str, Any]] = {
        "/v2": {"get": get("Open Inference Protocol: the server")},
        "/v2/health/live": {"get": get("Open Inference Protocol: whether the process answers")},
        "/v2/health/ready": {"get": get("Open Inference Protocol: whether a request would be answered", 503)},
    }
    for path, named in (
        ("/v2/models/{name}", [name]),
        ("/v2/models/{name}/versions/{version}", [name, version]),
    ):
        found[path] = {
            "get": {**get("Open Inference Protocol: inputs and outputs", 403, 404, 503), "parameters": named}
        }
        found[f"{path}/ready"] = {
            "get": {
                **get("Open Inference Protocol: whether the ensemble would answer", 403, 404, 503),
                "parameters": named,
            }
        }
        found[f"{path}/infer"] = {
            "post": {
                "summary": "Open Inference Protocol: classify tensors",
                "description": "The options of /predict are `parameters`. Tensors may follow the JSON as raw bytes; then the header "
                "Inference-Header-Content-Length says where they begin.",
                "parameters": named,
                "requestBody": {"required": True, "content": {JSON: {"schema": infer_body(served, options)}}},
                "responses": _or_binary(
                    answers(None, 400, 403, 404, 408, 413, 414, 415, 421, 429, 431, 500, 501, 503, 504)
                ),
            }
        }
    return found


def _or_binary(answers: dict[str, Any]) -> dict[str, Any]:
    whole = {"type": "string", "format": "binary", "description": "JSON, followed by the bytes of the outputs"}
    answers["200"]["content"]["application/octet-stream"] = {"schema": whole}
    return answers


def of_bentoml() -> dict[str, Any]:
    """What GET /schema.json answers: BentoML's own client then has the method `predict`."""
    schema = PredictRequest.model_json_schema()
    return {
        "name": "modepath",
        "type": "service",
        "routes": [
            {
                "name": "predict", "route": "/predict", "doc": "Classify a batch.", "batchable": False, "is_task": False,
                "input": {"type": "object", "properties": schema["properties"], "required": []},
                "output": {"type": "object"},
            }
        ],
    }  # fmt: skip
