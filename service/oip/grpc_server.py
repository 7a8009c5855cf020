"""The gRPC server of one worker: the Open Inference Protocol, health and reflection, on a port of its own.

Every worker listens on the port, and the kernel gives each connection to one of them. A call is admitted, counted and
answered as the same request over HTTP would be.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.access.guard import KEY, Guard
from service.http.access_log import write_line
from service.http.errors import BadRequestError, ServiceError
from service.oip import inference, routes
from service.oip.grpc_messages import GrpcInfer
from service.oip.schema import POOL, SERVICE, message
from service.operations import metrics
from service.operations.settings import Settings
from service.predicting import Asker, Predictor, asker, deadline
from service.worker import Worker

log = logging.getLogger("bentoml.modepath")
REFLECTION = "grpc.reflection."
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
WATCH_SECONDS = 1.0
OVERHEAD_BYTES = 64 * 1024  # of a message, beside what counts as its body
MOST_STREAMS = 128  # at once on one connection
MOST_WATCHERS = 64  # of the health of one worker
IDLE_SECONDS = 300.0  # after which a connection without a call is closed; clients open it again
STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND, 408: grpc.StatusCode.DEADLINE_EXCEEDED, 413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT, 429: grpc.StatusCode.RESOURCE_EXHAUSTED, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
Context = Any  # grpc.aio.ServicerContext, whose types are generic in ways that say nothing here
Call = Callable[[bytes, Asker], Awaitable[bytes]]


class GrpcServer:
    """The server of one worker."""

    def __init__(self, chosen: Settings, worker: Worker):
        assert chosen.grpc_port is not None, "otherwise there is no such server"
        self._settings, self._worker = chosen, worker
        self._address = address(chosen.host, chosen.grpc_port)
        self._predictor = Predictor(chosen, worker)
        self._server: Any = None
        self._stopping: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = server = grpc.aio.server(
            interceptors=() if self._worker.guard is None else (_Reflection(self._worker.guard),),
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", self._settings.max_body_bytes + OVERHEAD_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", self._settings.head_bytes),
                # Descriptors are shared with HTTP, which must not run short of them.
                ("grpc.max_allowed_incoming_connections", most_connections()),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                ("grpc.server_handshake_timeout_ms", int(1000 * self._settings.head_seconds)),
                ("grpc.max_connection_idle_ms", int(1000 * IDLE_SECONDS)),
            ),
        )
        calls: dict[str, tuple[str, Call]] = {  # by name: the request over HTTP that needs the same scope, what answers
            "ServerLive": ("GET /v2/health/live", self._live),
            "ServerReady": ("GET /v2/health/ready", self._ready),
            "ModelReady": ("GET /v2/models/-/ready", self._model_ready),
            "ServerMetadata": ("GET /v2", self._server_metadata),
            "ModelMetadata": ("GET /v2/models/-", self._model_metadata),
            "ModelInfer": ("POST /v2/models/-/infer", self._infer),
        }
        # Without a deserializer a handler gets the bytes, whose size is counted before they are parsed.
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(self._handler(likeness, call))
            for name, (likeness, call) in calls.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = _Health(self._worker)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)  # pyright: ignore[reportUnknownMemberType] - generated without types
        reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server, pool=POOL)
        server.add_insecure_port(self._address)
        await server.start()
        log.info("gRPC on %s", self._address)

    def begin_stop(self) -> None:
        """Refuse new calls from now on. Called when requests over HTTP are refused, too."""
        if self._server is not None and self._stopping is None:
            self._health.end()
            self._stopping = asyncio.ensure_future(self._server.stop(self._settings.grace_seconds))

    async def stop(self) -> None:
        """Wait for the calls that run, as long as requests over HTTP may take."""
        self.begin_stop()
        if self._stopping is not None:
            await self._stopping

    def _handler(self, likeness: str, call: Call) -> Callable[[bytes, Context], Awaitable[bytes]]:
        method, _, path = likeness.partition(" ")

        async def handle(request: bytes, context: Context) -> bytes:
            fields: dict[str, Any] = {}
            began, status, sent = time.perf_counter(), grpc.StatusCode.OK, 0
            try:
                reply = await call(request, self._asker(method, path, context, fields))
                sent = len(reply)
                return reply
            except ServiceError as error:
                metrics.refused(error.reason)
                if error.retry_after is not None:
                    context.set_trailing_metadata((("retry-after", str(error.retry_after)),))
                status, why = STATUS.get(error.status, grpc.StatusCode.INTERNAL), str(error)
            except asyncio.CancelledError:
                metrics.refused(metrics.CLIENT_LEFT)
                status = grpc.StatusCode.CANCELLED
                raise
            except Exception:
                log.exception("the call %s failed", likeness)
                metrics.refused(ServiceError.reason)
                status, why = grpc.StatusCode.INTERNAL, "The service failed on this call; its log has the details."
            finally:
                if self._settings.access_log:
                    write_line(context.peer(), "gRPC", path, status.name, time.perf_counter() - began, sent, fields)
            await context.abort(status, why)
            raise AssertionError("abort raises")

        return handle

    def _asker(self, method: str, path: str, context: Context, log_fields: dict[str, Any]) -> Asker:
        headers = {name.lower(): value for name, value in context.invocation_metadata() if isinstance(value, str)}
        scope: dict[str, Any] = {
            "method": method, "path": path,
            "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()],
        }  # fmt: skip
        if self._worker.guard is not None:
            self._worker.guard.admit(scope)
            if KEY in scope:
                log_fields["key"] = scope[KEY].name
        header = self._settings.caller_header
        named = [str(value) for name, value in context.invocation_metadata() if header and name == header.lower()]
        return asker(scope.get(KEY), header, named, headers, log_fields)

    async def _infer(self, request: bytes, asker: Asker) -> bytes:
        async with deadline(self._settings.timeout), self._worker.intake.holding(request) as body:
            one = GrpcInfer(body, self._worker.limits.rows)
            return await self._predictor.answer(body, one.read, one.write, asker)

    async def _live(self, request: bytes, asker: Asker) -> bytes:
        return message("ServerLiveResponse")(live=True).SerializeToString()

    async def _ready(self, request: bytes, asker: Asker) -> bytes:
        ready = self._worker.ensembles.why_not_ready() is None
        return message("ServerReadyResponse")(ready=ready).SerializeToString()

    async def _model_ready(self, request: bytes, asker: Asker) -> bytes:
        name, version = _named("ModelReadyRequest", request)
        try:
            routes.ensemble_of(self._worker, name, version)
        except ServiceError:  # the protocol has an answer for it
            return message("ModelReadyResponse")(ready=False).SerializeToString()
        return message("ModelReadyResponse")(ready=True).SerializeToString()

    async def _server_metadata(self, request: bytes, asker: Asker) -> bytes:
        return message("ServerMetadataResponse")(**routes.server_metadata()).SerializeToString()

    async def _model_metadata(self, request: bytes, asker: Asker) -> bytes:
        ensemble = routes.ensemble_of(self._worker, *_named("ModelMetadataRequest", request))
        return message("ModelMetadataResponse")(**inference.metadata(ensemble)).SerializeToString()


class _Health(health_pb2_grpc.HealthServicer):
    """grpc.health.v1: ready means that a request would be answered."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._watchers = 0
        self._ended = asyncio.Event()

    def _status(self) -> health_pb2.HealthCheckResponse:
        ready = self._worker.ensembles.why_not_ready() is None
        kind = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=kind)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:  # noqa: N802 - the protocol's name
        if request.service not in ("", SERVICE, HEALTH):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.service[:80]!r} is not a service of this server.")
        return self._status()

    async def Watch(  # noqa: N802 - the protocol's name
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        if self._watchers >= MOST_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_WATCHERS} clients watch already; use Check."
            )
        self._watchers += 1
        try:
            last = None
            while True:
                if (now := self._status()) != last:
                    last = now
                    yield now
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), WATCH_SECONDS)
                    yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
                    return
        finally:
            self._watchers -= 1

    def end(self) -> None:
        """Tell all who watch that the service ends."""
        self._ended.set()


class _Reflection(grpc.aio.ServerInterceptor):
    """Describes the service to holders of a key with the scope read."""

    def __init__(self, guard: Guard):
        self._guard = guard

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if REFLECTION not in handler_call_details.method:
            return handler
        metadata = handler_call_details.invocation_metadata
        headers = [
            (name.lower().encode(), value.encode("latin-1", "replace"))
            for name, value in metadata
            if isinstance(value, str)
        ]
        try:
            self._guard.admit({"method": "GET", "path": "/v2", "headers": headers})
        except ServiceError as error:
            metrics.refused(error.reason)
            status, why = STATUS.get(error.status, grpc.StatusCode.INTERNAL), str(error)

            async def refuse(requests: object, context: Context) -> AsyncIterator[bytes]:
                await context.abort(status, why)
                yield b""

            return cast(Any, grpc).stream_stream_rpc_method_handler(refuse)
        return handler


def _named(kind: str, request: bytes) -> tuple[str, int | None]:
    try:
        found = message(kind).FromString(request)
    except DecodeError:
        raise BadRequestError(f"The message is not a {kind} of the Open Inference Protocol.") from None
    return found.name, routes.version_of({"version": found.version} if found.version else {})


def address(host: str, port: int) -> str:
    """Return an address in gRPC's form."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(host: str, port: int) -> None:
    """Check that nobody listens on the port: workers share it, and would share it with a stranger, too.

    Raises:
        OSError: it is in use, or the address does not belong to this machine.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise OSError(
            f"Cannot listen on {address(host, port)} for gRPC: {error.strerror}. Does another process listen there? Choose another port with MODEPATH_GRPC_PORT."
        ) from None


def most_connections() -> int:
    """Return how many connections gRPC may hold in this process: a quarter of its file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft // 4) if soft != resource.RLIM_INFINITY else 2**20
