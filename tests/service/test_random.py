"""Modes `random` and `keyed` against a real `bentoml serve`."""

import base64
import contextlib
import io
import itertools
import json
import re
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from models_store.uncertainty import softmax
from tests import onnx_members
from tests.onnx_members import SHAPE, point_logits, publish
from tests.service.conftest import free_port, workers_of

POINTS = 256
pixels = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
image = (pixels / 255).astype(np.float32)
OPEN = {"modes": ["random", "keyed"], "probabilities": "exact", "point": True}


@pytest.fixture
def bank():
    return onnx_members.bank(points=POINTS)


def policies(**of):
    return {"MODEPATH_POLICIES": json.dumps(of)}


def ask(client, url, images=image[None], **options):
    answer = client.post(url + "/predict", json={"inputs": np.asarray(images).tolist(), **options})
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def points(client, url, count, **options):
    return [ask(client, url, **options)[0]["point"] for _ in range(count)]


def test_each_query_is_answered_by_a_network_of_its_own(store, serve, bank):
    publish(store, "a", bank=bank)
    server = serve(store, **policies(a=OPEN))
    server.until(200)
    with httpx.Client() as client:
        rows = [row for _ in range(100) for row in ask(client, server.url, np.repeat(image[None], 256, axis=0))]
        for row in rows[:: len(rows) // 50]:
            expected = softmax(point_logits(bank, row["point"], image[None]), bank.temperature[row["point"]])[0]
            assert row["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
        drawn = np.array([row["point"] for row in rows])
        assert 1e-4 < stats.chisquare(np.bincount(drawn, minlength=POINTS)).pvalue < 1 - 1e-4
        lag = stats.pearsonr(drawn[:-1], drawn[1:])
        assert lag.pvalue > 1e-4
        answers = {json.dumps(ask(client, server.url)[0]["probs"]) for _ in range(1000)}
        assert len(answers) >= 200
        first = points(client, server.url, 50)
        shown = client.get(server.url + "/ensembles/a").json()
        assert (shown["pool"]["networks"], shown["pool"]["of"], shown["members"]) == (None, None, None)
        assert shown["pool"]["mebibytes"] > 0
        assert shown["modes"] == ["random", "keyed"]
    server.stop()
    again = serve(store, **policies(a=OPEN))
    again.until(200)
    with httpx.Client() as client:
        assert points(client, again.url, 50) != first


def test_workers_draw_apart(store, serve, bank):
    publish(store, "a", bank=bank)
    server = serve(store, MODEPATH_WORKERS="2", **policies(a=OPEN))
    server.until(200)
    runs, taken = {}, {}
    with contextlib.ExitStack() as clients:
        for _ in range(40):  # each uses a new connection, which any worker may accept
            client = clients.enter_context(httpx.Client())
            answer = client.get(server.url + "/livez")
            port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
            # Immediately, because a connection that is idle for a few seconds is closed.
            taken |= {
                c.raddr.port: worker.pid for worker in workers_of(server) for c in worker.net_connections() if c.raddr
            }
            runs[port] = tuple(points(client, server.url, 8))
    assert {taken[port] for port in runs} == {worker.pid for worker in workers_of(server)}
    assert len(set(runs.values())) == len(runs)


def encodings(client, url):
    """Predictions for the same pixels in four encodings, and at another position in a batch."""
    file, array = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    np.save(array, image[None])
    encoded = base64.b64encode(file.getvalue()).decode()
    others = np.random.default_rng(1).random((3, *SHAPE)).astype(np.float32)
    asked = [
        {"json": {"inputs": image[None].tolist(), "mode": "keyed"}},
        {"content": array.getvalue(), "headers": {"Content-Type": "application/x-npy"}, "params": {"mode": "keyed"}},
        {"content": file.getvalue(), "headers": {"Content-Type": "image/png"}, "params": {"mode": "keyed"}},
        {"json": {"images": [encoded], "mode": "keyed"}},
        {"json": {"inputs": np.concatenate([others, image[None]]).tolist(), "mode": "keyed"}},
    ]
    return [client.post(url + "/predict", **request).json()["predictions"][-1] for request in asked]


def test_keyed_answers_a_question_alike_until_its_key_turns_and_in_every_process_that_has_the_key(store, serve, bank):
    publish(store, "a", bank=bank)
    key = {"MODEPATH_KEY": "a key that two services have", "MODEPATH_KEY_SECONDS": "86400"}
    one, two = (serve(store, MODEPATH_WORKERS=str(n), **key, **policies(a=OPEN)) for n in (1, 2))
    answers = []
    for server in (one, two):
        server.until(200)
        for _ in range(10):
            with httpx.Client() as client:
                answers += encodings(client, server.url)
    assert len(answers) == 100
    assert len({json.dumps(answer, sort_keys=True) for answer in answers}) == 1
    for server in (one, two):
        server.stop()
    turning = serve(store, **(key | {"MODEPATH_KEY_SECONDS": "2"}), **policies(a=OPEN))
    turning.until(200)
    with httpx.Client() as client:
        seen, end = [], time.monotonic() + 9
        while time.monotonic() < end:
            seen.append(ask(client, turning.url, mode="keyed")[0]["point"])
            time.sleep(0.05)
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert 3 <= changes <= 5


def test_keyed_draws_for_each_caller_apart_whom_a_proxy_names_and_for_nobody_whom_a_client_names(store, serve, bank):
    publish(store, "a", bank=bank)
    seen = {}
    for trusted in (None, "X-Caller"):
        server = serve(store, **({"MODEPATH_CALLER_HEADER": trusted} if trusted else {}), **policies(a=OPEN))
        server.until(200)
        with httpx.Client() as client:

            def point(caller, client=client, url=server.url):
                body = {"inputs": image[None].tolist(), "mode": "keyed"}
                answer = client.post(url + "/predict", json=body, headers={"X-Caller": caller}).json()
                return answer["predictions"][0]["point"]

            seen[trusted] = [[point(f"caller {number}") for number in range(20)] for _ in range(2)]
        with httpx.Client() as client:
            body = {"inputs": image[None].tolist(), "mode": "keyed"}
            twice = [("X-Caller", "a client's choice"), ("X-Caller", "alice")]
            statuses = [
                client.post(server.url + "/predict", json=body, headers=headers).status_code for headers in ([], twice)
            ]
        assert statuses == ([400, 400] if trusted else [200, 200])
        server.stop()
    for first, again in seen.values():
        assert first == again
    assert len(set(seen[None][0])) == 1
    assert len(set(seen["X-Caller"][0])) > 10


def test_a_defended_ensemble_gives_nothing_else(store, serve, bank):
    publish(store, "path", bank=bank)
    publish(store, "ends", seeds=(0, 9))  # member 0 is the same file as path's
    publish(store, "free", seeds=(20, 21))
    server = serve(store, MODEPATH_ACCESS_LOG="true", **policies(path={"modes": ["random", "keyed"]}))
    server.until(200)
    with httpx.Client() as client:

        def post(**fields):
            return client.post(server.url + "/predict", json={"inputs": image[None].tolist(), **fields})

        assert post(ensemble="path", mode="average").status_code == 403
        assert post(ensemble="path", members=True).status_code == 400
        assert post(ensemble="ends").status_code == 403
        assert client.get(server.url + "/ensembles/ends").status_code == 403
        assert [one["name"] for one in client.get(server.url + "/ensembles").json()["ensembles"]] == ["free", "path"]
        assert post(ensemble="free").json()["mode"] == "average"
        answers = [post(ensemble="path", mode=mode) for mode in ("random", "keyed") for _ in range(50)]
        for answer in answers:
            body = answer.json()
            assert set(body) == {"ensemble", "version", "mode", "request_id", "predictions"}
            assert set(body["predictions"][0]) == {"label", "class_name", "confidence", "probs"}
            assert body["predictions"][0]["probs"] == np.round(body["predictions"][0]["probs"], 2).tolist()
        # All have the same length, and the same headers except for the date.
        kept = [{k: v for k, v in answer.headers.items() if k != "date"} for answer in answers]
        assert all(headers == kept[0] for headers in kept if headers)
        exposed = client.get(server.url + "/metrics").text
    of_path = {line.partition("{")[0] for line in exposed.splitlines() if 'ensemble="path"' in line}
    assert of_path == {"modepath_predictions_total"}
    assert "modepath_confidence_ratio_sum" in exposed  # of `free`
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if '"path":"/predict"' in line]
    usual = {"time", "client", "method", "path", "status", "seconds", "bytes"}
    told = [line for line in lines if line["status"] == 200 and line.get("ensemble") == "path"]
    assert len(told) == 100
    assert all(set(line) == usual | {"ensemble", "version", "rows", "request_id"} for line in told)


def test_on_a_listener_of_their_own_the_metrics_of_a_defended_ensemble_are_whole(store, serve, bank):
    publish(store, "path", bank=bank)
    port = free_port()
    server = serve(store, MODEPATH_METRICS_PORT=str(port), **policies(path={"modes": ["random"]}))
    server.until(200)
    with httpx.Client() as client:
        ask(client, server.url, np.repeat(image[None], 7, axis=0))
        assert client.get(server.url + "/metrics").status_code == 404
        exposed = client.get(f"http://127.0.0.1:{port}/metrics").text
    assert re.search(r'modepath_confidence_ratio_count\{ensemble="path",mode="random",version="1"\} 7', exposed)
