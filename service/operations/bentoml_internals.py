"""Everything that reaches into BentoML and what it stands on: circus, which keeps the workers, and uvicorn, which serves in them.

None of it is a documented interface. Each change below says why it is made; where the part that it changes does not look as it
did in the versions it was tested on, it is left alone, and the log says so once. `tests/service/test_bentoml_internals.py` and
`test_operations.py` fail without each of them. What touches prometheus_client's internals is in metric_files.py.

| part | why | tested on |
|---|---|---|
| `usage_stats.do_not_track` | it is asked, and remembers the answer, before our code is imported | bentoml 1.4.40 |
| `traffic.TimeoutMiddleware` | leaves a timer for each request until its limit | bentoml 1.4.40 |
| `FORWARDED_ALLOW_IPS` | any process on this machine could name another client | uvicorn 0.54.0 |
| `uvicorn.config.HTTP_PROTOCOLS` | BentoML cannot choose the protocol, and uvicorn's bounds neither heads nor idle connections | uvicorn 0.54.0 |
| `uvicorn.Server.shutdown` | resets connections whose request is not read yet, and may wait for ever | uvicorn 0.54.0 |
| `circus.arbiter.Arbiter.initialize` | a taken port gives a traceback; dead workers are noticed after 10 s, hanging ones never | circus 0.18.3 |
| `circus.arbiter.Arbiter.stop` | a signal that comes while a worker is being started is lost | circus 0.18.3 |
| `circus.arbiter.Arbiter._stop_watchers` | connections that no worker takes any more wait, and are reset | circus 0.18.3 |
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # a server of ours reports to nobody

import uvicorn
import uvicorn.config
from bentoml._internal.context import server_context
from bentoml._internal.server.http import traffic
from bentoml._internal.utils.analytics import usage_stats
from bentoml.exceptions import BentoMLConfigException, BentoMLException
from starlette.types import ASGIApp

from service.operations.stopping import Refusals
from service.operations.supervision import SECONDS, Watch

HEAD_SECONDS = 5.0  # how long a request that has begun may take for its headers when the worker is to end
IDLE_SECONDS = 1.0  # how long a connection without a request is kept then: one may be on its way
LISTENER, WORKERS = "_bento_api_server", "service"  # as BentoML names them

log = logging.getLogger("bentoml.modepath")


# --- In every process, as soon as this is imported -------------------------------------------------------------------------


def change(owner: Any, name: str, make: Callable[[Any], Any], parameters: Sequence[str]) -> bool:
    """Replace `owner.name` by `make(it)`, if it takes these parameters; else say so."""
    found = getattr(owner, name, None)
    if not callable(found) or list(inspect.signature(found).parameters) != list(parameters):
        owned = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', owner)}".lstrip(".")
        log.error(
            "%s.%s is not what it was in the versions that this service was tested with: it is left as it is. "
            "service/operations/bentoml_internals.py says what is missing now; install the versions that are named there.",
            owned, name,
        )  # fmt: skip
        return False
    setattr(owner, name, make(found))
    return True


def track_nothing() -> None:
    """BentoML's command asks whether it may report before it imports the service, and remembers the answer: ask anew."""
    usage_stats.do_not_track.cache_clear()


def _without_limit(original: Any) -> Any:
    def unlimited(app: ASGIApp, timeout: float) -> ASGIApp:
        """In place of BentoML's limit, which leaves a timer of six objects for each request until the time is over, answered
        or not: with 2000 requests a second 720 000 of them, and each of Python's searches through them for garbage held
        everybody up for 0.4 s. `predict` has a limit that ends with it.
        """
        return app

    return unlimited


track_nothing()
uvicorn.config.HTTP_PROTOCOLS["auto"] = "service.http.connections:Connection"
change(traffic, "TimeoutMiddleware", _without_limit, ["app", "timeout"])


# --- In a worker -----------------------------------------------------------------------------------------------------------


def worker_number() -> int | None:
    """1, 2, …, of those that live at the same time each another one; None where BentoML did not start the process."""
    return server_context.worker_index


def trust_proxies(addresses: str) -> None:
    """Whose X-Forwarded-For uvicorn takes for the client's address. By default it trusts everybody on this machine."""
    os.environ["FORWARDED_ALLOW_IPS"] = addresses


def end_gently(grace_seconds: float, at_the_end: Callable[[], None]) -> None:
    """Let uvicorn answer what clients have already sent when it is to end, but not wait for ever."""

    def make(original: Any) -> Any:
        async def shutdown(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            for listener in sockets or []:
                listener.close()
            if self.config.timeout_graceful_shutdown is None:
                self.config.timeout_graceful_shutdown = round(grace_seconds)
            await _let_requests_begin(self)
            await original(self, sockets)
            at_the_end()

        return shutdown

    change(uvicorn.Server, "shutdown", make, ["self", "sockets"])


async def _let_requests_begin(server: uvicorn.Server) -> None:
    # uvicorn closes every connection that has no complete head yet. A socket that is closed with bytes unread is reset.
    # Requests that begin from now on are the last ones of their connections.
    server.server_state.default_headers = [*server.server_state.default_headers, (b"connection", b"close")]
    began = asyncio.get_running_loop().time()
    while not server.force_exit:
        idle = begun = False
        for connection in list(server.server_state.connections):
            scope, cycle = getattr(connection, "scope", None), getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                cycle.keep_alive = False
            elif scope is not None and (cycle is None or cycle.scope is not scope):
                begun = True  # its head is on the way
            else:
                idle = True
        waited = asyncio.get_running_loop().time() - began
        if not ((begun and waited < HEAD_SECONDS) or (idle and waited < IDLE_SECONDS)):
            return
        await asyncio.sleep(0.02)


# --- In the process that starts the workers ---------------------------------------------------------------------------------


def refuse_to_start(message: str) -> BentoMLException:
    """What BentoML's command prints as one line."""
    return BentoMLConfigException(message)


def supervise(watch: Watch, archive: Callable[[set[int]], None]) -> None:
    """Let BentoML's supervisor look after its workers every second, and answer while they end.

    `archive` is called with the processes of the workers that live.
    """
    from circus.arbiter import Arbiter  # pyright: ignore[reportMissingTypeStubs] - workers do not need it

    change(Arbiter, "initialize", lambda original: _initialize(original, watch, archive), ["self"])
    change(Arbiter, "stop", _stop, ["self"])
    change(Arbiter, "_stop_watchers", _stop_watchers, ["self", "close_output_streams", "watcher_iter_func"])


def _initialize(original: Any, watch: Watch, archive: Callable[[set[int]], None]) -> Any:
    def initialize(self: Any) -> None:
        circus = logging.getLogger("circus")
        circus.disabled = True  # it would say the same before us
        try:
            original(self)
        except OSError as error:
            where = ", ".join(str(found.location) for found in self.sockets.values())
            raise refuse_to_start(
                f"Cannot listen on {where}: {error.strerror}. Does another process listen there? "
                "Choose a port with MODEPATH_PORT, an address of this machine with MODEPATH_HOST."
            ) from None
        finally:
            circus.disabled = False
        self.loop.call_later(SECONDS, _tick, self, watch, archive)

    return initialize


async def _tick(arbiter: Any, watch: Watch, archive: Callable[[set[int]], None]) -> None:
    from circus.exc import ConflictError  # pyright: ignore[reportMissingTypeStubs]
    from circus.process import DEAD_OR_ZOMBIE, UNEXISTING  # pyright: ignore[reportMissingTypeStubs]

    arbiter.loop.call_later(SECONDS, _tick, arbiter, watch, archive)
    try:
        # By whether they are workers of the service: with --reload BentoML runs a process of its own, which does not count.
        children = [(watcher.name == WORKERS, c) for watcher in arbiter.watchers for c in watcher.processes.values()]
        living = {child.pid: ours for ours, child in children if child.status not in (DEAD_OR_ZOMBIE, UNEXISTING)}
        for process in watch.tick([process for process, ours in living.items() if ours]):
            log.error("Worker %d has stood still for too long (MODEPATH_HANG_SECONDS): it is replaced.", process)
            os.kill(process, signal.SIGKILL)
        if len(living) < len(children):
            with contextlib.suppress(ConflictError):  # it is just starting or stopping workers
                await arbiter.manage_watchers()
        archive({worker.pid for watcher in arbiter.watchers for worker in watcher.processes.values()})
    except Exception:
        log.exception("The supervisor could not look after its workers.")


def _stop(original: Any) -> Any:
    from circus.exc import ConflictError  # pyright: ignore[reportMissingTypeStubs]

    def stop(self: Any) -> Any:
        try:
            return original(self)
        except ConflictError:  # it is just starting workers; the signal would be lost
            self.loop.call_later(0.1, self.stop)
            return None

    return stop


def _stop_watchers(original: Any) -> Any:
    async def stop_watchers(self: Any, *args: Any, **options: Any) -> None:
        listener = self.sockets.get(LISTENER)
        speaks_tls = any("--ssl-certfile" in (watcher.args or ()) for watcher in self.watchers)
        if not self._stopping or listener is None or speaks_tls:
            await original(self, *args, **options)
            return
        refusals = Refusals()
        await refusals.begin([listener], listener.backlog)
        await original(self, *args, **options)
        await refusals.end([listener])

    return stop_watchers
