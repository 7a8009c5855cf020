"""Reading bodies: each within its limit and at its pace, and all together within what the worker may hold."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.types import Message

from service.errors import BadRequestError, BusyError, SlowBodyError, TooLargeError

DRAIN_SECONDS = 0.5
GRACE_SECONDS = 0.25
GRACES = 8
ON_TIME_SECONDS = 0.02
PACE_BYTES = 64 * 1024


class Intake:
    """Counts the bytes of all bodies that are being read or worked on. Lives on one event loop."""

    def __init__(self, body_bytes: int, held_bytes: int, stall_seconds: float):
        """Set the limits.

        Args:
            body_bytes: one body.
            held_bytes: all bodies together.
            stall_seconds: how long a body may take for its beginning, and for every 64 KiB.
        """
        self._body_bytes = body_bytes
        self._held_bytes = held_bytes
        self._stall_seconds = stall_seconds
        self.held = 0

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncGenerator[bytes]:
        """The body of a request; its bytes count as held until the block ends.

        Raises:
            TooLargeError: it is larger than a body may be, whatever Content-Length says.
            BusyError: together with the others it is more than may be held.
            SlowBodyError: it came too slowly, or stopped.
            BadRequestError: the client went away in the middle.
        """
        parts: list[bytes] = []
        try:
            await self._read(request, parts)
            yield parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            self.held -= sum(map(len, parts))

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        more = True
        try:
            # Announced too large: told at once. Content-Length may also be missing or lie, so bytes are counted as they come.
            announced = request.headers.get("content-length", "")
            if announced.isdecimal() and int(announced[:20]) > self._body_bytes:
                raise TooLargeError(self._too_large())
            taken = 0
            began = asyncio.get_running_loop().time()
            while more:
                # A byte now and then is no progress: held bytes would never be given back.
                deadline = began + self._stall_seconds * (1 + taken / PACE_BYTES)
                message = await _receive(request, deadline)
                if message["type"] == "http.disconnect":
                    raise BadRequestError("The client went away before its body was complete.")
                more = message.get("more_body", False)
                part: bytes = message.get("body", b"")
                parts.append(part)
                taken += len(part)
                self.held += len(part)
                if taken > self._body_bytes:
                    raise TooLargeError(self._too_large())
                if self.held > self._held_bytes:
                    raise BusyError("The service holds as many bytes of requests as it may. Try again in a second.")
        except TimeoutError:
            raise SlowBodyError(
                f"The body came too slowly: {PACE_BYTES} bytes may take {self._stall_seconds:g} s. Is Content-Length larger than what was sent?"
            ) from None
        except (TooLargeError, BusyError):
            if more:
                await _drain(request)
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


async def _drain(request: Request) -> None:
    # A client that is still sending may not look at the answer, and closing under it would throw the answer away.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            more = True
            while more:
                message = await request.receive()
                more = message.get("more_body", False)
