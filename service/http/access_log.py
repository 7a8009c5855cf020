"""The access log: one JSON line per request on stdout, if MODEPATH_ACCESS_LOG=true."""

from __future__ import annotations

import datetime
import time
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.operations.log_writer import log_writer

MAX_FIELD = 200  # characters


class AccessLog:
    """Middleware that writes a line when the answer is complete, or when its client has disconnected.

    An endpoint adds fields to the line through the dictionary scope["log_fields"].
    """

    def __init__(self, inner: ASGIApp):
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log its answer."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started = time.perf_counter()
        fields: dict[str, Any] = {}
        scope["log_fields"] = fields
        status = 0
        sent = 0

        async def watched(message: Message) -> None:
            nonlocal status, sent
            status = message.get("status", status)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._inner(scope, receive, watched)
        finally:
            client, seconds = (scope.get("client") or [None])[0], time.perf_counter() - started
            write_line(client, scope["method"], scope["path"], status, seconds, sent, fields)


def write_line(
    client: str | None, method: str, path: str, status: int | str, seconds: float, sent: int, fields: dict[str, Any]
) -> None:
    """Write the line of one request.

    Args:
        client: its address.
        method: of HTTP, or gRPC.
        path: of the request; over gRPC that of the same request over HTTP.
        status: of the answer.
        seconds: from the request's head to the end of its answer.
        sent: bytes of the answer.
        fields: further ones.
    """
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "client": client, "method": method, "path": path, "status": status, "seconds": round(seconds, 6), "bytes": sent, **fields,
    }  # fmt: skip
    short = {name: value[:MAX_FIELD] if isinstance(value, str) else value for name, value in line.items()}
    # JSON escapes line breaks that a client sends, so that it cannot forge log lines.
    log_writer(1).write(orjson.dumps(short, option=orjson.OPT_APPEND_NEWLINE))
