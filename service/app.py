"""The routes. A request passes through intake, bodies, images and batching, and schemas writes the answer.

Importing this module reads no settings and starts nothing. service/bento.py is what BentoML starts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models_store.store import Store
from service.access.guard import KEY, Guard
from service.access.hosts import Hosts
from service.http import activation, feedback, openapi, pages
from service.http.access_log import AccessLog
from service.http.bodies import read_request, refuse_coded
from service.http.connections import LEFT, is_alone
from service.http.errors import (
    BadRequestError,
    DeadlineError,
    MisdirectedError,
    NoFeedbackError,
    NoRouteError,
    NotReadyError,
    ServiceError,
    TooLargeError,
    UnknownEnsembleError,
)
from service.http.schemas import (
    EnsembleInfo,
    EnsembleList,
    ErrorBody,
    PoolInfo,
    Status,
    along_path,
    describe,
    padded,
    respond,
)
from service.http.versions import Versions
from service.inference.opening import Ensemble
from service.inference.policy import TOGETHER, Mode
from service.oip import description
from service.oip import routes as oip
from service.operations import metrics
from service.operations.settings import Settings
from service.predicting import INLINE_BYTES, Answered, Asker, Predictor, asker, deadline
from service.worker import Worker

MAX_ADDRESS_BYTES = 4096  # path and query together
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
log = logging.getLogger("bentoml.modepath")


class _Routes:
    """The endpoints of one worker."""

    def __init__(self, chosen: Settings, worker: Worker):
        self._settings, self._worker = chosen, worker
        self._versions = Versions(Store(chosen.store))
        self._predictor = Predictor(chosen, worker)
        self._protocol = oip.Routes(chosen, worker, self._predictor, self._asker)

    def all(self) -> list[Route]:
        """Return all routes."""
        return [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/feedback", self.feedback, methods=["POST"]),
            Route("/ensembles", self.list_ensembles, methods=["GET"]),
            Route("/ensembles/{name}", self.show_ensemble, methods=["GET"]),
            Route("/ensembles/{name}/versions", self.versions, methods=["GET"]),
            Route("/ensembles/{name}/path", self.path, methods=["POST"]),
            *(
                []
                if self._worker.guard is None
                else [
                    Route("/ensembles/{name}/activate", self.activate, methods=["POST"]),
                    Route("/ensembles/{name}/rollout", self.roll_out, methods=["GET", "PUT", "DELETE"]),
                ]
            ),
            *([] if self._settings.metrics_port else [Route("/metrics", show_metrics, methods=["GET"])]),
            *self._protocol.all(),
            Route("/livez", livez, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/docs.json", self.docs, methods=["GET"]),
            Route("/schema.json", schema, methods=["GET"]),
            Route("/docs", pages.docs, methods=["GET"]),
            Route("/docs/{name}", pages.docs_part, methods=["GET"]),
            Route("/ui", pages.page, methods=["GET"]),
            Route("/ui/{name}", pages.part, methods=["GET"]),
            Route("/", pages.root, methods=["GET"]),
        ]

    async def no_route(self, request: Request, error: Exception) -> Response:
        """Answer a request for an unknown path, or with a method that the path does not have."""
        assert isinstance(error, HTTPException)
        metrics.refused(NoRouteError.reason if error.status_code in (404, 405) else BadRequestError.reason)
        known = ", ".join(f"{'/'.join(sorted((r.methods or set()) - {'HEAD'}))} {r.path}" for r in self.all())
        message = f"{request.method} {request.url.path[:200]}: {error.detail}. The routes are {known}."
        return _json(ErrorBody(error=message), error.status_code, dict(error.headers or {}))

    async def predict(self, request: Request) -> Response:
        """POST /predict."""
        content_type, query = request.headers.get("content-type", ""), request.query_params.multi_items()
        refuse_coded(request.headers.get("content-encoding"))
        who = self._asker(request)
        async with deadline(self._settings.timeout), self._worker.intake.body(request) as body:
            read = partial(read_request, content_type, query, body.data, max_rows=self._worker.limits.rows)
            reply = await self._predictor.answer(body, read, write_json, who)
        headers = {"X-Request-ID": who.given_id} if who.given_id else None
        return Response(reply, media_type="application/json", headers=headers)

    async def feedback(self, request: Request) -> Response:
        """POST /feedback."""
        worker = self._worker
        if (recorder := worker.recorder) is None:
            raise NoFeedbackError(
                "This service keeps no answers, so it cannot count labels. Its operator can switch feedback on: MODEPATH_FEEDBACK."
            )
        refuse_coded(request.headers.get("content-encoding"))
        try:
            async with asyncio.timeout(self._settings.timeout), worker.intake.body(request) as body:
                parse = partial(feedback.parse, bytes(body.data))
                entries, several = await worker.offload.run(body, parse) if len(body.data) > INLINE_BYTES else parse()
                labels = [entry for entry in entries if not isinstance(entry, feedback.Rejected)]
                for _ in range(len(entries) - len(labels)):
                    metrics.rejected("malformed")
                served = [ensemble.manifest for ensemble in [*worker.ensembles.all(), *worker.ensembles.canaries()]]
                classes = {(one.name, one.version): one.classes for one in served}
                outcomes = await recorder.report(labels, classes) if labels else []
        except TimeoutError:
            raise DeadlineError(
                f"Not stored within {self._settings.timeout:g} seconds (MODEPATH_TIMEOUT): is the database of answers slow? Try again later."
            ) from None
        return _json(feedback.response(entries, outcomes, several=several))

    def _asker(self, request: Request) -> Asker:
        header = self._settings.caller_header
        named = request.headers.getlist(header) if header is not None else ()
        fields = request.scope.get("log_fields")
        return asker(request.scope.get(KEY), header, named, request.headers, fields, is_alone)

    async def path(self, request: Request) -> Response:
        """POST /ensembles/{name}/path: the answer of every network of a curve to one image."""
        worker, ensemble = self._worker, self._worker.ensembles.get(request.path_params["name"])
        content_type, manifest = request.headers.get("content-type", ""), ensemble.manifest
        ensemble.check_path()
        refuse_coded(request.headers.get("content-encoding"))
        try:
            async with asyncio.timeout(self._settings.timeout), worker.intake.body(request) as body:
                worker.batcher.refuse_if_full()
                asked = read_request(content_type, [], body.data, [manifest.input], 1)
                images = await self._predictor.decoded(body, asked, ensemble)
                if len(images) != 1:
                    raise TooLargeError(f"{len(images)} images; a path is shown for one image at a time.")
                rows = ensemble.along_path(images)
                if worker.guard is not None:
                    worker.guard.charge(request.scope.get(KEY), len(rows))
                answer = await worker.batcher.run(ensemble.session("random", None), rows)
                assert ensemble.path is not None, "otherwise it has no rows"
                return _json(along_path(manifest, ensemble.path, answer.prediction.mean_probs))
        except TimeoutError:
            raise DeadlineError(
                f"Not answered within {self._settings.timeout:g} seconds (MODEPATH_TIMEOUT): the curve has many networks."
            ) from None

    async def activate(self, request: Request) -> Response:
        """POST /ensembles/{name}/activate: serve another published version."""
        worker, name = self._worker, request.path_params["name"]
        refuse_coded(request.headers.get("content-encoding"))
        async with asyncio.timeout(self._settings.timeout), worker.intake.body(request) as body:
            wanted = activation.parse(request.headers.get("content-type", ""), bytes(body.data))
            found = await asyncio.to_thread(activation.activate, Store(self._settings.store), name, wanted.version)
        log.info("%s@%d activated by the key %s", name, wanted.version, request.scope[KEY].name)
        return _json(found)

    async def roll_out(self, request: Request) -> Response:
        """GET, PUT and DELETE /ensembles/{name}/rollout: the canary of an ensemble."""
        worker, name, store = self._worker, request.path_params["name"], Store(self._settings.store)
        refuse_coded(request.headers.get("content-encoding"))
        async with asyncio.timeout(self._settings.timeout), worker.intake.body(request) as body:
            if request.method == "PUT":
                plan = activation.parse_roll_out(request.headers.get("content-type", ""), bytes(body.data))
                await asyncio.to_thread(activation.begin_roll_out, store, name, plan)
                log.info("the key %s made %s@%d a canary", request.scope[KEY].name, name, plan.version)
            elif request.method == "DELETE":
                await asyncio.to_thread(activation.end_roll_out, store, name)
                log.info("the key %s ended the roll-out of %s", request.scope[KEY].name, name)
            plan = await asyncio.to_thread(activation.read_roll_out, store, name)
        if plan is None and request.method == "GET":
            raise UnknownEnsembleError(f"{name[:80]!r} has no canary: the active version answers all callers.")
        return _json(activation.RollOutInfo.of(name, plan, None if plan is None else worker.roll_outs.tally(plan)))

    async def list_ensembles(self, request: Request) -> Response:
        """GET /ensembles."""
        return _json(EnsembleList(ensembles=[self._info(ensemble) for ensemble in self._worker.ensembles.all()]))

    async def show_ensemble(self, request: Request) -> Response:
        """GET /ensembles/{name}."""
        return _json(self._info(self._worker.ensembles.get(request.path_params["name"])))

    async def versions(self, request: Request) -> Response:
        """GET /ensembles/{name}/versions."""
        return _json(await self._versions.of(self._worker.ensembles.get(request.path_params["name"])))

    async def readyz(self, request: Request) -> Response:
        """GET /readyz: 200 if a request would be answered, else 503 with the reason."""
        if (why := self._worker.ensembles.why_not_ready()) is not None:
            raise NotReadyError(why)
        return _json(Status(status="ready"))

    async def docs(self, request: Request) -> Response:
        """GET /docs.json: the OpenAPI description."""
        worker = self._worker
        ensembles = worker.ensembles.all()
        served = [ensemble.manifest for ensemble in ensembles]
        modes: list[Mode] = sorted({mode for ensemble in ensembles for mode in ensemble.policy.modes})
        return _json(
            openapi.document(
                served,
                modes,
                worker.limits.rows,
                has_metrics=self._settings.metrics_port is None,
                has_keys=worker.guard is not None,
            )
        )

    def _info(self, ensemble: Ensemble) -> EnsembleInfo:
        manifest, pool = ensemble.manifest, ensemble.pool
        shown = None
        if pool and ensemble.policy.defended:
            shown = PoolInfo(mebibytes=math.ceil(self._settings.pool_bytes / 2**20), networks=None, of=None)
        elif pool:
            shown = PoolInfo(mebibytes=math.ceil(pool.bytes / 2**20), networks=len(pool), of=pool.source.count)
        is_default = manifest.name == self._worker.ensembles.default_name
        calibrations = map(ensemble.decisions.calibration, ensemble.policy.modes)
        calibration = next((found for found in calibrations if found is not None), None)
        return describe(
            manifest, ensemble.providers, ensemble.policy, shown, calibration, is_default=is_default, path=ensemble.path is not None
        )  # fmt: skip


def write_json(answered: Answered) -> bytes:
    """Write the answer to POST /predict."""
    mode, rows = answered.mode, answered.rows
    reply = orjson.dumps(
        respond(
            answered.manifest, answered.request_id, mode, answered.answer, answered.policy, members=answered.options.members,
            points=[network.number for network in rows.networks], decided=answered.decided,
        )
    )  # fmt: skip
    return reply if mode in TOGETHER else padded(reply, answered.manifest, answered.policy, mode, len(rows))


async def show_metrics(request: Request) -> Response:
    """GET /metrics: the metrics of all workers."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=metrics.CONTENT_TYPE)


async def schema(request: Request) -> Response:
    """GET /schema.json: what BentoML's own client asks for."""
    return _json(description.of_bentoml())


async def livez(request: Request) -> Response:
    """GET /livez: 200 as long as the process answers."""
    return _json(Status(status="alive"))


def _json(content: BaseModel | Mapping[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    record = content.model_dump(mode="json") if isinstance(content, BaseModel) else content
    return Response(orjson.dumps(record), status, headers, "application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    metrics.refused(error.reason)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.challenge is not None:
        headers["WWW-Authenticate"] = error.challenge
    return _json(ErrorBody(error=str(error)), error.status, headers)


async def _broken(request: Request, error: Exception) -> Response:
    metrics.refused(ServiceError.reason)
    message = (
        "The service failed on this request; its log has the details. Try again, and report the error if it persists."
    )
    return _json(ErrorBody(error=message), 500)


def create_app(chosen: Settings, worker: Worker) -> ASGIApp:
    """Return the ASGI application that answers every HTTP request of one worker.

    Args:
        chosen: the settings.
        worker: the worker's ensembles, queues and limits.
    """
    routes = _Routes(chosen, worker)
    routed = Starlette(
        routes=routes.all(),
        exception_handlers={ServiceError: _refuse, HTTPException: routes.no_route, Exception: _broken},
    )
    # A redirection has no error body, and its target is whatever the client's Host header names.
    routed.router.redirect_slashes = False
    short = _short_cut(routes.predict, routed)
    guarded: ASGIApp = short if worker.guard is None else _guarded(short, worker.guard)
    inner: ASGIApp = AccessLog(guarded) if chosen.access_log else guarded
    hosts = Hosts(chosen.host, chosen.hosts)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        send = _with_headers(send)
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_ADDRESS_BYTES:
            too_long = TooLargeError(f"The address is longer than {MAX_ADDRESS_BYTES} bytes; send images in the body.")
            await _refuse_early(too_long, 414)(scope, receive, send)
        elif _CONTROL.search(scope["path"]):  # a route ends before a line break, the table of scopes does not
            unclear = NoRouteError("The path holds a control character, so there is no such route.")
            await _refuse_early(unclear, NoRouteError.status)(scope, receive, send)
        elif (foreign := hosts.foreign(scope["headers"])) is not None:
            await _refuse_early(MisdirectedError(foreign), MisdirectedError.status)(scope, receive, send)
        else:
            await _until_left(inner, scope, receive, send)

    if not chosen.cors_origins:
        return app
    return CORSMiddleware(
        app, chosen.cors_origins, allow_methods=("GET", "POST"), allow_headers=("Authorization", "Content-Type", "X-Request-ID", oip.LENGTH),
        expose_headers=("Retry-After", "X-Request-ID", oip.LENGTH), max_age=3600,
    )  # fmt: skip


def _short_cut(predict: Callable[[Request], Awaitable[Response]], others: ASGIApp) -> ASGIApp:
    """Answer POST /predict without a search for its route and the layers around it, which cost as much as reading the request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/predict" or scope["method"] != "POST":
            await others(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await predict(request)
        except ServiceError as error:
            response = await _refuse(request, error)
        except Exception as error:
            log.exception("a request failed")
            response = await _broken(request, error)
        await response(scope, receive, send)

    return app


def _with_headers(send: Send) -> Send:
    """Keep browsers from guessing another media type, from showing answers in frames, and from caching them."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(one for one in SECURITY_HEADERS if one[0] not in own)]
        await send(message)

    return sending


def _guarded(inner: ASGIApp, guard: Guard) -> ASGIApp:
    async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            guard.admit(scope)
        except ServiceError as error:
            response = await _refuse(Request(scope), error)
            await response(scope, receive, send)
            return
        if (fields := scope.get("log_fields")) is not None and KEY in scope:
            fields["key"] = scope[KEY].name
        await inner(scope, receive, send)

    return admitted


def _refuse_early(error: ServiceError, status: int) -> Response:
    metrics.refused(error.reason)
    return _json(ErrorBody(error=str(error)), status)


async def _until_left(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, but cancel the work if its client disconnects."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def left() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    scope[LEFT] = left
    try:
        await app(scope, receive, send)
    except asyncio.CancelledError:
        if not gone:
            raise
        metrics.refused(metrics.CLIENT_LEFT)
    finally:
        del scope[LEFT]
