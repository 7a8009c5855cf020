"""One HTTP/1.1 connection: uvicorn's protocol, with the limits that it lacks.

A request's head and trailers have a bounded size, a head must come in time and an answer must be read in time, idle
connections give way when descriptors run short, and what cannot be framed without doubt is refused in the service's own form.
Tested with uvicorn 0.54 and httptools 0.6 and 0.7.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import resource
import termios
from typing import Any, cast

import httptools
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.http.errors import BadRequestError, BusyError, NotImplementedHereError, ServiceError, TooLargeHeadersError
from service.http.intake import PACE_BYTES, drain
from service.operations import metrics
from service.operations.settings import settings

MAX_HEADERS = 100
MAX_PIPELINED = 8  # requests that wait on a connection behind the one that is answered
RESERVED_DESCRIPTORS = 128  # for files, models and logs
LINGER_SECONDS = 2.0  # a client may take to read a refusal while it is still sending,
LINGER_BYTES = 4 * 2**20  # and so much it may send meanwhile
LEFT = "modepath.left"  # scope: a callable, called when the client is gone before its answer
log = logging.getLogger("bentoml.modepath")


def most_connections() -> int:
    """How many connections this process may hold: its descriptors, less those that it needs for itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft - RESERVED_DESCRIPTORS) if soft != resource.RLIM_INFINITY else 2**20


class Connection(HttpToolsProtocol):
    """See the module. Callbacks of the parser come in the order of the bytes; all run on the event loop."""

    _most = most_connections()

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_limit = settings().head_bytes
        self._head_seconds = settings().head_seconds
        self._since = 0.0  # when it was made, or when its last request came
        self._head_bytes = 0  # raw, since the request began or since the last byte of its body: a head, or trailers
        self._header_bytes = 0  # parsed
        self._in_head = True
        self._refusal: ServiceError | None = None
        self._late: asyncio.TimerHandle | None = None
        self._resumed = False  # a second parser reads the body, after a head that asks for another protocol
        self._answering: Any = None  # uvicorn's record of the request that is answered, or was last
        self._unread: asyncio.TimerHandle | None = None  # runs while an answer waits to be read
        self._thrown_away: int | None = None  # bytes that came after a refusal; None: there was none

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Admit it, if need be in place of one that is idle."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self._head_seconds, self._head_is_late)
        self._since = self.loop.time()
        if len(self.connections) > self._most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop what is done for a client that is gone."""
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)
        if (cycle := self._answering) is not None and not cycle.response_complete:
            cycle.disconnected = True  # uvicorn says so to the request that came last
            if left := cycle.scope.get(LEFT):
                left()

    def _make_room(self) -> None:
        # Only where descriptors run short: looking at a thousand connections takes 0.1 ms.
        others = cast("set[Connection]", self.connections - {self})
        idle = [one for one in others if one.is_idle() or one.transport.is_closing()]
        if idle:
            # Not `close`, which waits until a client has read what it was sent.
            min(idle, key=lambda one: one._since).transport.abort()
            return
        self._answer_outside(BusyError("As many connections are open as this service may hold. Try again in a second."))

    @property
    def _current(self) -> Any:
        """The request that is read or answered, or the last one; None before the first, whatever uvicorn's types say."""
        return self.cycle

    def is_idle(self) -> bool:
        """True while nothing is answered on it."""
        return ((cycle := self._current) is None or cycle.response_complete) and not self.transport.is_closing()

    def _head_is_late(self) -> None:
        self._late = None
        if self.is_idle():
            # Without an answer: a client that has sent nothing would take it for that to a later request.
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    # Answers that are not read

    def pause_writing(self) -> None:
        """An answer is larger than what the client and the kernel take at once."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Most of it was read."""
        super().resume_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        """Go on with the next request; the answer may still have to be read."""
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Cut a client off that does not read its answer at the pace that its body has to have, too."""
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
        """Bytes that wait here or in the kernel, which takes more only after it has sent a third of what it holds."""
        in_kernel = array.array("i", [0])
        with contextlib.suppress(OSError, ValueError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        return self.transport.get_write_buffer_size() + in_kernel[0]

    # Its bytes

    def data_received(self, data: bytes) -> None:
        """Feed the parser; refuse a head that is too long before it is complete."""
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
            # A head that has begun, or the rest of a body whose request was answered already.
            self._late = self.loop.call_later(self._head_seconds, self._head_is_late)

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed at all."""
        self._answer_outside(BadRequestError("The request is not HTTP/1.1. Is it HTTPS or HTTP/2, or a broken client?"))

    def _without_upgrade(self, rest: bytes) -> bytes:
        """A server may ignore an offer of another protocol, but httptools stops at its head: a new parser reads the body, which `rest` begins."""
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
        """See httptools. Trailers, which come after the body, say nothing to us."""
        if self._resumed or not self._in_head or self._refusal is not None:
            return
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._header_bytes > self._head_limit:
            self._refusal = _too_large()

    def on_headers_complete(self) -> None:
        """Start the answer, or a refusal in its place."""
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
        """Go on reading, or nobody would see that the client leaves while its answer is made."""
        if self.parser.should_upgrade() and any(
            name in (b"content-length", b"transfer-encoding") for name, _ in self.headers
        ):
            return  # its body is still to be read
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0
        self._read_on()

    def _read_on(self) -> None:
        # uvicorn does not read behind a request that waits. What else is sent is bounded instead, and few clients send any.
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _should_upgrade(self) -> bool:
        return False

    def _unclear(self) -> ServiceError | None:
        """What another server on the way may read otherwise."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts != 1 and self.parser.get_http_version() == "1.1":
            return BadRequestError(f"The request has {hosts} Host headers; HTTP/1.1 asks for exactly one.")
        encodings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if encodings and encodings != [b"chunked"]:
            return NotImplementedHereError("Transfer-Encoding may only be `chunked` here. Send the body uncompressed.")
        return None

    def _answer_outside(self, error: ServiceError) -> None:
        """An answer where no request could be read."""
        metrics.refused(error.reason)
        body = _body(error)
        head = STATUS_LINE[error.status] + b"".join(
            name + b": " + value + b"\r\n" for name, value in _headers(error, body)
        )
        if (cycle := self._answering) is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True  # this answer takes the place of its own
            cycle.message_event.set()
        # Closing with bytes unread would reset the connection, and the client might lose the answer.
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
