import asyncio
import time
from concurrent.futures import Future

import pytest
from starlette.requests import Request

from service.http.errors import BadRequestError, BusyError, QueueFullError, SlowBodyError, TooLargeError
from service.http.intake import Intake


def request(*messages, headers=()):
    waiting = list(messages)

    async def receive():
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    return Request({"type": "http", "method": "POST", "path": "/", "headers": list(headers)}, receive)


def part(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


def read(intake, asked):
    async def go():
        async with intake.body(asked) as body:
            return bytes(body.data), intake.held

    return asyncio.run(go())


def test_parts_are_joined_and_held_while_they_are_worked_on():
    intake = Intake(100, 100, 1)
    assert read(intake, request(part(b"ab", True), part(b""  , True), part(b"c"))) == (b"abc", 3)  # fmt: skip
    assert intake.held == 0


def test_no_body_is_an_empty_one():
    assert read(Intake(100, 100, 1), request(part(b""))) == (b"", 0)


@pytest.mark.parametrize(
    "asked",
    [
        lambda: request(part(b"x" * 11)),
        lambda: request(part(b"x" * 6, True), part(b"x" * 6)),
        lambda: request(part(b"x"), headers=[(b"content-length", b"11")]),
        lambda: request(part(b"x"), headers=[(b"content-length", b"9" * 5000)]),
        lambda: request(part(b"x" * 11), headers=[(b"content-length", b"2")]),
    ],
)
def test_a_body_over_the_limit_is_refused_whatever_it_announces(asked):
    intake = Intake(10, 100, 1)
    with pytest.raises(TooLargeError, match="10 bytes"):
        read(intake, asked())
    assert intake.held == 0


def test_what_is_still_coming_is_read_before_the_answer():
    asked = request(part(b"x" * 11, True), part(b"x", True), part(b"x"))
    with pytest.raises(TooLargeError):
        read(Intake(10, 100, 1), asked)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(asked.receive(), 0.05))  # nothing is left to receive


def test_all_bodies_together_are_bounded():
    intake = Intake(10, 15, 1)

    async def go():
        async with intake.body(request(part(b"x" * 10))):
            with pytest.raises(BusyError):
                async with intake.body(request(part(b"x" * 10))):
                    raise AssertionError
            async with intake.body(request(part(b"x" * 5))):
                pass

    asyncio.run(go())
    assert intake.held == 0


def test_a_body_that_stops_coming_is_given_up():
    with pytest.raises(SlowBodyError, match=r"0\.05 s"):
        read(Intake(10, 100, 0.05), request(part(b"x", True)))


@pytest.mark.parametrize(("pace", "patient"), [(1, True), (64 * 1024, False)])
def test_a_slow_body_is_waited_for_as_long_as_it_makes_progress(monkeypatch, pace, patient):
    monkeypatch.setattr("service.http.intake.PACE_BYTES", pace)
    parts = [part(b"x", True)] * 9 + [part(b"x")]

    async def receive():
        await asyncio.sleep(0.05)
        return parts.pop(0)

    slow = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    if patient:
        assert read(Intake(10, 100, 0.15), slow)[0] == b"x" * 10
    else:  # a client that sends single bytes slowly would hold memory forever
        with pytest.raises(SlowBodyError):
            read(Intake(10, 100, 0.15), slow)


def test_a_client_that_goes_away_leaves_nothing_held():
    intake = Intake(10, 100, 1)
    with pytest.raises(BadRequestError, match="went away"):
        read(intake, request(part(b"x", True), {"type": "http.disconnect"}))
    assert intake.held == 0


@pytest.mark.parametrize("times", [1, 3])
def test_a_loop_that_was_held_up_is_not_the_clients_fault(monkeypatch, times):
    monkeypatch.setattr("service.http.intake.GRACE_SECONDS", 0.05)
    waiting = [part(b"x" * 3)]

    async def receive():
        await came.wait()
        return waiting.pop(0)

    async def hold_up():
        for _ in range(times):
            time.sleep(0.2)  # blocks the event loop on purpose
            await asyncio.sleep(0.01)
        came.set()

    async def go():
        intake = Intake(10, 100, 0.05)
        asked = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
        holding = asyncio.create_task(hold_up())
        async with intake.body(asked) as body:
            await holding
            return bytes(body.data)

    came = asyncio.Event()
    assert asyncio.run(go()) == b"xxx"


def test_what_came_fast_at_the_beginning_does_not_excuse_silence_afterwards():
    async def receive():
        if not sent:
            sent.append(True)
            return part(b"x" * 2**20, True)
        return await asyncio.Event().wait()

    sent = []
    silent = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)

    async def go():
        async with asyncio.timeout(3):  # measured by the mean rate of the whole body, 17 × 0.3 s would be allowed
            async with Intake(2**21, 2**22, 0.3).body(silent):
                pass

    with pytest.raises(SlowBodyError):
        asyncio.run(go())


def test_large_bodies_leave_room_for_small_ones():
    large, small = 2**21, 2**10
    intake = Intake(large, 16 * 2**20, 1)

    async def go(held=0):
        if held < 7:
            async with intake.body(request(part(b"x" * large))):
                return await go(held + 1)
        with pytest.raises(BusyError):
            async with intake.body(request(part(b"x" * large))):
                raise AssertionError
        async with intake.body(request(part(b"x" * small))) as body:
            return len(body.data)

    assert asyncio.run(go()) == small
    assert intake.held == 0


def test_a_body_is_held_until_the_thread_that_uses_it_is_done():
    intake, work = Intake(10, 100, 1), Future()

    async def go():
        async with intake.body(request(part(b"abc"))) as body:
            body.used_by(work)
        assert intake.held == 3
        work.set_result(None)
        await asyncio.sleep(0.01)

    asyncio.run(go())
    assert intake.held == 0


def test_a_client_that_waits_to_be_asked_for_a_body_too_large_is_not_asked():
    asked = []

    async def receive():
        asked.append(True)
        return part(b"x")

    headers = [(b"content-length", b"99000000000"), (b"expect", b"100-continue")]
    with pytest.raises(TooLargeError):
        read(Intake(10, 100, 1), Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive))
    assert asked == []


def test_decoded_images_count_before_they_are_made_and_until_their_request_is_over():
    intake = Intake(100, 100, 1)

    async def go():
        async with intake.body(request(part(b"a"))) as first, intake.body(request(part(b"b"))) as second:
            intake.decode(first, 70)
            with pytest.raises(QueueFullError, match="MODEPATH_HELD_BYTES"):
                intake.decode(second, 31)
            intake.decode(second, 30)
            assert intake.decoded == 100
        assert intake.decoded == 0
        async with intake.body(request(part(b"a"))) as alone:
            intake.decode(alone, 1000)  # a request is accepted if no other is active: its own limits apply

    asyncio.run(go())
    assert intake.decoded == 0
