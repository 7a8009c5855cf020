"""GET /docs.json: every route, from the same schemas that parse and answer."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.schemas import EnsembleInfo, ErrorBody, PredictRequest, PredictResponse

_MODELS: tuple[type[BaseModel], ...] = (PredictRequest, PredictResponse, EnsembleInfo, ErrorBody)


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, definitions = models_json_schema(
        [(model, "serialization") for model in _MODELS], ref_template="#/components/schemas/{model}"
    )
    refused = {"description": "refused", "content": _content(ErrorBody)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "modepath",
            "version": "1",
            "description": "Averaged predictions of an ensemble, and how uncertain they are.",
        },
        "paths": {
            "/predict": {
                "post": {
                    "summary": "Classify images",
                    "requestBody": {"required": True, "content": _content(PredictRequest)},
                    "responses": _answers(PredictResponse, 400, 404, 413, 415, 503),
                }
            },
            "/ensembles": {"get": {"summary": "The ensembles that are served", "responses": _answers(None)}},
            "/ensembles/{name}": {
                "get": {
                    "summary": "One ensemble",
                    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
                    "responses": _answers(EnsembleInfo, 404, 503),
                }
            },
            "/livez": {"get": {"summary": "Does the process answer", "responses": _answers(None)}},
            "/readyz": {
                "get": {"summary": "Would a request be answered", "responses": {**_answers(None), "503": refused}}
            },
            "/docs.json": {"get": {"summary": "This document", "responses": _answers(None)}},
        },
        "components": {"schemas": definitions["$defs"]},
    }


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _answers(model: type[BaseModel] | None, *refusals: int) -> dict[str, Any]:
    good = {
        "description": "the answer",
        "content": _content(model) if model else {"application/json": {"schema": {"type": "object"}}},
    }
    return {"200": good, **{str(code): {"description": "refused", "content": _content(ErrorBody)} for code in refusals}}
