"""Routing only: a request goes through intake, bodies, images, batching and schemas, and comes back."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import secrets
import time
from dataclasses import replace
from functools import partial
from typing import Any

from service.operations import bentoml_internals  # isort: skip - before BentoML asks whether it may report

import bentoml
import orjson
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from models_store.manifest import InputSpec
from models_store.store import Store
from service.http import openapi
from service.http.access_log import AccessLog
from service.http.bodies import Asked, read_request
from service.http.connections import LEFT
from service.http.errors import (
    BadRequestError,
    DeadlineError,
    ForbiddenError,
    MediaTypeError,
    MisdirectedError,
    NoRouteError,
    NotReadyError,
    ServiceError,
    TooLargeError,
)
from service.http.hosts import Hosts
from service.http.images import Encoded, Images, Limits
from service.http.intake import Body, Intake
from service.http.schemas import (
    EnsembleInfo,
    EnsembleList,
    ErrorBody,
    Options,
    PoolInfo,
    Status,
    describe,
    padded,
    respond,
)
from service.inference import verdicts
from service.inference.batching import Answer, Batcher, QueueLimits
from service.inference.draws import Keyed
from service.inference.ensemble import Ensembles
from service.inference.offload import SMALL_PIXELS, Offload
from service.inference.opening import Ensemble
from service.inference.policy import Mode
from service.inference.session import Rows, Session
from service.inference.trial import Trials
from service.inference.verdicts import Verdicts
from service.operations import log_writer, metrics
from service.operations.settings import WrongSettingError, settings, share_key
from service.operations.supervision import Board, Pulse, Watch

INLINE_BYTES = 64 * 1024  # what is decoded faster than another thread would begin with it
INLINE_ROWS = 32  # the same for what is written and counted
INLINE_NUMBERS = 4096
LOADING_SECONDS = 20
MAX_ADDRESS_BYTES = 4096  # path and query

log = logging.getLogger("bentoml.modepath")
logging.getLogger("uvicorn.error").propagate = False  # or every traceback is printed twice
try:
    settings()
except WrongSettingError as error:
    raise bentoml_internals.refuse_to_start(str(error)) from None
bentoml_internals.trust_proxies(settings().trusted_proxies)


class Worker:
    """What one process works with. It is made when the process begins to serve: importing this module starts nothing."""

    def __init__(self) -> None:
        chosen = settings()
        metrics.begin()
        log.info(
            "%d worker(s), of %d thread(s) each (MODEPATH_WORKERS, MODEPATH_THREADS)", chosen.workers, chosen.threads
        )
        self.limits = Limits(rows=chosen.max_rows, bytes=chosen.held_bytes, pixels=chosen.max_pixels)
        self.intake = Intake(chosen.max_body_bytes, chosen.held_bytes, chosen.stall_seconds)
        queue = QueueLimits(
            batch_rows=chosen.batch_rows,
            batch_seconds=chosen.batch_seconds,
            rows=chosen.queue_rows,
            seconds=chosen.queue_seconds,
        )
        self.batcher = Batcher(queue, chosen.threads)
        store, shared = Store(chosen.store), Verdicts.shared()
        self.trials = Trials(
            store, queue, shared, seconds=chosen.load_seconds, most_bytes=chosen.load_bytes, workers=chosen.workers
        )
        self.ensembles = Ensembles(
            store, chosen.providers, chosen.default, threads=chosen.threads, policies=chosen.policies,
            pool_bytes=chosen.pool_bytes, keyed=Keyed(chosen.secret(), chosen.key_seconds, chosen.key_rows), warm=self._warm,
            trial=self.trials, verdicts=shared,
        )  # fmt: skip
        self.offload = Offload(chosen.threads, chosen.queue_pixels)

    def _warm(self, session: Session, row: Rows) -> None:
        self.batcher.warm(session, row)
        # Loaded networks live as long as the process. Frozen, they are not scanned by the garbage collector again (it delayed 1 % of answers by 20 ms).
        gc.collect()
        gc.freeze()


async def predict(request: Request) -> Response:
    """POST /predict."""
    limit = asyncio.timeout(settings().timeout)
    try:
        async with limit:
            return await _predicted(request)
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineError(
            f"Not answered within {settings().timeout:g} seconds (MODEPATH_TIMEOUT). Send the body faster, or fewer images at once."
        ) from None


async def _predicted(request: Request) -> Response:
    worker = _worker()
    content_type, query = request.headers.get("content-type", ""), request.query_params.multi_items()
    _refuse_coded(request)
    async with worker.intake.body(request) as body:
        worker.batcher.refuse_if_full()
        began = time.perf_counter()
        large = len(body.data) > INLINE_BYTES
        if large and (why := worker.ensembles.why_not_ready()) is not None:
            raise NotReadyError(why)  # before the body is measured by the shapes of what is served
        shapes = [ensemble.manifest.input.shape for ensemble in worker.ensembles.all()] if large else ()
        read = partial(read_request, content_type, query, body.data, shapes, worker.limits.rows)
        asked = await worker.offload.run(body, read) if large else read()
        options = asked.options
        ensemble = worker.ensembles.get(options.ensemble)
        mode = ensemble.mode(options.mode)
        _refuse_members(ensemble, mode, options)
        images = await _images(worker, body, asked, ensemble.manifest.input)
        _bound_answer(ensemble, len(images), options.members)
        draw = partial(ensemble.rows, mode, images, _caller(request))
        rows = await worker.offload.run(body, draw) if mode != "average" and images.nbytes > INLINE_BYTES else draw()
        decode_seconds = time.perf_counter() - began
        answer = await worker.batcher.run(ensemble.sessions[mode], rows)
        request_id = secrets.token_hex(8)
        if (log_fields := request.scope.get("log_fields")) is not None:
            manifest = ensemble.manifest
            log_fields |= {
                "request_id": request_id, "ensemble": manifest.name, "version": manifest.version, "rows": len(images),
            }  # fmt: skip
        write = partial(_reply, ensemble, mode, options, request_id, rows, answer, decode_seconds)
        large = len(images) > INLINE_ROWS or answer.member_probs.size > INLINE_NUMBERS
        reply = await worker.offload.run(body, write) if large else write()
    return Response(reply, media_type="application/json")


async def _images(worker: Worker, body: Body, asked: Asked, spec: InputSpec) -> Images:
    """Decode: small arrays here, the rest in threads, encoded images by how many pixels they have."""
    limits = replace(worker.limits, hold=partial(worker.intake.decode, body))

    def opened() -> Images | Encoded:
        found = asked.open(spec, limits)
        return found.decode() if isinstance(found, Encoded) and found.pixels <= SMALL_PIXELS else found

    found = await worker.offload.run(body, opened) if asked.encoded or len(body.data) > INLINE_BYTES else opened()
    return await worker.offload.decode(body, found.pixels, found.decode) if isinstance(found, Encoded) else found


def _refuse_coded(request: Request) -> None:
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise MediaTypeError(f"Content-Encoding {coding[:80]!r} is not read here; send the body as it is.")


def _caller(request: Request) -> str:
    """Who asks, where a proxy says so. A client that could add a name of its own would have a draw for each name."""
    if (header := settings().caller_header) is None:
        return ""
    named = request.headers.getlist(header)
    if len(named) != 1:
        raise BadRequestError(
            f"{len(named)} headers {header} came, and the operator's proxy has to name the caller in one: it must overwrite what clients send."
        )
    return named[0]


def _refuse_members(ensemble: Ensemble, mode: Mode, options: Options) -> None:
    if not options.members:
        return
    if mode != "average":
        raise BadRequestError(f"Mode {mode!r} answers with one network for each image; it has no `members` to give.")
    if not ensemble.policy.shows_members:
        raise ForbiddenError(f"The operator does not show what each member of {ensemble.manifest.name} says.")


def _bound_answer(ensemble: Ensemble, rows: int, members: bool) -> None:
    manifest = ensemble.manifest
    numbers = rows * len(manifest.classes) * (len(manifest.members) if members else 1)
    if numbers > settings().max_numbers:
        raise TooLargeError(
            f"The answer would hold {numbers} numbers; at most {settings().max_numbers} are given at once. Send fewer images, or do not ask for members."
        )


def _reply(
    ensemble: Ensemble, mode: Mode, options: Options, request_id: str, rows: Rows, answer: Answer, decode_seconds: float
) -> bytes:
    began = time.perf_counter()
    manifest, policy = ensemble.manifest, ensemble.policy
    points = [network.number for network in rows.networks]
    reply = orjson.dumps(respond(manifest, request_id, mode, answer, policy, members=options.members, points=points))
    if mode != "average":
        reply = padded(reply, manifest, policy, mode, len(rows))
    # Before the answer leaves: whoever has it finds it counted.
    seconds = time.perf_counter() - began
    each = not policy.hides(mode) or settings().metrics_port is not None
    metrics.answered(manifest, mode, answer, decode_seconds, seconds, each=each)
    return reply


async def list_ensembles(request: Request) -> Response:
    """GET /ensembles."""
    return _json(EnsembleList(ensembles=[_info(ensemble) for ensemble in _worker().ensembles.all()]))


async def show_ensemble(request: Request) -> Response:
    """GET /ensembles/{name}."""
    return _json(_info(_worker().ensembles.get(request.path_params["name"])))


async def show_metrics(request: Request) -> Response:
    """GET /metrics: the numbers of all workers."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=metrics.CONTENT_TYPE)


async def livez(request: Request) -> Response:
    """GET /livez: the process answers."""
    return _json(Status(status="alive"))


async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when a request would be answered, else 503 and why."""
    if (why := _worker().ensembles.why_not_ready()) is not None:
        raise NotReadyError(why)
    return _json(Status(status="ready"))


async def docs(request: Request) -> Response:
    """GET /docs.json: OpenAPI."""
    worker = _worker()
    ensembles = worker.ensembles.all()
    served = [ensemble.manifest for ensemble in ensembles]
    modes: list[Mode] = sorted({mode for ensemble in ensembles for mode in ensemble.policy.modes})
    return _json(openapi.document(served, modes, worker.limits.rows, has_metrics=settings().metrics_port is None))


def _info(ensemble: Ensemble) -> EnsembleInfo:
    manifest, pool = ensemble.manifest, ensemble.pool
    shown = None
    if pool and ensemble.policy.defended:
        shown = PoolInfo(mebibytes=math.ceil(settings().pool_bytes / 2**20), networks=None, of=None)
    elif pool:
        shown = PoolInfo(mebibytes=math.ceil(pool.bytes / 2**20), networks=len(pool), of=pool.source.count)
    is_default = manifest.name == _worker().ensembles.default_name
    return describe(manifest, ensemble.providers, ensemble.policy, shown, is_default=is_default)


def _json(content: BaseModel | dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    record = content.model_dump(mode="json") if isinstance(content, BaseModel) else content
    return Response(orjson.dumps(record), status, headers, "application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    metrics.refused(error.reason)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _json(ErrorBody(error=str(error)), error.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    metrics.refused(NoRouteError.reason if error.status_code in (404, 405) else BadRequestError.reason)
    known = ", ".join(f"{'/'.join(sorted((r.methods or set()) - {'HEAD'}))} {r.path}" for r in ROUTES)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}. The routes are {known}."
    return _json(ErrorBody(error=message), error.status_code, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    metrics.refused(ServiceError.reason)
    message = "The service failed on this request; its log says where. Try again, and report it if it persists."
    return _json(ErrorBody(error=message), 500)


ROUTES = [
    Route("/predict", predict, methods=["POST"]),
    Route("/ensembles", list_ensembles, methods=["GET"]),
    Route("/ensembles/{name}", show_ensemble, methods=["GET"]),
    *([] if settings().metrics_port else [Route("/metrics", show_metrics, methods=["GET"])]),
    Route("/livez", livez, methods=["GET"]),
    Route("/readyz", readyz, methods=["GET"]),
    Route("/docs.json", docs, methods=["GET"]),
]
routed = Starlette(
    routes=ROUTES,
    exception_handlers={ServiceError: _refuse, HTTPException: _no_route, Exception: _broken},
)
routed.router.redirect_slashes = False  # a redirection has no error body, and goes where the client's Host says
app: ASGIApp = AccessLog(routed) if settings().access_log else routed
_running: Worker | None = None


def _worker() -> Worker:
    assert _running is not None, "requests come after the service is made"
    return _running


class OwnRoutes:
    """Routes every HTTP request to our application. BentoML keeps processes, lifespan and sockets; its probes would report ready too early."""

    def __init__(self, inner: ASGIApp):
        self._inner = inner
        self._hosts = Hosts(settings().host, settings().hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
        elif len(scope["raw_path"]) + len(scope["query_string"]) > MAX_ADDRESS_BYTES:
            await _refuse_early(
                TooLargeError(f"The address is longer than {MAX_ADDRESS_BYTES} bytes; options are short."), 414
            )(scope, receive, send)
        elif (foreign := self._hosts.foreign(scope["headers"])) is not None:
            await _refuse_early(MisdirectedError(foreign), MisdirectedError.status)(scope, receive, send)
        else:
            await _until_left(app, scope, receive, send)


def _refuse_early(error: ServiceError, status: int) -> Response:
    metrics.refused(error.reason)
    return _json(ErrorBody(error=str(error)), status)


async def _until_left(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, but give it up when its client is gone."""
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


@bentoml.service(
    name="modepath",
    workers=settings().workers,
    http={"host": settings().host, "port": settings().port},  # pyright: ignore[reportArgumentType] - all keys are optional
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": ".*"},  # its OpenTelemetry middleware would take half of a small request's time
)
class Modepath:
    """The service that bentofile.yaml names."""

    def __init__(self) -> None:
        global _running
        chosen = settings()
        log_writer.take_over()
        log_writer.count_with(metrics.dropped)
        bentoml_internals.end_gently(chosen.grace_seconds, log_writer.drain)
        _running = Worker()
        self._pulse = Pulse(
            bentoml_internals.worker_number() or 0, metrics.look, _running.batcher.longest_seconds, chosen.grace_seconds
        )
        metrics.count_incomplete(self._pulse.incomplete)
        _running.ensembles.follow(chosen.poll_seconds)
        # A worker that takes no connections yet leaves them to those that can answer. One that loads for very long
        # begins all the same, or its supervisor would take it for dead; then /readyz says why it is not ready.
        _running.ensembles.wait(LOADING_SECONDS)
        self._pulse.start()  # what came before may have held up the event loop

    @bentoml.on_deployment
    def prepare() -> None:  # pyright: ignore[reportSelfClsParameterName] - the decorator makes it static
        """Once, in the process that starts the workers."""
        chosen = settings()
        log_writer.take_over()
        verdicts.prepare()
        share_key()
        watch = Watch(Board.make(), math.ceil(chosen.hang_seconds))
        try:
            metrics.prepare()
            if chosen.metrics_port is not None:
                metrics.listen(chosen.metrics_host, chosen.metrics_port, watch.incomplete)
        except OSError as error:
            raise bentoml_internals.refuse_to_start(str(error)) from None
        bentoml_internals.supervise(watch, metrics.archive)

    @bentoml.on_shutdown
    def close(self) -> None:
        """Stop what runs in the background."""
        _worker().ensembles.close()
        _worker().trials.close()
        _worker().batcher.close()
        if self._pulse.orphaned:
            metrics.remove_folder()


Modepath.add_asgi_middleware(OwnRoutes)  # pyright: ignore[reportArgumentType] - its protocol wants **options
