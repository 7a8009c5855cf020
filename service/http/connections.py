"""One HTTP/1.1 connection: uvicorn's protocol, with the limits that it lacks.

The head and trailers of a request have a bounded size. A head must arrive in time, and an answer must be read in time.
Idle connections are closed when file descriptors run short. A request with ambiguous framing is refused with a JSON
error body. Tested with uvicorn 0.54 and httptools 0.6 and 0.7.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import resource
import termios
from collections.abc import Collection
from typing import Any, cast

import httptools
import orjson
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.http.errors import BadRequestError, BusyError, NotImplementedHereError, ServiceError, TooLargeHeadersError
from service.http.intake import PACE_BYTES, drain
from service.operations import metrics
from service.operations.settings import settings

MAX_HEADERS = 100
MAX_PIPELINED = 8  # requests that wait on a connection behind the one that is being answered
RESERVED_DESCRIPTORS = 128  # for files, models and logs
LINGER_SECONDS = 2.0  # time that a client has to read a refusal while it is still sending
LINGER_BYTES = 4 * 2**20  # bytes that it may send in this time
LEFT = "modepath.left"  # key of the scope: a callable, called if the client disconnects before its answer is complete
log = logging.getLogger("bentoml.modepath")


def most_connections() -> int:
    """Return how many connections this process may hold: its file descriptors, less those that it needs for itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft - RESERVED_DESCRIPTORS) if soft != resource.RLIM_INFINITY else 2**20


_direct: Any = (
    None  # what answers, instead of the application that uvicorn was given; uvicorn has its own types of ASGI
)


def is_alone() -> bool:
    """Return whether this process is answering exactly one HTTP request."""
    return len(Connection.answering) == 1


def leave(connections: int) -> None:
    """Leave file descriptors to other connections than those of HTTP."""
    Connection.most = max(16, most_connections() - connections)


def answer_with(app: ASGIApp, trusted_proxies: str) -> None:
    """Let this application answer every request of this process, without the middleware around the one that uvicorn was given.

    That middleware is BentoML's, takes time, and does nothing for us.

    Args:
        app: the application.
        trusted_proxies: addresses of the proxies whose X-Forwarded-For names the client; "" for none.
    """
    global _direct
    named: Any = app
    _direct = ProxyHeadersMiddleware(named, trusted_proxies) if trusted_proxies else app


class Connection(HttpToolsProtocol):
    """See the module. The parser's callbacks are called in the order of the bytes; all run on the event loop."""

    most = most_connections()
    answering: Collection[object] = ()  # one task for each request that is being answered; uvicorn's set

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        Connection.answering = self.tasks  # of all connections
        self._head_limit = settings().head_bytes
        self._head_seconds = settings().head_seconds
        self._since = 0.0  # time at which the connection was opened, or at which its last request arrived
        self._head_bytes = 0  # raw bytes since the request began, or since the last byte of its body: head or trailers
        self._header_bytes = 0  # parsed bytes of header names and values
        self._in_head = True
        self._refusal: ServiceError | None = None
        self._late: asyncio.TimerHandle | None = None
        self._resumed = False  # True while a second parser is set up to read the body, after an Upgrade header
        self._answering: Any = None  # uvicorn's record of the request that is being answered, or was answered last
        self._unread: asyncio.TimerHandle | None = None  # runs while an answer waits to be read
        self._thrown_away: int | None = None  # bytes discarded since a refusal; None if nothing was refused

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Accept the connection; if too many are open, close an idle one or refuse this one."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self._head_seconds, self._head_is_late)
        self._since = self.loop.time()
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the work for a client that has disconnected."""
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)
        if (cycle := self._answering) is not None and not cycle.response_complete:
            cycle.disconnected = True  # uvicorn sets this only on the request that arrived last
            if left := cycle.scope.get(LEFT):
                left()

    def _make_room(self) -> None:
        # Runs only when descriptors run short: scanning a thousand connections takes 0.1 ms.
        others = cast("set[Connection]", self.connections - {self})
        idle = [one for one in others if one.is_idle() or one.transport.is_closing()]
        if idle:
            # Not `close`, which waits until the client has read all data sent to it.
            min(idle, key=lambda one: one._since).transport.abort()
            return
        self._answer_outside(BusyError("The service holds as many connections as it may. Try again in a second."))

    @property
    def _current(self) -> Any:
        """The request being read or answered, or the last one. None before the first, despite uvicorn's types."""
        return self.cycle

    def is_idle(self) -> bool:
        """Return whether no request is being answered on this connection."""
        return ((cycle := self._current) is None or cycle.response_complete) and not self.transport.is_closing()

    def _head_is_late(self) -> None:
        self._late = None
        if self.is_idle():
            # Closed without an answer: a client that has sent nothing would take it for the answer to its next request.
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    # Answers that the client does not read

    def pause_writing(self) -> None:
        """Called when an answer fills the buffers of the kernel and the transport."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Called when most of the answer was read."""
        super().resume_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        """Continue with the next request; the client may still have to read the answer."""
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Disconnect a client that reads its answer more slowly than it must send a body."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(settings().stall_seconds, self._reader_is_late, self._unsent())

    def _reader_is_late(self, before: int) -> None:
        if self._unsent() > max(0, before - PACE_BYTES):
            self.transport.abort()
        else:
            self._watch_reader()

    def _unsent(self) -> int:
        """Return the bytes that wait in the transport and in the kernel.

        The kernel's part counts too: the kernel accepts more only after it has sent a third of what it holds.
        """
        in_kernel = array.array("i", [0])
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        return self.transport.get_write_buffer_size() + in_kernel[0]

    # Received bytes

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and refuse a head as soon as it is too long."""
        if self._thrown_away is not None:
            self._thrown_away += len(data)
            if self._thrown_away > LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            rest = data
            while rest:
                try:
                    self.parser.feed_data(rest)
                    rest = b""
                except httptools.HttpParserUpgrade as upgrade:
                    rest = self._without_upgrade(rest[upgrade.args[0] :])
        except httptools.HttpParserError:
            if self._refusal is None and not self.transport.is_closing():
                self.send_400_response("")
            return
        if self.transport.is_closing():
            return
        if self._head_bytes > self._head_limit:
            self._answer_outside(_too_large())
        elif self._late is None and (self._head_bytes if self._in_head else self.is_idle()):
            # The data is an incomplete head, or the rest of a body whose request was already answered.
            self._late = self.loop.call_later(self._head_seconds, self._head_is_late)

    def send_400_response(self, msg: str) -> None:
        """Refuse data that cannot be parsed as HTTP."""
        self._answer_outside(BadRequestError("The request is not HTTP/1.1. Is it HTTPS or HTTP/2, or a broken client?"))

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Ignore an Upgrade header, as a server may, and return the bytes that remain to be parsed.

        httptools stops parsing after a head with an Upgrade header, so a new parser reads the body, which starts with
        `rest`.
        """
        framing = [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        if self._refusal is not None:
            return b""
        if framing:
            self.parser = httptools.HttpRequestParser(self)
            self._resumed = True
            head = b"".join(name + b": " + value + b"\r\n" for name, value in framing)
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
            self._resumed = False
        return rest

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """See httptools."""
        if self._resumed:
            return
        self._in_head = True
        self._header_bytes = 0
        self._refusal = None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        if not self._resumed:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Trailers, which follow the body, are ignored."""
        if self._resumed or not self._in_head or self._refusal is not None:
            return
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._header_bytes > self._head_limit:
            self._refusal = _too_large()

    def on_headers_complete(self) -> None:
        """Start the answer, or refuse the request."""
        if self._resumed:
            return
        self._stop_waiting()
        self._in_head = False
        self._head_bytes = 0
        self._since = self.loop.time()
        refusal = self._refusal = self._refusal or self._unclear()
        if refusal is None:
            super().on_headers_complete()
        else:
            own, self.app = self.app, _Refuse(refusal)  # pyright: ignore[reportAttributeAccessIssue]
            super().on_headers_complete()
            self.app = own
        if self.pipeline:
            self._read_on()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._head_bytes = 0
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """Keep reading; otherwise a disconnect during the answer would go unnoticed."""
        if self.parser.should_upgrade() and any(
            name in (b"content-length", b"transfer-encoding") for name, _ in self.headers
        ):
            return  # the body is read by a second parser
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0
        self._read_on()

    def _read_on(self) -> None:
        # uvicorn stops reading while a pipelined request waits. Here the number of waiting requests and the size of
        # their bodies are bounded instead; few clients pipeline at all.
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        chosen: Any = app if _direct is None or isinstance(app, _Refuse) else _direct
        super()._start_asgi_task(cycle, chosen)

    def _should_upgrade(self) -> bool:
        return False

    def _unclear(self) -> ServiceError | None:
        """Return an error if another server on the way could parse this request differently (request smuggling)."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            return BadRequestError(f"The request has {hosts} Host headers; HTTP/1.1 requires exactly one.")
        encodings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if encodings and encodings != [b"chunked"]:
            return NotImplementedHereError("Transfer-Encoding may only be `chunked` here. Send the body uncompressed.")
        return None

    def _answer_outside(self, error: ServiceError) -> None:
        """Send a refusal outside of any request, because none could be read, and close the connection."""
        metrics.refused(error.reason)
        body = _body(error)
        head = STATUS_LINE[error.status] + b"".join(
            name + b": " + value + b"\r\n" for name, value in _headers(error, body)
        )
        if (cycle := self._answering) is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True  # this refusal replaces the answer to that request
            cycle.message_event.set()
        # Closing a socket with unread bytes resets the connection, and the client might lose the answer.
        self._thrown_away = 0
        self._stop_waiting()
        self.transport.write(head + b"\r\n" + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _too_large() -> TooLargeHeadersError:
    return TooLargeHeadersError(
        f"The request's head is larger than {settings().head_bytes} bytes (MODEPATH_HEAD_BYTES) or has more than {MAX_HEADERS} headers. Send fewer headers or cookies."
    )


def _body(error: ServiceError) -> bytes:
    return orjson.dumps({"error": str(error)})


def _headers(error: ServiceError, body: bytes) -> list[tuple[bytes, bytes]]:
    again = [] if error.retry_after is None else [(b"retry-after", str(error.retry_after).encode())]
    return [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *again, (b"connection", b"close"),
    ]  # fmt: skip


class _Refuse:
    """An ASGI application that refuses one request and closes its connection."""

    def __init__(self, error: ServiceError):
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics.refused(self._error.reason)
        await drain(receive)
        body = _body(self._error)
        head = {"type": "http.response.start", "status": self._error.status, "headers": _headers(self._error, body)}
        await send(head)
        await send({"type": "http.response.body", "body": body})
