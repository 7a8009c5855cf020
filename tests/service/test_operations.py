"""The service as a whole while its disk, its log or a process fails, and while it shuts down."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.onnx_members import SHAPE, publish, publish_broken
from tests.recording_proxy import recording_proxy
from tests.service.conftest import workers_of

BODY = json.dumps({"inputs": np.zeros((1, *SHAPE)).tolist()}).encode()
HEADERS = {"Content-Type": "application/json"}
LABELS = frozenset({("ensemble", "animals"), ("mode", "average"), ("version", "1")})
ANSWERED = ("modepath_queue_seconds_count", LABELS)
INCOMPLETE = ("modepath_metrics_incomplete", frozenset())


@pytest.fixture
def animals(store):
    publish(store, "animals")
    return store


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    assert shutil.disk_usage(folder).free == 0


def ask(server, requests, threads=8):
    """Send requests, each over a new connection that any worker may accept; returns the count of each status."""
    with ThreadPoolExecutor(threads) as pool:
        return Counter(
            pool.map(lambda _: httpx.post(server.url + "/predict", content=BODY, headers=HEADERS).status_code, range(requests))
        )  # fmt: skip


def metrics_of(server):
    answer = httpx.get(server.url + "/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def eventually(holds, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.05)
    return found


def pids(server):
    return {worker.pid for worker in workers_of(server)}


def replaced(server, dead, number=2):
    return len(pids(server) - {dead}) == number


def test_a_full_file_system_under_the_metrics_costs_no_request(animals, serve, small_disk):
    server = serve(animals, MODEPATH_WORKERS="2", TMPDIR=str(small_disk))
    server.until(200)
    assert ask(server, 40) == {200: 40}
    assert metrics_of(server)[ANSWERED] == 40
    fill(small_disk)
    dead = min(pids(server))
    os.kill(dead, signal.SIGKILL)  # its replacement cannot write its files
    eventually(lambda: replaced(server, dead))
    server.until(200)
    # The new worker detects within a second that its metrics are only in memory.
    eventually(lambda: metrics_of(server)[INCOMPLETE] == 1)
    assert ask(server, 60) == {200: 60}
    assert metrics_of(server)[ANSWERED] >= 40
    assert server.log.read_text().count("cannot be written") == 1
    (small_disk / "filler").unlink()
    eventually(lambda: metrics_of(server)[INCOMPLETE] == 0)
    assert metrics_of(server)[ANSWERED] == 100


def test_files_of_metrics_that_somebody_removes_are_made_again(animals, serve, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = serve(animals, MODEPATH_WORKERS="2", TMPDIR=str(folder))
    server.until(200)
    assert ask(server, 40) == {200: 40}
    dead, other = sorted(pids(server))
    os.kill(dead, signal.SIGKILL)  # so that there are files of a dead worker
    eventually(lambda: replaced(server, dead))
    [metrics] = folder.glob("modepath-metrics-*")
    eventually(lambda: (metrics / "counter_archive.db").exists())
    files = {file.name for file in metrics.glob("*.db")}
    shutil.rmtree(metrics, ignore_errors=True)  # a worker may write to it at the same time
    assert httpx.get(server.url + "/metrics").status_code == 200
    os.kill(other, signal.SIGKILL)
    eventually(lambda: replaced(server, other))
    server.until(200)
    assert ask(server, 20) == {200: 20}
    eventually(lambda: (metrics / "counter_archive.db").exists())
    # The counts of the second worker may be lost: it died when its files no longer existed.
    assert 20 <= metrics_of(server)[ANSWERED] <= 60
    assert {name for name in files if "archive" in name} <= {file.name for file in metrics.glob("*.db")}


def test_files_of_dead_workers_do_not_pile_up_and_nothing_is_lost_or_counted_twice(animals, serve, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = serve(animals, MODEPATH_WORKERS="2", TMPDIR=str(folder))
    server.until(200)
    [metrics] = folder.glob("modepath-metrics-*")
    for turn in range(3):
        assert ask(server, 20) == {200: 20}
        dead = min(pids(server))
        os.kill(dead, signal.SIGKILL)
        eventually(lambda dead=dead: replaced(server, dead) and not list(metrics.glob(f"*_{dead}.db")))
        server.until(200)
        assert metrics_of(server)[ANSWERED] == 20 * (turn + 1)
    kinds = {file.name.partition("_")[0] for file in metrics.glob("*.db")}
    assert len(list(metrics.glob("*.db"))) <= len(kinds) * 3  # two workers and the archive


def test_a_dead_worker_is_replaced_long_before_bentoml_would_look(animals, serve):
    # BentoML's supervisor checks its workers every 10 s. If only that check replaced them, two deaths in a row, the
    # second just after the first replacement, could not both be followed by a replacement within 5 s.
    server = serve(animals, MODEPATH_WORKERS="1")
    server.until(200)
    for _ in range(2):
        [dead] = pids(server)
        began = time.time()
        os.kill(dead, signal.SIGKILL)
        [new] = eventually(lambda dead=dead: [worker for worker in workers_of(server) if worker.pid != dead])
        assert new.create_time() - began < 5
    server.until(200)


def test_a_worker_that_stands_still_is_replaced(animals, serve):
    server = serve(animals, MODEPATH_WORKERS="2", MODEPATH_HANG_SECONDS="2")
    # Wait for both workers, because a worker may stand still for much longer while it loads.
    eventually(lambda: server.log.read_text().count("Service modepath initialized") == 2)
    stopped = min(pids(server))
    os.kill(stopped, signal.SIGSTOP)
    eventually(lambda: stopped not in pids(server) and len(pids(server)) == 2)
    server.until(200)
    assert ask(server, 20) == {200: 20}
    assert f"Worker {stopped} has been blocked" in server.log.read_text()


def test_a_worker_whose_members_run_without_end_for_an_image_is_replaced(store, serve):
    publish_broken(store, "pets", loop=2**62, on_white=True)
    server = serve(store, MODEPATH_WORKERS="1", MODEPATH_HANG_SECONDS="2", MODEPATH_THREADS="1")
    server.until(200)
    before = pids(server)
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=60) as connection:
        white = json.dumps({"inputs": np.ones((1, *SHAPE)).tolist()}).encode()
        connection.sendall(head(len(white)) + white)
        eventually(lambda: pids(server) and not pids(server) & before)
    server.until(200)
    assert ask(server, 5) == {200: 5}


def test_workers_end_and_free_the_port_when_their_supervisor_is_killed(animals, serve, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = serve(animals, MODEPATH_WORKERS="2", TMPDIR=str(folder))
    server.until(200)
    workers = workers_of(server)
    server.process.kill()
    server.process.wait()
    eventually(lambda: not any(worker.is_running() for worker in workers))
    with socket.create_server(("127.0.0.1", urlsplit(server.url).port)):
        pass
    assert not list(folder.glob("modepath-metrics-*/*.db"))


def raw(server):
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=60)


def head(length=None):
    length = len(BODY) if length is None else length
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()


def answer_of(connection):
    """Read status, headers and body until the connection ends. A reset raises an error."""
    received = b""
    while part := connection.recv(65536):
        received += part
    start, _, body = received.partition(b"\r\n\r\n")
    status, *lines = start.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), json.loads(body)


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_no_connection_is_reset_while_the_service_ends(animals, serve, workers, number):
    server = serve(animals, MODEPATH_WORKERS=str(workers), MODEPATH_STALL_SECONDS="30")
    server.until(200)
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(raw(server))
        slow.sendall(head() + BODY[:5])
        silent = [stack.enter_context(raw(server)) for _ in range(4)]  # they send their requests later
        waiting = [stack.enter_context(raw(server)) for _ in range(60)]
        for connection in waiting:
            connection.sendall(head() + BODY)
        os.kill(server.process.pid, number)
        for connection in silent:
            connection.sendall(head() + BODY)
        # Workers stop one after the other: until then requests are answered or refused, and soon all are refused.
        late, deadline = [(200, {}, {})], time.monotonic() + 20
        while {status for status, _, _ in late} != {503}:
            assert time.monotonic() < deadline
            connections = [stack.enter_context(raw(server)) for _ in range(24)]
            for connection in connections:
                connection.sendall(head() + BODY)
            late = [answer_of(connection) for connection in connections]
            assert {status for status, _, _ in late} <= {200, 503}
        # All of them are answered while the slow request is still being sent.
        answers = [answer_of(connection) for connection in (*waiting, *silent)]
        assert {status for status, _, _ in answers} <= {200, 503}
        for _, headers, body in late:
            assert "about to end" in body["error"]
            assert (headers["connection"], headers["retry-after"]) == ("close", "1")
        large = stack.enter_context(raw(server))
        large.sendall(head(2**20))
        large.sendall(bytes(2**20))
        assert answer_of(large)[0] == 503
        assert server.process.poll() is None
        last = stack.enter_context(raw(server))
        last.sendall(head() + BODY)
        slow.sendall(BODY[5:])
        status, headers, body = answer_of(slow)
        assert (status, headers["connection"], len(body["predictions"])) == (200, "close", 1)
        assert answer_of(last)[0] == 503
    assert server.process.wait(30) is not None
    with pytest.raises(ConnectionRefusedError):
        raw(server)


def test_a_log_that_nobody_reads_holds_nothing_up(animals, serve):
    unread, output = os.pipe()
    server = serve(animals, output=output, MODEPATH_ACCESS_LOG="true", MODEPATH_WORKERS="2")
    os.close(output)
    server.until(200)
    path = "/nowhere" + "x" * 150  # a line of more than 300 bytes
    with httpx.Client(base_url=server.url) as client:
        for _ in range(1000):
            assert client.get(path).status_code == 404
    assert ask(server, 20) == {200: 20}
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(30)
    os.close(unread)


def test_a_log_that_cannot_be_written_is_counted_and_holds_nothing_up(animals, serve):
    with Path("/dev/full").open("w") as full:
        server = serve(animals, output=full, MODEPATH_ACCESS_LOG="true")
        server.until(200)
        with httpx.Client(base_url=server.url) as client:
            assert {client.get("/livez").status_code for _ in range(50)} == {200}
        assert ask(server, 20) == {200: 20}
        eventually(lambda: metrics_of(server)["modepath_log_lines_dropped_total", frozenset()] > 50)
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.wait(30)


def test_clients_name_nobody_else_in_the_log_and_its_lines_stay_short(animals, serve):
    server = serve(animals, MODEPATH_ACCESS_LOG="true")
    server.until(200)
    httpx.get(server.url + "/a" * 2000, headers={"X-Forwarded-For": "9" * 30_000})
    server.stop()
    lines = [line for line in server.log.read_text().splitlines() if '"/a/a' in line]
    assert [json.loads(line)["client"] for line in lines] == ["127.0.0.1"]
    assert len(lines[0]) < 1000


def test_localhost_is_an_address_and_proxies_that_the_operator_names_name_the_client(animals, serve):
    server = serve(
        animals, MODEPATH_HOST="localhost", MODEPATH_ACCESS_LOG="true", MODEPATH_TRUSTED_PROXIES="127.0.0.0/8"
    )
    server.until(200)
    httpx.get(server.url + "/through-a-proxy", headers={"X-Forwarded-For": "192.0.2.7"})
    server.stop()
    [line] = [line for line in server.log.read_text().splitlines() if "through-a-proxy" in line]
    assert json.loads(line)["client"] == "192.0.2.7"


def test_a_plain_bentoml_serve_contacts_nobody(animals, serve, tmp_path, monkeypatch):
    monkeypatch.delenv("BENTOML_DO_NOT_TRACK", raising=False)
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    with recording_proxy(home) as (environment, attempts):
        server = serve(animals, **environment)
        server.until(200)
        assert ask(server, 3) == {200: 3}
        time.sleep(3)  # onnxruntime reports from a separate thread
        server.stop()  # BentoML reports again at the end
        assert not attempts
    assert not list(home.rglob("*nnxruntime*"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MODEPATH_PORT": "TAKEN"}, "Cannot listen on 127.0.0.1:TAKEN: Address already in use"),
        ({"MODEPATH_METRICS_PORT": "TAKEN"}, "Cannot listen on 127.0.0.1:TAKEN for /metrics: Address already in use"),
        ({"MODEPATH_HOST": "no.such.host.invalid"}, "MODEPATH_HOST: 'no.such.host.invalid' is neither an IP address"),
        ({"MODEPATH_MAX_ROWS": "many"}, "MODEPATH_MAX_ROWS: Input should be a valid integer"),
    ],
)
def test_what_keeps_the_service_from_starting_is_said_in_one_line(animals, serve, environment, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        server = serve(animals, **{name: value.replace("TAKEN", port) for name, value in environment.items()})
        assert server.process.wait(60) == 1
    [line] = server.log.read_text().splitlines()
    assert said.replace("TAKEN", port) in line


def test_a_request_id_of_the_client_comes_back_and_stands_in_the_log_if_it_is_plain(animals, serve):
    server = serve(animals, MODEPATH_ACCESS_LOG="true")
    server.until(200)
    inputs = {"inputs": np.zeros((1, *SHAPE)).tolist()}
    answers = [
        httpx.post(server.url + "/predict", json=inputs, headers={"X-Request-ID": given})
        for given in ("trace-1.a:b", 'a"b', "x" * 129)
    ]
    assert [answer.headers.get("x-request-id") for answer in answers] == ["trace-1.a:b", None, None]
    server.stop()
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if '"/predict"' in line]
    assert [line.get("given_request_id") for line in lines] == ["trace-1.a:b", None, None]
    assert [line["request_id"] for line in lines] == [answer.json()["request_id"] for answer in answers]
