"""What BentoML starts: processes, lifespan and sockets are its own, every HTTP request is answered by service/app.py."""

from __future__ import annotations

import logging
import math

from service.operations import bentoml_internals  # isort: skip - before BentoML asks whether it may report

import bentoml
from starlette.types import ASGIApp, Receive, Scope, Send

from service.app import create_app
from service.inference import verdicts
from service.operations import log_writer, metrics
from service.operations.settings import WrongSettingError, settings, share_key
from service.operations.supervision import Board, Pulse, Watch
from service.worker import Worker

LOADING_SECONDS = 20

logging.getLogger("uvicorn.error").propagate = False  # or every traceback is printed twice
try:
    settings()
except WrongSettingError as error:
    raise bentoml_internals.refuse_to_start(str(error)) from None
bentoml_internals.trust_proxies(settings().trusted_proxies)
_app: ASGIApp | None = None  # of this process


class OwnRoutes:
    """Routes every HTTP request to our application; BentoML's probes would report ready too early."""

    def __init__(self, inner: ASGIApp):
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
        else:
            assert _app is not None, "requests come after the service is made"
            await _app(scope, receive, send)


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
        global _app
        chosen = settings()
        log_writer.take_over()
        log_writer.count_with(metrics.dropped)
        bentoml_internals.end_gently(chosen.grace_seconds, log_writer.drain)
        self._worker = worker = Worker(chosen)
        _app = create_app(chosen, worker)
        self._pulse = Pulse(
            bentoml_internals.worker_number() or 0, metrics.look, worker.batcher.longest_seconds, chosen.grace_seconds
        )
        metrics.count_incomplete(self._pulse.incomplete)
        worker.ensembles.follow(chosen.poll_seconds)
        # A worker that takes no connections yet leaves them to those that can answer. One that loads for very long
        # begins all the same, or its supervisor would take it for dead; then /readyz says why it is not ready.
        worker.ensembles.wait(LOADING_SECONDS)
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
        self._worker.close()
        if self._pulse.orphaned:
            metrics.remove_folder()


Modepath.add_asgi_middleware(OwnRoutes)  # pyright: ignore[reportArgumentType] - its protocol wants **options
