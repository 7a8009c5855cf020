"""The service that BentoML starts. It manages processes, lifespan and sockets; service/app.py answers every request."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from service.operations import bentoml_internals  # isort: skip - before BentoML reads whether to report usage

import bentoml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models_store import signing
from models_store.errors import SignatureError
from service.access import keys
from service.access.hosts import is_local
from service.access.quota import Quota
from service.app import create_app
from service.http import connections
from service.inference import verdicts
from service.inference.rollout import RollOuts
from service.operations import log_writer, metrics
from service.operations.settings import WrongSettingError, settings, share_key
from service.operations.supervision import Board, Pulse, Watch
from service.worker import Worker

if TYPE_CHECKING:
    from service.oip.grpc_server import GrpcServer

LOADING_SECONDS = 20

log = logging.getLogger("bentoml.modepath")
logging.getLogger("uvicorn.error").propagate = False  # otherwise every traceback is printed twice
try:
    settings()
except WrongSettingError as error:
    raise bentoml_internals.refuse_to_start(str(error)) from None
bentoml_internals.trust_proxies(settings().trusted_proxies)
_app: ASGIApp | None = None  # the application of this process
_grpc: GrpcServer | None = None  # its gRPC server


class OwnRoutes:
    """Middleware that routes every HTTP request to our application; BentoML's probes would report ready too early."""

    def __init__(self, inner: ASGIApp):
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on an event that is not HTTP."""
        if scope["type"] == "lifespan":
            await self._inner(scope, _stopping(receive), _starting(send))
        elif scope["type"] != "http":
            await self._inner(scope, receive, send)
        else:
            assert _app is not None, "requests come after the service is made"
            await _app(scope, receive, send)


def _starting(send: Send) -> Send:
    """Listen for gRPC as soon as the worker has started."""

    async def sending(message: Message) -> None:
        if _grpc is not None and message["type"] == "lifespan.startup.complete":
            await _grpc.start()
        await send(message)

    return sending


def _refuse_calls() -> None:
    if _grpc is not None:
        _grpc.begin_stop()


def _stopping(receive: Receive) -> Receive:
    """Finish the calls of gRPC before the worker ends."""

    async def receiving() -> Message:
        message = await receive()
        if _grpc is not None and message["type"] == "lifespan.shutdown":
            await _grpc.stop()
        return message

    return receiving


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
        global _app, _grpc
        chosen = settings()
        log_writer.take_over(chosen.log_format)
        log_writer.count_with(metrics.dropped)
        bentoml_internals.end_gently(chosen.grace_seconds, _refuse_calls, log_writer.drain)
        self._worker = worker = Worker(chosen)
        _app = create_app(chosen, worker)
        connections.answer_with(_app, chosen.trusted_proxies)
        if chosen.grpc_port is not None:
            from service.oip.grpc_server import GrpcServer, most_connections  # its libraries are an extra

            connections.leave(most_connections())
            _grpc = GrpcServer(chosen, worker)
        self._pulse = Pulse(
            bentoml_internals.worker_number() or 0, metrics.look, worker.batcher.longest_seconds, chosen.grace_seconds
        )
        metrics.count_incomplete(self._pulse.incomplete)
        worker.ensembles.follow(chosen.poll_seconds)
        # Until a worker has loaded its ensembles it leaves connections to workers that can answer. If loading takes
        # very long it starts anyway, or its supervisor would consider it dead; /readyz then reports why it is not
        # ready.
        worker.ensembles.wait(LOADING_SECONDS)
        self._pulse.start()  # last, because loading may have blocked the event loop

    @bentoml.on_deployment
    def prepare() -> None:  # pyright: ignore[reportSelfClsParameterName] - the decorator makes it static
        """Set up what all workers share. Called once, in the process that starts the workers."""
        chosen = settings()
        log_writer.take_over(chosen.log_format)
        verdicts.prepare()
        share_key()
        RollOuts.prepare()
        if chosen.signed_by:
            try:
                signing.check_keys(chosen.signed_by)
            except SignatureError as error:
                raise bentoml_internals.refuse_to_start(f"MODEPATH_SIGNED_BY: {error}") from None
        if chosen.keys_file is not None:
            try:
                keys.read(chosen.keys_file)
            except keys.KeyFileError as error:
                raise bentoml_internals.refuse_to_start(str(error)) from None
            Quota.make()
        elif not is_local(chosen.host):
            log.warning(
                "OPEN TO THE NETWORK: %s:%d answers everybody who can reach it, because no keys are configured (MODEPATH_KEYS_FILE). "
                "Make one with `modepath keys add`, or let a proxy decide who may ask.",
                chosen.host,
                chosen.port,
            )
        if chosen.grpc_port is not None:
            try:
                from service.oip.grpc_server import check_port

                check_port(chosen.host, chosen.grpc_port)
            except ImportError as error:
                raise bentoml_internals.refuse_to_start(
                    f"MODEPATH_GRPC_PORT: {error}. Install the extra: pip install 'modepath[grpc]'."
                ) from None
            except OSError as error:
                raise bentoml_internals.refuse_to_start(str(error)) from None
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
        """Stop the background threads and processes of the worker."""
        self._worker.close()
        if self._pulse.orphaned:
            metrics.remove_folder()


Modepath.add_asgi_middleware(OwnRoutes)  # pyright: ignore[reportArgumentType] - its protocol wants **options
