"""Reading bodies: each within its limit and at its pace, and all together within what the worker may hold."""

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
SMALL_BYTES = 2**20  # bodies up to this size find room where larger ones do not:
RESERVE = 1 / 8  # of the bytes that may be held


class Body:
    """A request's body in memory."""

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""
        self.decoded = 0  # bytes that its images take
        self._works: list[Future[Any]] = []

    def add(self, part: bytes) -> None:
        """Append a part. Most bodies come in one; of those that come byte by byte no part is kept as an object."""
        if not self.data:
            self.data = part
        elif isinstance(self.data, bytearray):
            self.data += part
        else:
            self.data = bytearray(self.data) + part

    def used_by(self, work: Future[Any]) -> None:
        """Count it as held until this work is done, also if its request is over before."""
        self._works.append(work)

    def unfinished(self) -> Future[Any] | None:
        """The work that still uses it. A request does one thing after the other, so there is at most one."""
        return next((work for work in self._works if not work.done()), None)


class Intake:
    """Counts the bytes of all bodies that are being read or worked on, and of the images in them. Lives on one event loop."""

    def __init__(self, body_bytes: int, held_bytes: int, stall_seconds: float):
        """Set the limits.

        Args:
            body_bytes: one body.
            held_bytes: all bodies together, and again all decoded images; of bodies, the last eighth is kept for those of at most 1 MiB.
            stall_seconds: how long a body may take for its beginning, and for every 64 KiB after it.
        """
        self._body_bytes = body_bytes
        self._held_bytes = held_bytes
        self._stall_seconds = stall_seconds
        self.held = 0
        self.decoded = 0
        self._lock = threading.Lock()  # of the last: threads decode

    def decode(self, body: Body, size: int) -> None:
        """Before its images are decoded, in any thread: count their bytes until the request is over.

        Raises:
            QueueFullError: together with those of other requests it is more than may be held.
        """
        with self._lock:
            if self.decoded and self.decoded + size > self._held_bytes:
                raise QueueFullError(
                    f"Decoded images of {self.decoded} bytes wait already (MODEPATH_HELD_BYTES: {self._held_bytes}). Try again later, or send fewer at a time."
                )
            self.decoded += size
            body.decoded += size

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncGenerator[Body]:
        """The body of a request; its bytes count as held until the block ends and no thread uses them.

        Raises:
            TooLargeError: it is larger than a body may be, whatever Content-Length says.
            BusyError: together with the others it is more than may be held.
            SlowBodyError: it came too slowly, or stopped.
            BadRequestError: the client went away in the middle.
        """
        body = Body()
        try:
            await self._read(request, body)
            yield body
        finally:
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
        with contextlib.suppress(RuntimeError):  # the service is going down, and its loop is closed
            loop.call_soon_threadsafe(self._release, body)

    async def _read(self, request: Request, body: Body) -> None:
        more = True
        try:
            # Announced too large: told at once. Content-Length may also be missing or lie, so bytes are counted as they come.
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
                body.add(part)
                self.held += len(part)
                size = len(body.data)
                if size > self._body_bytes:
                    raise TooLargeError(self._too_large())
                if self.held > self._held_bytes * (1 if size <= SMALL_BYTES else 1 - RESERVE):
                    raise BusyError("The service holds as many bytes of requests as it may. Try again in a second.")
                # A byte now and then is no progress, and what came fast before is none either: held bytes would never be given back.
                if size - paced >= PACE_BYTES:
                    paced, deadline = size, loop.time() + self._stall_seconds
        except TimeoutError:
            raise SlowBodyError(
                f"The body came too slowly: {PACE_BYTES} bytes may take {self._stall_seconds:g} s. Is Content-Length larger than what was sent?"
            ) from None
        except (TooLargeError, BusyError):
            # A client that waits to be asked for its body has sent nothing yet.
            if more and "expect" not in request.headers:
                await drain(request.receive)
            raise

    def _too_large(self) -> str:
        return f"The body is larger than {self._body_bytes} bytes; send fewer images at a time."


async def _receive(request: Request, deadline: float) -> Message:
    """The next message. It is late only if the loop was on time to see that: another request's parsing may hold it up."""
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
    """Read on for a moment: a client that is still sending may not look at the answer, and closing under it would throw the answer away."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            more = True
            while more:
                message = await receive()
                more = message.get("more_body", False)
