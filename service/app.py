"""Routing only: a request goes through images, ensemble and schemas, and comes back."""

from __future__ import annotations

import logging
import os
import secrets

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # a server of ours reports to nobody

import bentoml
import orjson
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from models_store.store import Store
from service import openapi
from service.ensemble import Ensembles
from service.errors import NotReadyError, ServiceError, TooLargeError
from service.images import as_images, read_request
from service.schemas import ErrorBody, PredictRequest, PredictResponse, describe, respond
from service.settings import settings

logging.getLogger("uvicorn.error").propagate = False  # or every traceback is printed twice
ensembles = Ensembles(Store(settings().store), settings().providers, settings().default)


async def predict(request: Request) -> Response:
    """POST /predict."""
    body = await _body(request, settings().max_body_bytes)
    # Decoding and the members run beside the event loop, which goes on answering others.
    return _json(await run_in_threadpool(_answer, request.headers.get("content-type", ""), body))


def _answer(content_type: str, body: bytes) -> PredictResponse:
    asked: PredictRequest = read_request(content_type, body)
    session = ensembles.get(asked.ensemble)
    images = as_images(asked.inputs, session.manifest.input.shape, settings().max_rows)
    member_probs = session.member_probs(images)
    prediction = session.combine(member_probs)
    return respond(
        session.manifest, secrets.token_hex(8), asked.mode, prediction, member_probs if asked.members else None
    )


async def list_ensembles(request: Request) -> Response:
    """GET /ensembles."""
    return _json({"ensembles": [_info(session.manifest.name) for session in ensembles.all()]})


async def show_ensemble(request: Request) -> Response:
    """GET /ensembles/{name}."""
    return _json(_info(request.path_params["name"]))


async def livez(request: Request) -> Response:
    """GET /livez: the process answers."""
    return _json({"status": "alive"})


async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when a request would be answered, else 503 and why."""
    if (why := ensembles.why_not_ready()) is not None:
        raise NotReadyError(why)
    return _json({"status": "ready"})


async def docs(request: Request) -> Response:
    """GET /docs.json: OpenAPI."""
    return _json(openapi.document())


def _info(name: str) -> dict[str, object]:
    session = ensembles.get(name)
    shown = describe(session.manifest, session.providers, is_default=name == ensembles.default_name)
    return shown.model_dump()


async def _body(request: Request, limit: int) -> bytes:
    # Counted as it comes: Content-Length may be missing, or lie.
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLargeError(f"The body is larger than {limit} bytes; send fewer images at a time.")
        parts.append(part)
    return b"".join(parts)


def _json(content: BaseModel | dict[str, object], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    record = content.model_dump(exclude_none=True) if isinstance(content, BaseModel) else content
    return Response(orjson.dumps(record), status, headers, "application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _json(ErrorBody(error=str(error)), error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = ", ".join(f"{'/'.join(sorted(r.methods - {'HEAD'} if r.methods else ()))} {r.path}" for r in ROUTES)
    message = f"{request.method} {request.url.path}: {error.detail}. The routes are {routes}."
    return _json(ErrorBody(error=message), error.status_code, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    message = "The service failed on this request; its log says where. Try again, and report it if it stays."
    return _json(ErrorBody(error=message), 500)


ROUTES = [
    Route("/predict", predict, methods=["POST"]),
    Route("/ensembles", list_ensembles, methods=["GET"]),
    Route("/ensembles/{name}", show_ensemble, methods=["GET"]),
    Route("/livez", livez, methods=["GET"]),
    Route("/readyz", readyz, methods=["GET"]),
    Route("/docs.json", docs, methods=["GET"]),
]
app = Starlette(
    routes=ROUTES,
    exception_handlers={ServiceError: _refuse, HTTPException: _no_route, Exception: _broken},
)


class OwnRoutes:
    """All HTTP is ours; BentoML keeps the processes, the lifespan and the sockets. Its own probes would say ready too early."""

    def __init__(self, inner: ASGIApp):
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        await (app if scope["type"] == "http" else self._inner)(scope, receive, send)


@bentoml.service(
    name="modepath",
    workers=1,
    traffic={"timeout": settings().timeout},
    http={"host": settings().host, "port": settings().port},  # pyright: ignore[reportArgumentType] - all keys are optional
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},  # its OpenTelemetry middleware would take half of a small request's time
)
class Modepath:
    """The service that bentofile.yaml names."""

    def __init__(self) -> None:
        # In the background: the sockets already listen, and /readyz can say why it is not ready.
        ensembles.follow(settings().poll_seconds)

    @bentoml.on_shutdown
    def close(self) -> None:
        """Stop looking for activations."""
        ensembles.close()


Modepath.add_asgi_middleware(OwnRoutes)  # pyright: ignore[reportArgumentType] - its protocol wants **options
