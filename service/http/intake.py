"""Reads bodies. Each has a size limit and a minimum pace; all together are bounded by what the worker may hold."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Receive

from service.http.errors import BadRequestError, BusyError, QueueFullError, SlowBodyError, TooLargeError

DRAIN_SECONDS = 0.5
GRACE_SECONDS = 0.25
GRACES = 8
ON_TIME_SECONDS = 0.02
PACE_BYTES = 64 * 1024
SMALL_BYTES = 2**20  # bodies up to this size may also use the reserve
RESERVE = 1 / 8  # share of the bytes that may be held


class Body:
    """A request's body in memory."""

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        self.decoded = 0  # size of its decoded images, in bytes
        self._works: list[Future[Any]] = []

    def add(self, part: bytes) -> None:
        """Append a part. Most bodies arrive as one part; of several parts none is kept as an object of its own."""
        if not self.data:
            self.data = part
        elif isinstance(self.data, bytearray):
            self.data += part
        else:
            self.data = bytearray(self.data) + part

    def used_by(self, work: Future[Any]) -> None:
        """Count the body as held until this work is done, even if its request ends earlier."""
        self._works.append(work)

    def unfinished(self) -> Future[Any] | None:
        """Return the work that still uses the body, or None. Requests do one step at a time, so at most one exists."""
        return next((work for work in self._works if not work.done()), None)


class Intake:
    """Counts the bytes of all bodies that are being read or processed, and of their decoded images.

    An instance belongs to one event loop.
    """

    def __init__(self, body_bytes: int, held_bytes: int, stall_seconds: float):
        """Set the limits.

        Args:
            body_bytes: largest size of one body.
            held_bytes: largest total size of all bodies, and again of all decoded images. The last eighth for bodies is
                reserved for those of at most 1 MiB.
            stall_seconds: time that the first 64 KiB of a body, and each further 64 KiB, may take.
        """
        self._body_bytes = body_bytes
        self._held_bytes = held_bytes
        self._stall_seconds = stall_seconds
        self.held = 0
        self.decoded = 0
        self._lock = threading.Lock()  # guards `decoded`, which threads change

    def decode(self, body: Body, size: int) -> None:
        """Count the bytes of a request's images until the request ends. Called before they are decoded, in any thread.

        Raises:
            QueueFullError: together with the images of other requests, they exceed the limit.
        """
        with self._lock:
            if self.decoded and self.decoded + size > self._held_bytes:
                raise QueueFullError(
                    f"{self.decoded} bytes of decoded images are waiting (MODEPATH_HELD_BYTES: {self._held_bytes}). Try again later, or send fewer images at a time."
                )
            self.decoded += size
            body.decoded += size

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncGenerator[Body]:
        """Read the body of a request. Its bytes count as held until the block ends and no thread uses them.

        Raises:
            TooLargeError: the body exceeds its limit, by its Content-Length or by the bytes received.
            BusyError: together with the other bodies it exceeds the limit on held bytes.
            SlowBodyError: it arrived too slowly, or stopped.
            BadRequestError: the client disconnected before the end.
        """
        body = Body()
        try:
            await self._read(request, body)
            yield body
        finally:
            self._end(body)

    @contextlib.asynccontextmanager
    async def holding(self, data: bytes) -> AsyncGenerator[Body]:
        """Count a body that has arrived as a whole as held until the block ends and no thread uses it.

        Raises:
            BusyError: together with the other bodies it exceeds the limit on held bytes.
        """
        body = Body()
        try:
            self._add(body, data)
            yield body
        finally:
            self._end(body)

    def _add(self, body: Body, part: bytes) -> None:
        body.add(part)
        self.held += len(part)
        size = len(body.data)
        if size > self._body_bytes:
            raise TooLargeError(self._too_large())
        if self.held > self._held_bytes * (1 if size <= SMALL_BYTES else 1 - RESERVE):
            raise BusyError("The service holds as many bytes of requests as it may. Try again in a second.")

    def _end(self, body: Body) -> None:
        if (work := body.unfinished()) is None:
            self._release(body)
        else:
            loop = asyncio.get_running_loop()
            work.add_done_callback(lambda _: self._release_later(loop, body))

    def _release(self, body: Body) -> None:
        self.held -= len(body.data)
        with self._lock:
            self.decoded -= body.decoded

    def _release_later(self, loop: asyncio.AbstractEventLoop, body: Body) -> None:
        with contextlib.suppress(RuntimeError):  # the service is shutting down, and its loop is closed
            loop.call_soon_threadsafe(self._release, body)

    async def _read(self, request: Request, body: Body) -> None:
        more = True
        try:
            # A Content-Length over the limit is refused at once. It may also be missing or wrong, so bytes are counted
            # as they arrive.
            announced = request.headers.get("content-length", "")
            if announced.isdecimal() and int(announced[:20]) > self._body_bytes:
                raise TooLargeError(self._too_large())
            loop = asyncio.get_running_loop()
            paced, deadline = 0, loop.time() + self._stall_seconds
            while more:
                message = await _receive(request, deadline)
                if message["type"] == "http.disconnect":
                    raise BadRequestError("The client went away before its body was complete.")
                more = message.get("more_body", False)
                part: bytes = message.get("body", b"")
                self._add(body, part)
                size = len(body.data)
                # Only another 64 KiB extends the deadline. A client that sends single bytes, even after a fast start,
                # would otherwise hold memory for ever.
                if size - paced >= PACE_BYTES:
                    paced, deadline = size, loop.time() + self._stall_seconds
        except TimeoutError:
            raise SlowBodyError(
                f"The body came too slowly: {PACE_BYTES} bytes may take {self._stall_seconds:g} s. Is Content-Length larger than what was sent?"
            ) from None
        except (TooLargeError, BusyError):
            # A client that sent `Expect: 100-continue` has not sent its body yet, so there is nothing to drain.
            if more and "expect" not in request.headers:
                await drain(request.receive)
            raise

    def _too_large(self) -> str:
        return f"The body is larger than {self._body_bytes} bytes; send fewer images at a time."


async def _receive(request: Request, deadline: float) -> Message:
    """Return the next message, or raise TimeoutError after the deadline.

    If the event loop itself was late, for example because another request was being parsed, the client gets more time.
    """
    loop = asyncio.get_running_loop()
    graces = GRACES
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                return await request.receive()
        except TimeoutError:
            if graces == 0 or loop.time() - deadline < ON_TIME_SECONDS:
                raise
            graces -= 1
            deadline = loop.time() + GRACE_SECONDS


async def drain(receive: Receive) -> None:
    """Keep reading for up to DRAIN_SECONDS after a refusal.

    A client that is still sending may not read the answer yet, and closing the connection would discard the answer.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message.get("more_body", False)
