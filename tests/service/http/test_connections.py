"""Unexpected bytes before, after and instead of a request, sent to a real server."""

import contextlib
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from models_store.store import Store
from tests.onnx_members import SHAPE, publish
from tests.service.conftest import Server

HEAD_SECONDS = 2
STALL_SECONDS = 2
IMAGE = {"inputs": np.full((1, *SHAPE), 0.5).tolist()}
BODY = json.dumps(IMAGE).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connections")
    store = Store(folder / "store")
    publish(store, "animals", seeds=range(12))
    limits = {"MODEPATH_HEAD_SECONDS": str(HEAD_SECONDS), "MODEPATH_STALL_SECONDS": str(STALL_SECONDS)}
    running = Server(store, folder, **limits)
    running.until(200)
    yield running
    assert running.stop() == 0
    log = running.log.read_text()
    assert "Traceback" not in log, log
    assert "ERROR" not in log, log


@contextlib.contextmanager
def connected(server, timeout=30):
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout) as connection:
        yield connection


def read(connection):
    with contextlib.closing(http.client.HTTPResponse(connection)) as response:
        response.begin()
        return response, json.loads(response.read())


def ask(server, request):
    """Send bytes and read one response."""
    with connected(server) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        response, body = read(connection)
        return response.status, body


def head(*lines, body=BODY):
    return "\r\n".join(["POST /predict HTTP/1.1", *lines]).encode() + b"\r\n\r\n" + body


JSON = ("Content-Type: application/json", f"Content-Length: {len(BODY)}")
HOST = "Host: localhost"


@pytest.mark.parametrize(
    ("request_bytes", "status", "message"),
    [
        (head(*JSON), 400, "0 Host headers"),
        (head(HOST, HOST, *JSON), 400, "2 Host headers"),
        (head("Host: evil.example", *JSON), 421, "MODEPATH_HOSTS"),
        (head(HOST, "Content-Type: application/json", "Transfer-Encoding: gzip, chunked"), 501, "chunked"),
        (head(HOST, *JSON, "X: " + "a" * 40_000), 431, "Send fewer headers"),
        (head(HOST, *JSON, *(f"X-{i}: a" for i in range(200))), 431, "100 headers"),
        (head(HOST, "Content-Encoding: gzip", *JSON), 415, "Content-Encoding"),
        (head(HOST, "Transfer-Encoding: chunked", body=b"ZZZ\r\n"), 400, "not HTTP/1.1"),
        (head(HOST, "Connection: Upgrade", "Upgrade: h2c", "Transfer-Encoding: chunked", body=b"ZZZ\r\n"), 400, "not HTTP/1.1"),
        (head(HOST, HOST, "Content-Length: 5000000", body=bytes(5_000_000)), 400, "2 Host headers"),
        (b"X: " + b"a" * 2_000_000, 400, "not HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "HTTPS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "HTTP/2"),
        (head(HOST, "Content-Type: application/json", "Content-Length: 99000000000", "Expect: 100-continue", body=b""), 413, "larger"),
    ],
)  # fmt: skip
def test_what_is_not_a_clear_request_is_refused_in_the_services_own_form(server, request_bytes, status, message):
    found, body = ask(server, request_bytes)
    assert (found, set(body)) == (status, {"error"})
    assert message in body["error"]


def test_a_client_is_asked_for_a_body_that_is_taken(server):
    with connected(server) as connection:
        connection.sendall(head(HOST, *JSON, "Expect: 100-continue", body=b""))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(BODY)
        assert read(connection)[0].status == 200


def test_http_1_0_needs_no_host(server):
    assert ask(server, b"GET /livez HTTP/1.0\r\n\r\n") == (200, {"status": "alive"})


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_an_offer_of_http_2_is_answered_over_http_1_with_its_body(server, split, framing):
    offer = (HOST, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    if framing == "length":
        whole = head(*offer, *JSON)
    else:
        coded = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
        whole = head(*offer, "Content-Type: application/json", "Transfer-Encoding: chunked", body=coded)
    with connected(server) as connection:
        for part in (whole[:-40], whole[-40:]) if split else (whole,):
            connection.sendall(part)
            time.sleep(0.05)
        response, body = read(connection)
        assert (response.status, len(body["predictions"])) == (200, 1)
        if framing == "length":  # the connection can be used for another request
            connection.sendall(head(HOST, *JSON))
            assert read(connection)[0].status == 200


def test_an_offer_without_a_body_is_answered(server):
    assert (
        ask(server, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")[0] == 200
    )


def test_a_request_behind_an_offer_is_answered_too(server):
    offer = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(offer * 2 + head(HOST, *JSON))
        answers = b""
        while answers.count(b"HTTP/1.1 200 ") < 3:
            part = connection.recv(2**16)
            assert part
            answers += part


def test_requests_that_come_together_are_answered_in_turn(server):
    with connected(server) as connection:
        connection.sendall(head(HOST, *JSON) * 3 + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answers = b""
        while answers.count(b"HTTP/1.1 ") < 4 or not answers.endswith(b'{"status":"alive"}'):
            answers += connection.recv(2**16)
        assert answers.count(b"HTTP/1.1 200 ") == 4


def test_a_head_without_end_is_cut_off(server):
    with connected(server) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 100 * 2**20:
                sent += connection.send(b"a:\r\n" * 1000)
        assert sent < 20 * 2**20  # what the kernel buffers before the response is seen


def test_trailers_without_end_are_cut_off(server):
    with connected(server) as connection:
        connection.sendall(head(HOST, "Content-Type: application/json", "Transfer-Encoding: chunked", body=b""))
        connection.sendall(f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\nX: ")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 100 * 2**20:
                sent += connection.send(b"a" * 2**16)
        assert sent < 20 * 2**20


def test_trailers_change_nothing(server):
    whole = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\nContent-Type: text/plain\r\nHost: elsewhere\r\n\r\n"
    assert ask(server, head(HOST, "Content-Type: application/json", "Transfer-Encoding: chunked", body=whole))[0] == 200


@pytest.mark.parametrize("begun", [b"", b"POST /predict HTTP/1.1\r\nHos"])
def test_a_connection_whose_request_does_not_come_is_closed(server, begun):
    with connected(server) as connection:
        connection.sendall(begun)
        began = time.monotonic()
        assert connection.recv(100) == b""
        assert time.monotonic() - began > HEAD_SECONDS / 2


def test_idle_connections_give_way_when_descriptors_run_short(tmp_path, store):
    publish(store, "animals")
    server = Server(store, tmp_path, descriptors=256)
    try:
        server.until(200)
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(connected(server))
            for _ in range(20):
                assert httpx.post(server.url + "/predict", json=IMAGE).status_code == 200
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


def test_a_new_connection_is_refused_where_all_are_busy_and_descriptors_run_short(tmp_path, store):
    publish(store, "animals")
    server = Server(store, tmp_path, descriptors=256, MODEPATH_STALL_SECONDS="60")
    try:
        server.until(200)
        with contextlib.ExitStack() as stack:
            for _ in range(128):
                stack.enter_context(connected(server)).sendall(head(HOST, *JSON, body=BODY[:5]))
            time.sleep(0.5)
            response, body = read(stack.enter_context(connected(server)))
            assert (response.status, response.headers["retry-after"]) == (503, "1")
            assert "connections" in body["error"]
        server.until(200)
    finally:
        server.stop()


def npy(rows, path="/predict"):
    shape = (rows, *SHAPE)
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    body = b"\x93NUMPY\x01\x00v\x00" + header + np.zeros(shape, np.float32).tobytes()
    whole = head(HOST, "Content-Type: application/x-npy", f"Content-Length: {len(body)}", body=body)
    return whole.replace(b"/predict", path.encode(), 1)


LARGE = npy(1024)


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_does_not_read_its_answers_is_cut_off_and_one_that_reads_slowly_is_not(server, reads):
    url, asked = httpx.URL(server.url), 5
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.settimeout(30)
        connection.connect((url.host, url.port))
        connection.sendall(npy(900, "/predict?members=true") * asked)
        if not reads:
            time.sleep(3 * STALL_SECONDS)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while received.count(b"HTTP/1.1 200 ") < asked or not received.endswith(b"}"):
                part = connection.recv(2**15)
                if not part:
                    break
                received += part
                time.sleep(0.01 if reads else 0)
    assert (received.count(b"HTTP/1.1 200 ") == asked) == reads
    assert ask(server, head(HOST, *JSON))[0] == 200


def given_up(server):
    found = [line for line in httpx.get(server.url + "/metrics").text.splitlines() if 'reason="client_left"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


@pytest.mark.parametrize("behind", [b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", LARGE])
def test_what_a_client_asked_for_is_dropped_when_it_leaves(server, behind):
    def leave(_):
        with connected(server) as connection:
            connection.sendall(LARGE + behind)

    assert ask(server, LARGE)[0] == 200
    before = given_up(server)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(40)))
    deadline = time.monotonic() + 20
    while given_up(server) <= before:
        assert time.monotonic() < deadline, "no request was given up"
        time.sleep(0.1)
    assert ask(server, head(HOST, *JSON))[0] == 200
