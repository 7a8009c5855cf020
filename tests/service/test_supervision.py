import asyncio
import os
import signal
from types import SimpleNamespace

import pytest
from circus.exc import ConflictError

from service import supervision


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Loop:
    """As much of tornado's as is used."""

    def add_callback_from_signal(self, callback, *args):
        callback(*args)

    def call_later(self, seconds, callback, *args):
        assert seconds > 0
        asyncio.run(callback(*args))


class Arbiter:
    looked = 0
    busy = False

    async def manage_watchers(self):
        self.looked += 1
        if self.busy:
            raise ConflictError


class Supervisor:
    """As circus takes signals: with a bound method of what holds its controller."""

    def __init__(self, arbiter):
        self.controller = SimpleNamespace(loop=Loop(), arbiter=arbiter)

    def signal(self, number, frame):
        raise AssertionError


@pytest.mark.parametrize("busy", [False, True])
def test_the_supervisor_looks_when_a_child_ends(handlers, busy):
    arbiter = Arbiter()
    arbiter.busy = busy
    signal.signal(signal.SIGTERM, Supervisor(arbiter).signal)
    supervision.replace_dead_workers()
    os.kill(os.getpid(), signal.SIGCHLD)
    assert arbiter.looked == 1


@pytest.mark.parametrize("other", [signal.SIG_DFL, lambda number, frame: None])
def test_another_supervisor_is_left_alone(handlers, other):
    signal.signal(signal.SIGTERM, other)
    supervision.replace_dead_workers()
    os.kill(os.getpid(), signal.SIGCHLD)
