import asyncio
import json
import socket

import pytest

from service.operations import stopping
from service.operations.stopping import Refusals

REQUEST = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield listener


async def ask(listener, *parts):
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.01)
    answer = await reader.read()
    writer.close()
    return answer


def test_what_waits_and_what_comes_is_refused_with_a_status_a_reason_and_when_to_come_again(listener):
    async def go():
        address = listener.getsockname()
        waiting = [await asyncio.open_connection(*address) for _ in range(40)]
        for _, writer in waiting:
            writer.write(REQUEST)
        refusals = Refusals()
        await refusals.begin([listener], 100)
        answers = [await reader.read() for reader, _ in waiting]
        answers.append(await ask(listener, REQUEST[:10], REQUEST[10:]))
        answers.append(await ask(listener, b"POST / HTTP/1.1\r\nContent-Length: 3000000\r\n\r\n", bytes(3_000_000)))
        bodiless = await ask(listener, REQUEST.replace(b"GET", b"HEAD"))
        late = [await asyncio.open_connection(*address) for _ in range(40)]
        for _, writer in late:
            writer.write(REQUEST)
        silent = await asyncio.open_connection(*address)
        await refusals.end([listener])
        answers += [await reader.read() for reader, _ in late]
        assert await silent[0].read() == b""  # ended, not reset
        for answer in answers:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert {b"connection: close", b"retry-after: 1", b"content-length: %d" % len(body)} <= set(
                head.split(b"\r\n")
            )
            assert set(json.loads(body)) == {"error"}
        assert bodiless == answers[0].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        for _, writer in (*waiting, *late, silent):
            writer.close()

    asyncio.run(go())


def test_a_client_that_says_nothing_is_not_waited_for(listener, monkeypatch):
    monkeypatch.setattr(stopping, "HEAD_SECONDS", 0.05)

    async def go():
        refusals = Refusals()
        await refusals.begin([listener], 100)
        assert await ask(listener) == b""
        await refusals.end([listener])

    asyncio.run(go())
