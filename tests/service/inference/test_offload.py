import asyncio
import threading

import pytest

from service.http.errors import QueueFullError
from service.http.intake import Body
from service.inference.offload import SMALL_PIXELS, Offload

LARGE = SMALL_PIXELS + 1


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_small_work_passes_large_images_that_wait():
    async def go():
        offload, release = Offload(2, 10 * LARGE), threading.Event()
        decoding = [asyncio.create_task(offload.decode(Body(), LARGE, release.wait)) for _ in range(5)]
        await asyncio.sleep(0)
        assert await offload.run(Body(), lambda: "parsed") == "parsed"
        assert await offload.decode(Body(), SMALL_PIXELS, lambda: "small") == "small"
        assert not any(one.done() for one in decoding)
        release.set()
        assert await asyncio.gather(*decoding) == [True] * 5
        await until(lambda: offload.pixels == 0)

    asyncio.run(go())


def test_pixels_that_wait_are_bounded_and_a_lone_request_is_always_taken():
    async def go():
        offload, release = Offload(1, LARGE), threading.Event()
        first = asyncio.create_task(offload.decode(Body(), 5 * LARGE, release.wait))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="MODEPATH_QUEUE_PIXELS"):
            await offload.decode(Body(), LARGE, lambda: None)
        release.set()
        await first
        await until(lambda: offload.pixels == 0)
        assert await offload.decode(Body(), LARGE, lambda: "decoded") == "decoded"

    asyncio.run(go())


def test_work_that_has_not_begun_is_withdrawn_with_its_request():
    async def go():
        offload, release, begun = Offload(1, 10 * LARGE), threading.Event(), []
        running = asyncio.create_task(offload.decode(Body(), LARGE, release.wait))
        waiting = asyncio.create_task(offload.decode(Body(), LARGE, lambda: begun.append(True)))
        await until(lambda: offload.pixels == 2 * LARGE)
        waiting.cancel()
        await until(lambda: offload.pixels == LARGE)
        release.set()
        await running
        assert await offload.decode(Body(), LARGE, lambda: "next") == "next"
        assert begun == []

    asyncio.run(go())


def test_a_request_whose_time_is_over_does_not_wait_for_its_thread_which_stays_counted():
    async def go():
        offload, release, body = Offload(1, 10 * LARGE), threading.Event(), Body()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await offload.decode(body, LARGE, release.wait)
        assert (offload.pixels, body.unfinished() is not None) == (LARGE, True)
        release.set()
        await until(lambda: offload.pixels == 0)
        assert body.unfinished() is None

    asyncio.run(go())
