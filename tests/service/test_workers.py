"""Several workers: their metrics, activations under load, and the death of a worker."""

import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models_store.uncertainty import combine, softmax
from service.client import Client
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service.conftest import free_port, workers_of

rng = np.random.default_rng(0)


def metrics_of(url):
    found = {}
    for family in text_string_to_metric_families(httpx.get(url + "/metrics").text):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def ask(url, batches, threads=8, attempts=1, **options):
    """Send all batches over many connections; returns the responses in order."""
    with Client(url, attempts=attempts) as client, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda images: client.predict(images, **options), batches))


def check_metrics(found, ensemble, prediction, requests, members):
    labels = frozenset({("ensemble", ensemble), ("mode", "average"), ("version", "1")})
    rows = len(prediction.label)
    for measure in ("predictive_entropy", "expected_entropy", "mutual_information", "disagreement", "confidence"):
        values = getattr(prediction, measure) / (1 if measure in ("disagreement", "confidence") else np.log(3))
        assert found[f"modepath_{measure}_ratio_count", labels] == rows
        assert found[f"modepath_{measure}_ratio_sum", labels] == pytest.approx(values.sum(), rel=1e-5)
    assert found["modepath_members_used_count", labels] == rows
    assert found["modepath_members_used_sum", labels] == rows * members
    for stage in ("decode", "queue", "members", "reply"):
        assert found[f"modepath_{stage}_seconds_count", labels] == requests
        assert found[f"modepath_{stage}_seconds_sum", labels] > 0
    for index, name in enumerate(["cat", "dog", "bird"]):
        counted = found.get(("modepath_predictions_total", labels | {("class", name)}), 0)
        assert counted == (prediction.label == index).sum()


def expected(seeds, images):
    return combine(
        np.stack([softmax(linear_logits(linear(seed), images)) for seed in seeds]), np.full(len(seeds), 1 / len(seeds))
    )


def test_the_metrics_of_four_workers_are_those_of_what_was_sent(store, serve):
    publish(store, "animals", seeds=(0, 1, 2))
    publish(store, "other", seeds=(3, 4))
    server = serve(store, MODEPATH_WORKERS="4", MODEPATH_MAX_ROWS="10")
    server.until(200)
    assert len(workers_of(server)) == 4
    counts = {"animals": 1500, "other": 500}
    sent = {name: [rng.random((1 + i % 4, *SHAPE), dtype=np.float32) for i in range(n)] for name, n in counts.items()}
    for name, batches in sent.items():
        ask(server.url, batches, ensemble=name)
    refused = Counter()
    for i in range(90):
        body, media_type, reason = [
            (b"{", "application/json", "bad_request"), (b"", "text/plain", "media_type"),
            (b'{"inputs": [' + b"0," * 10 + b"0]}", "application/json", "too_large"),
        ][i % 3]  # fmt: skip
        httpx.post(server.url + "/predict", content=body, headers={"Content-Type": media_type})
        refused[reason] += 1
    found = metrics_of(server.url)
    for name, seeds in (("animals", (0, 1, 2)), ("other", (3, 4))):
        prediction = expected(seeds, np.concatenate(sent[name]))
        check_metrics(found, name, prediction, counts[name], len(seeds))
    for reason, count in refused.items():
        assert found["modepath_refused_total", frozenset({("reason", reason)})] == count


def test_metrics_can_have_a_listener_of_their_own(store, serve):
    publish(store, "animals")
    port = free_port()
    server = serve(store, MODEPATH_WORKERS="2", MODEPATH_METRICS_PORT=str(port))
    server.until(200)
    ask(server.url, [rng.random((1, *SHAPE))] * 10)
    found = metrics_of(f"http://127.0.0.1:{port}")
    assert (
        found[
            "modepath_queue_seconds_count", frozenset({("ensemble", "animals"), ("mode", "average"), ("version", "1")})
        ]
        == 10
    )
    assert httpx.get(server.url + "/metrics").status_code == 404
    assert "/metrics" not in httpx.get(server.url + "/docs.json").json()["paths"]


def test_activations_under_load_fail_no_request_and_mix_no_answer(store, serve):
    publish(store, "animals", seeds=(0, 1, 2))
    publish(store, "animals", seeds=(3, 4), activate=False)
    images = rng.random((4, *SHAPE), dtype=np.float32)
    right = {1: expected((0, 1, 2), images).mean_probs, 2: expected((3, 4), images).mean_probs}
    server = serve(store, MODEPATH_WORKERS="2")
    server.until(200)
    stop, failures, seen = threading.Event(), [], Counter()

    def load():
        with Client(server.url, attempts=1) as client:
            while not stop.is_set():
                try:
                    answer = client.predict(images)
                    seen[answer.version] += 1
                    if np.abs(answer.probs - right[answer.version]).max() > 1e-5:
                        failures.append("mixed")
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        wanted = 2 - turn % 2
        store.activate("animals", wanted)
        # New connections reach any worker, so all have switched once many responses in a row have the new version.
        for _ in range(200):
            if {httpx.get(server.url + "/ensembles/animals").json()["version"] for _ in range(12)} == {wanted}:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"not all workers switched to version {wanted}")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert min(seen[1], seen[2]) > 0


def test_a_version_that_is_damaged_is_refused_once_and_the_old_one_goes_on(store, serve):
    publish(store, "animals", seeds=(0, 1, 2))
    server = serve(store)
    server.until(200)
    broken = publish(store, "animals", seeds=(3, 4), activate=False)
    member = broken.folder / "members/000.onnx"
    member.chmod(0o644)
    member.write_bytes(member.read_bytes()[:-1] + b"x")
    store.activate("animals", 2)
    time.sleep(1.5)  # time for several polls
    assert ask(server.url, [rng.random((1, *SHAPE))])[0].version == 1
    assert server.log.read_text().count("is not served") == 1
    store.activate("animals", 1)


def test_the_death_of_a_worker_costs_its_own_connections_only(store, serve):
    publish(store, "animals", seeds=(0, 1, 2))
    server = serve(store, MODEPATH_WORKERS="2")
    server.until(200)
    images = rng.random((2, *SHAPE), dtype=np.float32)
    before = ask(server.url, [images] * 200)
    assert len(before) == 200
    victim = workers_of(server)[0]
    others = {worker.pid for worker in workers_of(server)} - {victim.pid}
    os.kill(victim.pid, signal.SIGKILL)
    # With retries no request fails; the counters of the dead worker are kept.
    answers = ask(server.url, [images] * 200, attempts=8)
    assert all(np.abs(answer.probs - expected((0, 1, 2), images).mean_probs).max() < 1e-5 for answer in answers)
    for _ in range(300):
        alive = {worker.pid for worker in workers_of(server)}
        if len(alive) == 2 and others < alive:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the worker was not replaced")
    server.until(200)
    labels = frozenset({("ensemble", "animals"), ("mode", "average"), ("version", "1")})
    # The dead worker may have answered a request whose response was lost, so that it was sent again.
    assert 400 <= metrics_of(server.url)["modepath_queue_seconds_count", labels] <= 408


def test_a_killed_worker_leaves_nothing_behind(store, serve):
    publish(store, "animals")
    with tempfile.TemporaryDirectory() as folder:  # a short path, because sockets are made in it
        server = serve(store, MODEPATH_WORKERS="2", TMPDIR=folder)
        server.until(200)
        os.kill((victim := workers_of(server)[0]).pid, signal.SIGKILL)
        for _ in range(300):
            if len([worker for worker in workers_of(server) if worker.pid != victim.pid]) == 2:
                break
            time.sleep(0.1)
        time.sleep(2)
        assert server.stop() == 0
        assert list(Path(folder).iterdir()) == []


def test_structured_lines_when_asked(store, serve):
    publish(store, "animals")
    server = serve(store, MODEPATH_ACCESS_LOG="true")
    server.until(200)
    answer = ask(server.url, [rng.random((3, *SHAPE))])[0]
    httpx.get(server.url + "/nowhere")
    server.stop()
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    told = next(line for line in lines if line["path"] == "/predict")
    assert (told["status"], told["rows"], told["ensemble"], told["version"]) == (200, 3, "animals", 1)
    assert told["request_id"] == answer.request_id
    assert any(line["status"] == 404 for line in lines)


def test_by_default_the_log_is_quiet(store, serve):
    publish(store, "animals")
    server = serve(store)
    server.until(200)
    ask(server.url, [rng.random((3, *SHAPE))])
    server.stop()
    assert "/predict" not in server.log.read_text()
    assert "1 worker(s), of" in server.log.read_text()
