"""The routes. A request passes through intake, bodies, images and batching, and schemas writes the answer.

Importing this module reads no settings and starts nothing. service/bento.py is what BentoML starts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import replace
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
from service.feedback.answers import of_answer
from service.feedback.database import new_id
from service.http import activation, feedback, openapi, pages
from service.http.access_log import AccessLog
from service.http.bodies import Asked, read_request
from service.http.connections import LEFT
from service.http.errors import (
    BadRequestError,
    DeadlineError,
    ForbiddenError,
    MediaTypeError,
    MisdirectedError,
    NoFeedbackError,
    NoRouteError,
    NotReadyError,
    ServiceError,
    TooLargeError,
    UnknownEnsembleError,
)
from service.http.images import PIXELS_OF_A_CHARACTER, Encoded, Images, from_texts, work_of
from service.http.intake import Body
from service.http.schemas import (
    EnsembleInfo,
    EnsembleList,
    ErrorBody,
    Options,
    PoolInfo,
    Status,
    along_path,
    describe,
    padded,
    respond,
)
from service.http.versions import Versions
from service.inference.offload import SMALL_PIXELS
from service.inference.opening import Ensemble
from service.inference.pieces import Answer
from service.inference.policy import TOGETHER, Mode
from service.inference.session import Rows
from service.operations import metrics
from service.operations.settings import Settings
from service.worker import Worker

# Up to these sizes work is done on the event loop, because handing it to a thread would take longer.
INLINE_BYTES = 64 * 1024  # to parse and decode
INLINE_CHARACTERS = 4096  # characters to turn into token ids
INLINE_ROWS = 32  # to write and count
INLINE_NUMBERS = 4096
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
            Route("/livez", livez, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/docs.json", self.docs, methods=["GET"]),
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
        limit = asyncio.timeout(self._settings.timeout)
        try:
            async with limit:
                return await self._predicted(request)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineError(
                f"Not answered within {self._settings.timeout:g} seconds (MODEPATH_TIMEOUT). Send the body faster, or fewer images at a time."
            ) from None

    async def _predicted(self, request: Request) -> Response:
        worker = self._worker
        content_type, query = request.headers.get("content-type", ""), request.query_params.multi_items()
        _refuse_coded(request)
        async with worker.intake.body(request) as body:
            worker.batcher.refuse_if_full()
            began = time.perf_counter()
            large = len(body.data) > INLINE_BYTES
            if large and (why := worker.ensembles.why_not_ready()) is not None:
                raise NotReadyError(why)  # without an ensemble there are no shapes to check the body against
            specs = [ensemble.manifest.input for ensemble in worker.ensembles.all()] if large else ()
            read = partial(read_request, content_type, query, body.data, specs, worker.limits.rows)
            asked = await worker.offload.run(body, read) if large else read()
            options = asked.options
            active = worker.ensembles.get(options.ensemble)
            caller, given_id = self._caller(request), _given_id(request)
            ensemble, mode = _choice(worker, active, options, caller, given_id)
            images = await _images(worker, body, asked, ensemble)
            self._bound_answer(ensemble, len(images), options.members)
            key = request.scope.get(KEY)
            if worker.guard is not None:
                worker.guard.charge(key, len(images))
            decode_seconds = time.perf_counter() - began
            ask = partial(self._asked, body, mode, options, images, caller)
            try:
                if ensemble is active:
                    rows, answer = await ask(active)
                else:
                    ensemble, (rows, answer) = await worker.roll_outs.answer(active, ensemble, ask)
            except ServiceError:  # what was not answered does not count
                if worker.guard is not None:
                    worker.guard.charge(key, -len(images))
                raise
            request_id = new_id(time.time())
            if (log_fields := request.scope.get("log_fields")) is not None:
                manifest = ensemble.manifest
                log_fields |= {
                    "request_id": request_id, "ensemble": manifest.name, "version": manifest.version, "rows": len(images),
                    **({"given_request_id": given_id} if given_id else {}),
                }  # fmt: skip
            write = partial(self._reply, ensemble, mode, options, request_id, rows, answer, decode_seconds)
            written = time.perf_counter()
            numbers = answer.prediction.mean_probs.size if answer.member_probs is None else answer.member_probs.size
            large = len(images) > INLINE_ROWS or numbers > INLINE_NUMBERS
            reply = await worker.offload.run(body, write) if large else write()
            if worker.tracer is not None:
                attributes = {
                    "modepath.ensemble": ensemble.manifest.name, "modepath.version": ensemble.manifest.version, "modepath.mode": mode,
                    "modepath.rows": len(images), "modepath.request_id": request_id,
                }  # fmt: skip
                worker.tracer.predicted(
                    request.headers, attributes, decode_seconds, answer, time.perf_counter() - written
                )
        worker.roll_outs.compare(active, mode, images)
        headers = {"X-Request-ID": given_id} if given_id else None
        return Response(reply, media_type="application/json", headers=headers)

    async def _asked(
        self, body: Body, mode: Mode, options: Options, images: Images, caller: str, ensemble: Ensemble
    ) -> tuple[Rows, Answer]:
        """Run one version on the images of a request."""
        worker, draw = self._worker, partial(ensemble.rows, mode, images, caller)
        large = mode not in TOGETHER and images.nbytes > INLINE_BYTES
        rows = await worker.offload.run(body, draw) if large else draw()
        return rows, await worker.batcher.run(ensemble.session(mode, options.rule), rows)

    async def feedback(self, request: Request) -> Response:
        """POST /feedback."""
        worker = self._worker
        if (recorder := worker.recorder) is None:
            raise NoFeedbackError(
                "This service keeps no answers, so it cannot count labels. Its operator can switch feedback on: MODEPATH_FEEDBACK."
            )
        _refuse_coded(request)
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

    def _caller(self, request: Request) -> str:
        """Return the caller: the name of the API key, or the one that a trusted proxy names; "" without both.

        A request without exactly one such header is refused: a client that could add one would get a draw for each
        name.
        """
        if (key := request.scope.get(KEY)) is not None:
            return key.name
        if (header := self._settings.caller_header) is None:
            return ""
        named = request.headers.getlist(header)
        if len(named) != 1:
            raise BadRequestError(
                f"The request has {len(named)} {header} headers instead of one. The operator's proxy must set it, and overwrite what clients send."
            )
        return named[0]

    def _bound_answer(self, ensemble: Ensemble, rows: int, members: bool) -> None:
        manifest = ensemble.manifest
        numbers = rows * len(manifest.classes) * (len(manifest.members) if members else 1)
        if numbers > self._settings.max_numbers:
            raise TooLargeError(
                f"The answer would hold {numbers} numbers; at most {self._settings.max_numbers} are allowed. Send fewer images, or do not ask for members."
            )

    def _reply(
        self,
        ensemble: Ensemble,
        mode: Mode,
        options: Options,
        request_id: str,
        rows: Rows,
        answer: Answer,
        decode_seconds: float,
    ) -> bytes:
        began = time.perf_counter()
        manifest, policy = ensemble.manifest, ensemble.policy
        points = [network.number for network in rows.networks]
        decided = ensemble.decisions.decide(mode, options, rows.images, answer.prediction)
        reply = orjson.dumps(
            respond(manifest, request_id, mode, answer, policy, members=options.members, points=points, decided=decided)
        )
        if mode not in TOGETHER:
            reply = padded(reply, manifest, policy, mode, len(rows))
        # Counted before it is sent, so that a client that has its answer finds it in the metrics.
        seconds = time.perf_counter() - began
        each = not policy.hides(mode) or self._settings.metrics_port is not None
        metrics.answered(manifest, mode, answer, decode_seconds, seconds, each=each, decided=decided)
        labels = manifest.name, str(manifest.version), mode
        calibration = ensemble.decisions.calibration(mode)
        if calibration is not None and each:
            self._worker.drift.add(labels, calibration, rows.images, answer.prediction)
        if (recorder := self._worker.recorder) is not None:
            if not policy.hides(mode):
                metrics.expect_feedback(labels, options.coverage, decided=decided.decisions is not None)
            recorder.keep(
                of_answer(
                    request_id, time.time(), manifest.name, manifest.version, mode, answer.prediction, shown=not policy.hides(mode),
                    coverage=options.coverage, sets=decided.sets, decisions=decided.decisions,
                    images=self._worker.kept_images(calibration, rows.images, answer.prediction),
                )
            )  # fmt: skip
        return reply

    async def path(self, request: Request) -> Response:
        """POST /ensembles/{name}/path: the answer of every network of a curve to one image."""
        worker, ensemble = self._worker, self._worker.ensembles.get(request.path_params["name"])
        content_type, manifest = request.headers.get("content-type", ""), ensemble.manifest
        ensemble.check_path()
        _refuse_coded(request)
        try:
            async with asyncio.timeout(self._settings.timeout), worker.intake.body(request) as body:
                worker.batcher.refuse_if_full()
                asked = read_request(content_type, [], body.data, [manifest.input], 1)
                images = await _images(worker, body, asked, ensemble)
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
        _refuse_coded(request)
        async with asyncio.timeout(self._settings.timeout), worker.intake.body(request) as body:
            wanted = activation.parse(request.headers.get("content-type", ""), bytes(body.data))
            found = await asyncio.to_thread(activation.activate, Store(self._settings.store), name, wanted.version)
        log.info("%s@%d activated by the key %s", name, wanted.version, request.scope[KEY].name)
        return _json(found)

    async def roll_out(self, request: Request) -> Response:
        """GET, PUT and DELETE /ensembles/{name}/rollout: the canary of an ensemble."""
        worker, name, store = self._worker, request.path_params["name"], Store(self._settings.store)
        _refuse_coded(request)
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


async def _images(worker: Worker, body: Body, asked: Asked, ensemble: Ensemble) -> Images:
    """Decode the images: small arrays on the event loop, the rest in threads, with a lane for large encoded images."""
    limits, spec = replace(worker.limits, hold=partial(worker.intake.decode, body)), ensemble.manifest.input

    if (texts := asked.texts) is not None:
        read = partial(from_texts, texts, spec, ensemble.tokenizer, limits)
        work = work_of(texts) if ensemble.tokenizer is not None else 0
        if work > limits.pixels or work <= INLINE_CHARACTERS * PIXELS_OF_A_CHARACTER:  # refused, or done at once
            return read()
        return await worker.offload.decode(body, work, read)

    def opened() -> Images | Encoded:
        found = asked.open(spec, limits)
        return found.decode() if isinstance(found, Encoded) and found.pixels <= SMALL_PIXELS else found

    long = asked.encoded or len(body.data) > INLINE_BYTES or asked.named * len(spec.fields or ()) > INLINE_NUMBERS
    found = await worker.offload.run(body, opened) if long else opened()
    return await worker.offload.decode(body, found.pixels, found.decode) if isinstance(found, Encoded) else found


def _choice(
    worker: Worker, active: Ensemble, options: Options, caller: str, given_id: str | None
) -> tuple[Ensemble, Mode]:
    """Return the version that answers a request, and the mode: the active one, too, where its canary cannot do what is asked."""
    keyed = (options.mode or active.policy.modes[0]) == "keyed"
    # In `keyed` a client must not choose the version, or it would get a draw from each.
    chosen = active if keyed and not caller else worker.roll_outs.choose(active, caller or given_id or "")
    if chosen is not active:
        try:
            return chosen, _check(chosen, options)
        except BadRequestError:  # it has no calibration or cascade, for example
            if keyed:
                raise
    return active, _check(active, options)


def _check(ensemble: Ensemble, options: Options) -> Mode:
    """Check that an ensemble can do what is asked, and return the mode."""
    mode = ensemble.mode(options.mode)
    _refuse_members(ensemble, mode, options)
    ensemble.decisions.check(mode, options)
    ensemble.session(mode, options.rule)
    return mode


def _given_id(request: Request) -> str | None:
    """The X-Request-ID of a client or proxy, so that their logs and ours can be joined; None if it is not a plain id."""
    given = request.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given) else None


def _refuse_coded(request: Request) -> None:
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise MediaTypeError(f"Content-Encoding {coding[:80]!r} is not supported; send the body uncompressed.")


def _refuse_members(ensemble: Ensemble, mode: Mode, options: Options) -> None:
    if not options.members:
        return
    if mode == "cascade":
        raise BadRequestError(
            "Mode 'cascade' does not run all members for each image; ask for `members` in mode 'average'."
        )
    if mode != "average":
        raise BadRequestError(f"Mode {mode!r} answers with one network for each image; it cannot return `members`.")
    if not ensemble.policy.shows_members:
        raise ForbiddenError(
            f"The operator does not show the probabilities of each member of {ensemble.manifest.name}."
        )


async def show_metrics(request: Request) -> Response:
    """GET /metrics: the metrics of all workers."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=metrics.CONTENT_TYPE)


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
    guarded: ASGIApp = routed if worker.guard is None else _guarded(routed, worker.guard)
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
        app, chosen.cors_origins, allow_methods=("GET", "POST"), allow_headers=("Authorization", "Content-Type", "X-Request-ID"),
        expose_headers=("Retry-After", "X-Request-ID"), max_age=3600,
    )  # fmt: skip


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
