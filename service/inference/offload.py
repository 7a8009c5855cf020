"""Work that would block the event loop: run in threads, bounded before it starts, withdrawn when its request ends.

There are two lanes. Decoding a large encoded image takes up to half a second and must not delay parsing, small images
and answers. A thread cannot be stopped: its work stays counted until it is done, but the request does not wait for it.
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
SMALL_PIXELS = 2**18  # 512 × 512, decoded within a few milliseconds


class Offload:
    """The threads of one worker, other than those that run members."""

    def __init__(self, threads: int, queue_pixels: int):
        """Create the lanes; their threads start with the first work.

        Args:
            threads: number of threads for parsing and answers. Large images get one thread less, but at least one.
            queue_pixels: largest number of pixels of large images that wait to be decoded, or are being decoded.
        """
        self._light = ThreadPoolExecutor(max(2, threads), "light")
        self._heavy = ThreadPoolExecutor(max(1, threads - 1), "decode")
        self._queue_pixels = queue_pixels
        self._lock = threading.Lock()
        self.pixels = 0

    async def run(self, body: Body, work: Callable[[], T]) -> T:
        """Run work that takes a few milliseconds in a thread, and return its result."""
        return await _awaited(body, self._light.submit(work))

    async def decode(self, body: Body, pixels: int, work: Callable[[], T]) -> T:
        """Run the decoding of images with `pixels` pixels in a thread, and return its result.

        Raises:
            QueueFullError: other large images are waiting, and together they exceed the limit.
        """
        if pixels <= SMALL_PIXELS:
            return await self.run(body, work)
        with self._lock:
            if self.pixels and self.pixels + pixels > self._queue_pixels:
                raise QueueFullError(
                    f"{self.pixels} pixels are waiting to be decoded (MODEPATH_QUEUE_PIXELS: {self._queue_pixels}). Try again later, or send smaller images."
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
    # Cancelling the awaited future also cancels work that has not started.
    return await asyncio.wrap_future(future)
