"""One HTTP/1.1 connection: uvicorn's protocol, with the limits that it lacks.

A request's head has a bounded size and must come in time, idle connections give way when descriptors run short, and what
cannot be framed without doubt is refused in the service's own form. Tested with uvicorn 0.54 and httptools 0.6 and 0.7.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any, cast

import httptools
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import metrics
from service.errors import BadRequestError, BusyError, NotImplementedHereError, ServiceError, TooLargeHeadersError
from service.settings import settings

MAX_HEADERS = 100
RESERVED_DESCRIPTORS = 128  # for files, models and logs
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
        self._head_bytes = 0  # raw, while the head is not complete
        self._header_bytes = 0  # parsed
        self._in_head = True
        self._refusal: ServiceError | None = None
        self._late: asyncio.TimerHandle | None = None
        self._resumed = False  # a second parser reads the body, after a head that asks for another protocol

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
        super().connection_lost(exc)
        if (cycle := self._current) is not None and not cycle.response_complete and (left := cycle.scope.get(LEFT)):
            left()

    def _make_room(self) -> None:
        # Only where descriptors run short: looking at a thousand connections takes 0.1 ms.
        others = cast("set[Connection]", self.connections - {self})
        idle = [one for one in others if one.is_idle()]
        if idle:
            min(idle, key=lambda one: one._since).transport.close()
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

    # Its bytes

    def data_received(self, data: bytes) -> None:
        """Feed the parser; refuse a head that is too long before it is complete."""
        self._unset_keepalive_if_required()
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if self._refusal is None and not self.transport.is_closing():
                self.send_400_response("")
            return
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > self._head_limit:
            self._answer_outside(_too_large())
        elif self._late is None and (self._head_bytes if self._in_head else self.is_idle()):
            # A head that has begun, or the rest of a body whose request was answered already.
            self._late = self.loop.call_later(self._head_seconds, self._head_is_late)

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed at all."""
        self._answer_outside(BadRequestError("The request is not HTTP/1.1. Is it HTTPS or HTTP/2, or a broken client?"))

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """A server may ignore an offer of another protocol, but httptools stops at its head: read the body with a new parser."""
        framing = [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        if not framing or self._refusal is not None:
            return
        self.parser = httptools.HttpRequestParser(self)
        self._resumed = True
        head = b"".join(name + b": " + value + b"\r\n" for name, value in framing)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
        self._resumed = False
        if rest:
            self.parser.feed_data(rest)

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
        """See httptools."""
        if self._resumed or self._refusal is not None:
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

    def on_message_complete(self) -> None:
        """Go on reading, or nobody would see that the client leaves while its answer is made."""
        if self.parser.should_upgrade() and any(
            name in (b"content-length", b"transfer-encoding") for name, _ in self.headers
        ):
            return  # its body is still to be read
        super().on_message_complete()
        self._in_head = True
        if not self.pipeline:
            self.flow.resume_reading()

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
        self.transport.write(head + b"\r\n" + body)
        self.transport.close()


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
        body = _body(self._error)
        head = {"type": "http.response.start", "status": self._error.status, "headers": _headers(self._error, body)}
        await send(head)
        await send({"type": "http.response.body", "body": body})
