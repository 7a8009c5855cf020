"""What a stranger may send before, after and in place of a request, against a real server."""

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
IMAGE = {"inputs": np.full((1, *SHAPE), 0.5).tolist()}
BODY = json.dumps(IMAGE).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connections")
    store = Store(folder / "store")
    publish(store, "animals")
    running = Server(store, folder, MODEPATH_HEAD_SECONDS=str(HEAD_SECONDS))
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
    """Send bytes, and read one answer."""
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
        if framing == "length":  # and the connection goes on as what it is
            connection.sendall(head(HOST, *JSON))
            assert read(connection)[0].status == 200


def test_an_offer_without_a_body_is_answered(server):
    assert (
        ask(server, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")[0] == 200
    )


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
        assert sent < 20 * 2**20  # what the kernel takes before the answer is seen


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


def test_what_a_client_asked_for_is_dropped_when_it_leaves(server):
    rows = np.zeros((1024, *SHAPE), np.float32)
    stream = (b"\x93NUMPY\x01\x00v\x00" + str({"descr": "<f4", "fortran_order": False, "shape": rows.shape}).ljust(117).encode() + b"\n")  # fmt: skip
    body = stream + rows.tobytes()
    lines = (HOST, "Content-Type: application/x-npy", f"Content-Length: {len(body)}")

    def leave(_):
        with connected(server) as connection:
            connection.sendall(head(*lines, body=body))

    assert ask(server, head(*lines, body=body))[0] == 200
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(40)))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        metrics = httpx.get(server.url + "/metrics").text
        left = [line for line in metrics.splitlines() if 'reason="client_left"' in line]
        if left and float(left[0].rpartition(" ")[2]) > 0:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("no request was given up")
    assert ask(server, head(HOST, *JSON))[0] == 200
