"""Shutdown: new connections, and those that still wait for a worker, are answered with 503 instead of being reset.

The process that starts the workers owns the socket that they listen on. Once it has asked the workers to end, they
accept no more connections. It then accepts connections itself until the workers have finished their requests, and
closes the socket when no connection waits.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Sequence

from service.http.errors import StoppingError

MAX_HEAD = 64 * 1024
HEAD_SECONDS = 5.0  # time that a client may take for its headers
LINGER_SECONDS = 2.0  # time that a client may take to read the answer while it is still sending its body
SETTLE_SECONDS = 0.05
SETTLES = 20

_error = StoppingError("The service is about to end. Try again in a second: another one may answer.")
_body = json.dumps({"error": str(_error)}).encode()
_head = (
    f"HTTP/1.1 {_error.status} Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(_body)}\r\n"
    f"retry-after: {_error.retry_after}\r\nconnection: close\r\n\r\n"
).encode()


class Refusals:
    """Refuses all connections to listening sockets."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._open: set[_Refusal] = set()
        self.count = 0

    async def begin(self, listeners: Sequence[socket.socket], backlog: int) -> None:
        """Start to accept and refuse connections."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            copy = socket.socket(fileno=os.dup(listener.fileno()))
            self._servers.append(await loop.create_server(self._accept, sock=copy, backlog=backlog))

    async def end(self, listeners: Sequence[socket.socket]) -> None:
        """Refuse the connections that still wait, and close the sockets. Call it when no worker accepts any more."""
        for _ in range(SETTLES):
            before = self.count
            await asyncio.sleep(SETTLE_SECONDS)
            if self.count == before:
                break
        for server in self._servers:
            server.close()
        for listener in listeners:
            listener.close()
        deadline = asyncio.get_running_loop().time() + LINGER_SECONDS
        while self._open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(SETTLE_SECONDS)
        for connection in list(self._open):
            connection.close()

    def _accept(self) -> _Refusal:
        self.count += 1
        connection = _Refusal(self._open)
        self._open.add(connection)
        return connection


class _Refusal(asyncio.Protocol):
    """One connection: waits for the headers, answers, and discards all further bytes.

    Closing a socket with unread bytes resets it, and the client may lose the answer.
    """

    def __init__(self, open_ones: set[_Refusal]):
        self._open = open_ones
        self._received = b""
        self._answered = False
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the headers."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.close)

    def data_received(self, data: bytes) -> None:
        """Answer when the headers are complete."""
        if self._answered:
            return
        self._received += data
        if b"\r\n\r\n" not in self._received and len(self._received) < MAX_HEAD:
            return
        assert self._transport is not None
        self._answered = True
        self._transport.write(_head if self._received.startswith(b"HEAD ") else _head + _body)
        self._transport.write_eof()
        self._wait(LINGER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the open ones."""
        self._open.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def _wait(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.close)
