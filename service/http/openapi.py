"""GET /docs.json: every route, generated from the request and response schemas, with the image shapes served now."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from models_store.manifest import InputSpec, Manifest
from service.access.guard import OPEN, needed_by
from service.http.activation import Activated, Activation, Plan, RollOutInfo
from service.http.bodies import ANY, ENCODED, JSON, NPY, NPZ
from service.http.feedback import MOST_LABELS, Feedback, FeedbackResponse
from service.http.schemas import (
    EnsembleInfo,
    EnsembleList,
    ErrorBody,
    Options,
    PathResponse,
    PredictRequest,
    PredictResponse,
    Status,
    VersionList,
)
from service.inference.policy import Mode
from service.oip import description

_SHAPES: tuple[tuple[type, JsonSchemaMode], ...] = (
    (Options, "validation"), (PredictRequest, "validation"),
    (PredictResponse, "serialization"), (EnsembleInfo, "serialization"), (EnsembleList, "serialization"), (PathResponse, "serialization"),
    (VersionList, "serialization"),
    (Feedback, "validation"), (FeedbackResponse, "serialization"), (Activation, "validation"), (Activated, "serialization"),
    (Plan, "validation"), (RollOutInfo, "serialization"),
    (ErrorBody, "serialization"), (Status, "serialization"),
)  # fmt: skip
REFUSALS = {
    400: "malformed or invalid input",
    401: "no API key, or one that is not known",
    403: "not allowed by the operator's policy, or by the scope of the API key",
    404: "unknown ensemble or path",
    408: "the body arrived too slowly",
    409: "a label of this image was counted before, or the version cannot be a canary of what is active",
    410: "the answer is older than the service keeps answers",
    413: "the body, the batch or the answer is too large",
    414: "the address is too long",
    415: "the media type is not supported",
    421: "the Host header names another host",
    429: "too much work is waiting, or the quota of the API key is used up",
    431: "the head of the request is too large",
    500: "the ensemble or the service is broken",
    501: "the transfer coding is not supported",
    503: "not ready, or too busy",
    504: "not answered in time",
}


def document(
    served: Sequence[Manifest], modes: Sequence[Mode], max_rows: int, *, has_metrics: bool, has_keys: bool = False
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document.

    `served` are the manifests of the served ensembles, `modes` the modes that at least one of them opens. With `has_keys`, each
    route says which scope it needs.
    """
    schemas = dict(_schemas())
    for name in ("Options", "PredictRequest"):
        schemas[name] = _with_modes(schemas[name], modes)
    schemas["PredictRequest"] = _either(schemas["PredictRequest"], served, max_rows)
    predict = {
        "summary": "Classify images",
        "description": "A JSON body holds all fields. With an array or one encoded image, the other fields are query parameters; "
        "with a JSON body, query parameters are refused.",
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
                NPY: {"schema": _binary("an array (batch, …) written by numpy.save")},
                NPZ: {"schema": _binary("a batch of each named field, written by numpy.savez")},
                **{media_type: {"schema": _binary("the bytes of one image file")} for media_type in ENCODED},
                ANY: {"schema": _binary("any of these files; its first bytes say which")},
            },
        },
        "responses": _answers("PredictResponse", *(status for status in REFUSALS if status not in (401, 409, 410))),
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in schemas["Options"]["properties"].items()
        ],
    }
    one = {"$ref": "#/components/schemas/Feedback"}
    feedback = {
        "summary": "Report true classes of earlier images",
        "description": "One label or a list. Each image is counted once. Of a list, labels that are rejected are named in the answer, and the "
        "others are counted.",
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"anyOf": [one, {"type": "array", "items": one, "maxItems": MOST_LABELS}]}}},
        },
        "responses": _answers("FeedbackResponse", *(status for status in REFUSALS if status not in (401, 403, 415))),
    }
    path = {
        "summary": "Ask every network of a curve about one image",
        "description": "For ensembles with `path: true`: a curve with a bank, whose policy shows the points. The body is one image as for /predict.",
        "responses": _answers("PathResponse", *(status for status in REFUSALS if status not in (401, 409, 410))),
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, dict[str, Any]] = {
        "/predict": {"post": predict},
        "/feedback": {"post": feedback},
        "/ensembles": {"get": _get("The ensembles that are served", "EnsembleList")},
        "/ensembles/{name}": {"get": {**_get("One ensemble", "EnsembleInfo", 404, 503), "parameters": [name]}},
        "/ensembles/{name}/versions": {
            "get": {**_get("Its newest published versions", "VersionList", 403, 404, 503, 504), "parameters": [name]}
        },
        "/ensembles/{name}/path": {"post": {**predict, **path, "parameters": [name]}},
        "/livez": {"get": _get("Whether the process answers", "Status")},
        "/readyz": {"get": _get("Whether a request would be answered", "Status", 503)},
        "/docs.json": {"get": _get("This document", None)},
        "/schema.json": {"get": _get("What BentoML's own client asks for", None)},
        **description.paths(served, schemas["Options"]["properties"], _answers),
    }
    if has_metrics:
        text = {"text/plain": {"schema": {"type": "string"}}}
        paths["/metrics"] = {
            "get": {
                "summary": "Metrics for Prometheus",
                "responses": {"200": {"description": "the metrics of all workers", "content": text}},
            }
        }
    if has_keys:
        paths["/ensembles/{name}/activate"] = {"post": {**_ACTIVATE, "parameters": [name]}}
        paths["/ensembles/{name}/rollout"] = {
            method: {**operation, "parameters": [name]} for method, operation in _ROLL_OUT.items()
        }
        _require_keys(paths)
    components: dict[str, Any] = {"schemas": schemas}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "modepath",
            "version": "1",
            "description": "Averaged predictions of an ensemble, with their uncertainty.",
        },
        "paths": paths,
        "components": components,
    }


def _require_keys(paths: dict[str, dict[str, Any]]) -> None:
    for path, methods in paths.items():
        for method, operation in methods.items():
            if path in OPEN:
                continue
            scope = needed_by(method.upper(), path)
            operation["security"] = [{"key": []}]
            about = f"{operation['description']} " if "description" in operation else ""
            operation["description"] = f"{about}Needs an API key with the scope {scope}."
            refusals = {status: answer for status, answer in _answers(None, 401, 403).items() if status != "200"}
            operation["responses"] = {**operation["responses"], **refusals}


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    _, found = TypeAdapter.json_schemas(
        [(shape, mode, TypeAdapter(shape)) for shape, mode in _SHAPES], ref_template="#/components/schemas/{model}"
    )
    return found["$defs"]


def _with_modes(schema: dict[str, Any], modes: Sequence[Mode]) -> dict[str, Any]:
    mode = {**schema["properties"]["mode"], "anyOf": [{"type": "string", "enum": list(modes)}, {"type": "null"}]}
    return {**schema, "properties": {**schema["properties"], "mode": mode}}


def _either(schema: dict[str, Any], served: Sequence[Manifest], max_rows: int) -> dict[str, Any]:
    # The generated schema of a nullable field would present null as a valid choice.
    properties = dict(schema["properties"])
    specs = {manifest.input.model_dump_json(): manifest.input for manifest in served}
    batches = [schema for spec in [*specs.values()] or [None] for schema in _batches(spec, max_rows)]
    properties["inputs"] = {
        "description": properties["inputs"]["description"],
        **(batches[0] if len(batches) == 1 else {"anyOf": batches}),
    }
    properties["images"] = {
        "description": properties["images"]["description"],
        "type": "array",
        "minItems": 1,
        "maxItems": max_rows,
        "items": {"type": "string", "contentEncoding": "base64", "format": "base64-image"},
    }
    forms = ["inputs", "images"]
    about = properties.pop("texts")["description"]
    if any(spec.tokenizer for spec in specs.values()):
        forms.append("texts")
        items = {"type": "string", "minLength": 1}
        properties["texts"] = {
            "description": about,
            "type": "array",
            "minItems": 1,
            "maxItems": max_rows,
            "items": items,
        }
    properties["ensemble"] = {
        "description": properties["ensemble"]["description"],
        "anyOf": [{"type": "string", "enum": [manifest.name for manifest in served]}, {"type": "null"}],
    }
    return {
        **schema,
        "properties": properties,
        "oneOf": [{"required": [form]} for form in forms],
    }


def _batches(spec: InputSpec | None, max_rows: int) -> list[dict[str, Any]]:
    """The forms of `inputs` for one ensemble; None stands for images of any size."""
    rows: list[dict[str, Any]] = []
    columns: list[dict[str, Any]] = []
    if spec is not None and spec.fields is not None:
        rows.append(_named_row(spec))
        batches = {
            name: {"type": "array", "items": schema, "minItems": 1, "maxItems": max_rows}
            for name, schema in rows[0]["properties"].items()
        }
        columns.append({"type": "object", "properties": batches, "required": [*batches], "additionalProperties": False})
    schema: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
    if spec is not None and spec.kind == "features":
        bounds = {"minimum": spec.low, "maximum": spec.high}
        schema = {"type": "number", **{name: value for name, value in bounds.items() if value is not None}}
    elif spec is not None and spec.vocabulary is not None:
        schema = {"type": "integer", "minimum": 1, "maximum": spec.vocabulary - 1}
    for size in reversed(spec.shape if spec else (None, None, None)):
        longest = size is None or (spec is not None and spec.kind == "tokens")
        fixed = (
            {"minItems": 1, **({} if size is None else {"maxItems": size})}
            if longest
            else {"minItems": size, "maxItems": size}
        )
        schema = {"type": "array", "items": schema, **fixed}
    listed = [{"type": "array", "items": row, "minItems": 1, "maxItems": max_rows} for row in [*rows, schema]]
    return [*listed, *columns]


def _named_row(spec: InputSpec) -> dict[str, Any]:
    assert spec.fields is not None, "it has named fields"
    properties: dict[str, Any] = {}
    for field in spec.fields:
        if field.categories is not None:
            properties[field.name] = {"enum": field.categories}
            continue
        low = spec.low if field.low is None else field.low
        bounds = {"minimum": low, "maximum": spec.high if field.high is None else field.high}
        kind: Any = "number" if spec.missing == "refuse" else ["number", "null"]
        schema: dict[str, Any] = {"type": kind, **{name: value for name, value in bounds.items() if value is not None}}
        for size in reversed(field.shape or ()):
            schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
        properties[field.name] = schema
    required = [
        field.name
        for field in spec.fields
        if (spec.missing == "refuse" or field.shape if field.categories is None else "" not in field.categories)
    ]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _binary(description: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": description}


def _get(summary: str, schema: str | None, *refusals: int) -> dict[str, Any]:
    return {"summary": summary, "responses": _answers(schema, *refusals)}


def _answers(schema: str | None, *refusals: int) -> dict[str, Any]:
    answers = {"200": {"description": "the answer", "content": _content(schema)}}
    for status in refusals:
        headers = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds to wait before a retry"}}
        answers[str(status)] = {
            "description": REFUSALS[status],
            "content": _content("ErrorBody"),
            **({"headers": headers} if status in (429, 503) else {}),
        }
    return answers


def _content(schema: str | None) -> dict[str, Any]:
    return {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"} if schema else {"type": "object"}}}


_OF_STORE = tuple(status for status in REFUSALS if status not in (401, 409, 410))
_ROLL_OUT: dict[str, dict[str, Any]] = {
    "get": _get("The canary of an ensemble", "RollOutInfo", *_OF_STORE),
    "put": {
        "summary": "Let a published version be the canary: it answers a share of the callers, or is compared in the shadow",
        "requestBody": {"required": True, "content": {JSON: {"schema": {"$ref": "#/components/schemas/Plan"}}}},
        "responses": _answers("RollOutInfo", *_OF_STORE, 409),
    },
    "delete": _get("End the roll-out: the active version answers all callers", "RollOutInfo", *_OF_STORE),
}
_ACTIVATE: dict[str, Any] = {
    "summary": "Serve another published version",
    "description": "Only where API keys are configured.",
    "requestBody": {"required": True, "content": {JSON: {"schema": {"$ref": "#/components/schemas/Activation"}}}},
    "responses": _answers("Activated", *_OF_STORE),
}
