"""Every change to the internals of BentoML, circus (which manages the workers) and uvicorn (which serves in them).

None of these parts is a documented interface. Each change states its reason. If a part differs from the tested
versions, it is left unchanged and that is logged once. `tests/service/operations/test_bentoml_internals.py` and
`tests/service/test_operations.py` fail without each change. Changes to prometheus_client's internals are in
metric_files.py.

| part | why it is changed | tested with |
|---|---|---|
| `usage_stats.do_not_track` | it is called, and caches its result, before our code is imported | bentoml 1.4.40 |
| `traffic.TimeoutMiddleware` | keeps a timer for each request until its limit | bentoml 1.4.40 |
| `FORWARDED_ALLOW_IPS` | any process on this machine could claim another client address | uvicorn 0.54.0 |
| `uvicorn.config.HTTP_PROTOCOLS` | the default protocol bounds neither heads nor idle connections | uvicorn 0.54.0 |
| `uvicorn.Server.shutdown` | resets connections whose request is not read yet; may wait for ever | uvicorn 0.54.0 |
| `client.http.tempfile`, `client.proxy2.tempfile` | each worker makes a temporary folder that nothing uses; a killed one leaves it behind | bentoml 1.4.40 |
| `circus.arbiter.Arbiter.initialize` | see below | circus 0.18.3 |
| `circus.arbiter.Arbiter.stop` | a signal that arrives while a worker is being started is lost | circus 0.18.3 |
| `circus.arbiter.Arbiter._stop_watchers` | connections that no worker accepts any more are reset | circus 0.18.3 |

BentoML has no setting for uvicorn's protocol class, so its default is replaced. Without the change of `initialize`, a
port in use gives a traceback, dead workers are noticed after 10 s, and hanging workers never.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # the service sends no usage reports

import uvicorn
import uvicorn.config
from _bentoml_impl.client import http, proxy2  # pyright: ignore[reportMissingTypeStubs]
from bentoml._internal.context import server_context
from bentoml._internal.server.http import traffic
from bentoml._internal.utils.analytics import usage_stats
from bentoml.exceptions import BentoMLConfigException, BentoMLException
from starlette.types import ASGIApp

from service.operations.stopping import Refusals
from service.operations.supervision import SECONDS, Watch

HEAD_SECONDS = 5.0  # during shutdown: time that a request that has begun may take for its headers
IDLE_SECONDS = 1.0  # during shutdown: time that an idle connection is kept, because a request may be in transit
LISTENER, WORKERS = "_bento_api_server", "service"  # BentoML's names for the socket and the watcher of the workers

log = logging.getLogger("bentoml.modepath")


# --- In every process, as soon as this is imported --------------------------------------------------------------------


def change(owner: Any, name: str, make: Callable[[Any], Any], parameters: Sequence[str]) -> bool:
    """Replace `owner.name` by `make(original)` if the original has these parameters; else log an error.

    Returns whether it was replaced.
    """
    found = getattr(owner, name, None)
    if not callable(found) or list(inspect.signature(found).parameters) != list(parameters):
        owned = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', owner)}".lstrip(".")
        log.error(
            "%s.%s differs from the versions that this service was tested with, so it is not patched. "
            "service/operations/bentoml_internals.py explains what the patch does; install the versions that are named there.",
            owned, name,
        )  # fmt: skip
        return False
    setattr(owner, name, make(found))
    return True


def track_nothing() -> None:
    """Clear the cached result of do_not_track: BentoML's command calls it before it imports the service."""
    usage_stats.do_not_track.cache_clear()


def _without_limit(original: Any) -> Any:
    def unlimited(app: ASGIApp, timeout: float) -> ASGIApp:
        """Replace BentoML's middleware, which keeps a timer for each request until its limit, even after the answer.

        A timer is six objects: at 2000 requests/s there were 720 000 of them, and each garbage collection blocked all
        requests for 0.4 s. `predict` has a limit of its own, which ends with the request.
        """
        return app

    return unlimited


class _NoFolder:
    """Stands for the temporary folder of the client of itself that BentoML gives each worker.

    Nothing here uses that client, and the folder would stay behind when its worker is killed.
    """

    def __init__(self, prefix: str):
        self.name = tempfile.gettempdir()

    def cleanup(self) -> None:
        """There is nothing to remove."""


def _make_no_folders() -> None:
    for module in (http, proxy2):
        real: Any = vars(module).get("tempfile")
        if real is tempfile:
            own = {name: getattr(real, name) for name in real.__all__}
            vars(module)["tempfile"] = SimpleNamespace(**{**own, "TemporaryDirectory": _NoFolder})


track_nothing()
_make_no_folders()
uvicorn.config.HTTP_PROTOCOLS["auto"] = "service.http.connections:Connection"
change(traffic, "TimeoutMiddleware", _without_limit, ["app", "timeout"])


# --- In a worker ------------------------------------------------------------------------------------------------------


def worker_number() -> int | None:
    """Return this worker's number: 1, 2, …, unique among living workers. None if BentoML did not start the process."""
    return server_context.worker_index


def trust_proxies(addresses: str) -> None:
    """Set the proxies whose X-Forwarded-For uvicorn accepts. By default it trusts every process on this machine."""
    os.environ["FORWARDED_ALLOW_IPS"] = addresses


def end_gently(grace_seconds: float, at_the_begin: Callable[[], None], at_the_end: Callable[[], None]) -> None:
    """Let uvicorn answer requests that clients have already sent when it shuts down, but not wait for ever.

    Args:
        grace_seconds: time that requests may still take.
        at_the_begin: called when uvicorn begins to shut down.
        at_the_end: called when it has shut down.
    """

    def make(original: Any) -> Any:
        async def shutdown(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
            at_the_begin()
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
    # uvicorn closes every connection that has no complete head yet, and a socket closed with unread bytes is reset.
    # Every request that begins from now on is the last on its connection.
    server.server_state.default_headers = [*server.server_state.default_headers, (b"connection", b"close")]
    began = asyncio.get_running_loop().time()
    while not server.force_exit:
        idle = begun = False
        for connection in list(server.server_state.connections):
            scope, cycle = getattr(connection, "scope", None), getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                cycle.keep_alive = False
            elif scope is not None and (cycle is None or cycle.scope is not scope):
                begun = True  # its head has not arrived completely
            else:
                idle = True
        waited = asyncio.get_running_loop().time() - began
        if not ((begun and waited < HEAD_SECONDS) or (idle and waited < IDLE_SECONDS)):
            return
        await asyncio.sleep(0.02)


# --- In the process that starts the workers ---------------------------------------------------------------------------


def refuse_to_start(message: str) -> BentoMLException:
    """Return an exception that BentoML's command prints as one line."""
    return BentoMLConfigException(message)


def supervise(watch: Watch, archive: Callable[[set[int]], None]) -> None:
    """Let BentoML's supervisor check its workers every second, and answer connections while they end.

    `archive` is called with the process ids of the living workers.
    """
    from circus.arbiter import Arbiter  # pyright: ignore[reportMissingTypeStubs] - workers do not need it

    change(Arbiter, "initialize", lambda original: _initialize(original, watch, archive), ["self"])
    change(Arbiter, "stop", _stop, ["self"])
    change(Arbiter, "_stop_watchers", _stop_watchers, ["self", "close_output_streams", "watcher_iter_func"])


def _initialize(original: Any, watch: Watch, archive: Callable[[set[int]], None]) -> Any:
    def initialize(self: Any) -> None:
        circus = logging.getLogger("circus")
        circus.disabled = True  # it would log the same error as the exception below
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
        # Pairs of (whether it is a worker, process): with --reload, BentoML also runs a process that is not a worker.
        children = [(watcher.name == WORKERS, c) for watcher in arbiter.watchers for c in watcher.processes.values()]
        living = {child.pid: ours for ours, child in children if child.status not in (DEAD_OR_ZOMBIE, UNEXISTING)}
        for process in watch.tick([process for process, ours in living.items() if ours]):
            log.error("Worker %d has been blocked for too long (MODEPATH_HANG_SECONDS) and is replaced.", process)
            os.kill(process, signal.SIGKILL)
        if len(living) < len(children):
            with contextlib.suppress(ConflictError):  # the supervisor is starting or stopping workers
                await arbiter.manage_watchers()
        archive({worker.pid for watcher in arbiter.watchers for worker in watcher.processes.values()})
    except Exception:
        log.exception("The supervisor could not check its workers.")


def _stop(original: Any) -> Any:
    from circus.exc import ConflictError  # pyright: ignore[reportMissingTypeStubs]

    def stop(self: Any) -> Any:
        try:
            return original(self)
        except ConflictError:  # the supervisor is starting workers, and the signal would be lost
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
