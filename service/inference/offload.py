"""Work that would hold up the event loop: done in threads, bounded before it begins, withdrawn when its request is over.

Two lanes: decoding large encoded images takes up to half a second each, and must not stand before parsing, small images
and answers. A thread cannot be stopped; what it works on stays counted until it is done, but its request does not wait for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from service.http.errors import QueueFullError
from service.http.intake import Body

T = TypeVar("T")
SMALL_PIXELS = 2**18  # 512 × 512: decoded within some milliseconds


class Offload:
    """The threads of one worker, other than those that run members."""

    def __init__(self, threads: int, queue_pixels: int):
        """Start nothing yet.

        Args:
            threads: for parsing and answers; large images get one less, but at least one.
            queue_pixels: of large images that may wait to be decoded, or are being decoded.
        """
        self._light = ThreadPoolExecutor(max(2, threads), "light")
        self._heavy = ThreadPoolExecutor(max(1, threads - 1), "decode")
        self._queue_pixels = queue_pixels
        self._lock = threading.Lock()
        self.pixels = 0

    async def run(self, body: Body, work: Callable[[], T]) -> T:
        """Do something that takes some milliseconds, in a thread."""
        return await _awaited(body, self._light.submit(work))

    async def decode(self, body: Body, pixels: int, work: Callable[[], T]) -> T:
        """Decode images of so many pixels.

        Raises:
            QueueFullError: others wait already, and together it would be too much.
        """
        if pixels <= SMALL_PIXELS:
            return await self.run(body, work)
        with self._lock:
            if self.pixels and self.pixels + pixels > self._queue_pixels:
                raise QueueFullError(
                    f"{self.pixels} pixels wait to be decoded (MODEPATH_QUEUE_PIXELS: {self._queue_pixels}). Try again later, or send smaller images."
                )
            self.pixels += pixels
        future = self._heavy.submit(work)
        future.add_done_callback(lambda _: self._done(pixels))
        return await _awaited(body, future)

    def _done(self, pixels: int) -> None:
        with self._lock:
            self.pixels -= pixels


async def _awaited(body: Body, future: Future[T]) -> T:
    body.used_by(future)
    # Cancelled, it withdraws the work if that has not begun.
    return await asyncio.wrap_future(future)
