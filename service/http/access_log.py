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
            line = {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "client": (scope.get("client") or [None])[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - started, 6),
                "bytes": sent,
                **fields,
            }
            short = {name: value[:MAX_FIELD] if isinstance(value, str) else value for name, value in line.items()}
            # JSON escapes line breaks that a client sends, so that it cannot forge log lines.
            log_writer(1).write(orjson.dumps(short, option=orjson.OPT_APPEND_NEWLINE))
