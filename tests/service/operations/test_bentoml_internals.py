"""Each change to BentoML, circus and uvicorn: that it is applied, and what happens without it."""

import asyncio
import logging
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import uvicorn
from circus.arbiter import Arbiter
from circus.exc import ConflictError

from service.operations import bentoml_internals
from tests.conftest import ROOT

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def messages(monkeypatch):
    said = []
    monkeypatch.setattr(bentoml_internals.log, "error", lambda message, *values: said.append(message % values))
    return said


def test_what_does_not_look_as_it_did_is_left_alone_and_named(messages):
    class Part:
        def known(self, a, b):
            return a + b

    def doubled(original):
        return lambda self, a, b: 2 * original(self, a, b)

    assert not bentoml_internals.change(Part, "known", doubled, ["self", "a"])
    assert not bentoml_internals.change(Part, "unknown", doubled, ["self"])
    assert Part().known(1, 2) == 3
    assert len(messages) == 2
    assert "Part.known differs from the versions" in messages[0]
    assert bentoml_internals.change(Part, "known", doubled, ["self", "a", "b"])
    assert Part().known(1, 2) == 6


def test_everything_that_is_changed_looks_as_it_did_in_the_tested_versions(messages, monkeypatch):
    for owner, name in (
        (uvicorn.Server, "shutdown"), (Arbiter, "initialize"), (Arbiter, "stop"), (Arbiter, "_stop_watchers"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that monkeypatch restores it
    bentoml_internals.end_gently(1, lambda: None, lambda: None)
    bentoml_internals.supervise(None, lambda living: None)
    assert not messages


def in_a_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
        env={"PATH": "/usr/bin", "BENTOML_HOME": "/tmp/none", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return done.stdout.split()


TRACKS = """
from bentoml._internal.utils.analytics.usage_stats import do_not_track
do_not_track()  # as BentoML's command does, before it imports a service
import os, service.operations.bentoml_internals, models_store
print(do_not_track(), os.environ["ORT_DISABLE_TELEMETRY"])
"""


def test_nobody_is_reported_to_unless_the_user_wants_it():
    assert in_a_process(TRACKS) == ["True", "1"]
    assert in_a_process(TRACKS, BENTOML_DO_NOT_TRACK="False", ORT_DISABLE_TELEMETRY="0") == ["False", "0"]


def test_a_request_leaves_no_timer_of_bentoml_behind():
    code = """
import service.bento
from bentoml._internal.server.http.traffic import TimeoutMiddleware
app = object()
print(TimeoutMiddleware(app, timeout=60) is app)
"""
    assert in_a_process(code) == ["True"]


class Served:
    """A uvicorn server in a thread, listening on an existing socket, as BentoML runs it."""

    def __init__(self, app, listener):
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_keep_alive=30))
        self.address = listener.getsockname()
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()

    def connect(self):
        return socket.create_connection(self.address, timeout=30)


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "shutdown", uvicorn.Server.shutdown)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", True)
    made = []

    def served(app, grace_seconds):
        ended = []
        bentoml_internals.end_gently(grace_seconds, lambda: None, lambda: ended.append(True))
        made.append(Served(app, socket.create_server(("127.0.0.1", 0))))
        made[-1].ended = ended
        return made[-1]

    yield served
    for one in made:
        one.server.should_exit = True
        one.thread.join(30)
        assert not one.thread.is_alive()


async def answers(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def never_answers(scope, receive, send):
    if scope["type"] == "http":
        await asyncio.sleep(1000)


def received(connection):
    found = b""
    while part := connection.recv(4096):
        found += part
    return found


def test_requests_that_are_on_their_way_when_a_worker_is_to_end_are_answered(served, monkeypatch):
    monkeypatch.setattr(bentoml_internals, "IDLE_SECONDS", 10.0)
    one = served(answers, 30)
    with one.connect() as new, one.connect() as kept, one.connect() as begun:
        kept.sendall(REQUEST)
        assert kept.recv(4096)
        begun.sendall(REQUEST[:10])
        one.connect().close()  # once this one is accepted, so are the others
        one.server.should_exit = True
        while not one.server.servers or one.server.servers[0].is_serving():
            threading.Event().wait(0.01)
        for connection, rest in ((new, REQUEST), (kept, REQUEST), (begun, REQUEST[10:])):
            connection.sendall(rest)
            answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 200 ")
    one.thread.join(30)
    assert one.ended == [True]


def test_a_worker_does_not_wait_for_ever_for_a_request(served):
    one = served(never_answers, 1)
    with one.connect() as connection:
        connection.sendall(REQUEST)
        while not one.server.server_state.tasks:
            threading.Event().wait(0.01)
        one.server.should_exit = True
        one.thread.join(30)
        assert not one.thread.is_alive()


def test_a_signal_that_comes_while_workers_are_started_is_not_lost():
    later = []
    arbiter = SimpleNamespace(loop=SimpleNamespace(call_later=lambda seconds, call: later.append(call)), busy=True)

    def original(self):
        if self.busy:
            raise ConflictError
        return "stopped"

    arbiter.stop = lambda: bentoml_internals._stop(original)(arbiter)
    assert arbiter.stop() is None
    arbiter.busy = False
    assert [call() for call in later] == ["stopped"]
