"""The service as a whole, in a real `bentoml serve`."""

import asyncio
import os
import subprocess
import sys
import time
from urllib.parse import urlparse

import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from models_store.uncertainty import softmax
from service.app import create_app
from service.operations.settings import Settings
from service.worker import Worker
from tests.conftest import ROOT
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service import bad_requests

images = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)


def test_it_answers_refuses_and_follows_activations(store, serve):
    server = serve(store)
    # With an empty store the service is alive but not ready, and it gives the reason.
    for _ in range(100):
        if "training.fge" in (why := server.until(503).json()["error"]):
            break
        time.sleep(0.1)
    assert "training.fge" in why  # pyright: ignore[reportPossiblyUnboundVariable]
    assert httpx.get(server.url + "/livez").status_code == 200
    refused = httpx.post(server.url + "/predict", json={"inputs": images.tolist()})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers

    # Publishing makes it ready, without a restart.
    publish(store, "animals", seeds=(0, 1, 2), temperature=1.7)
    server.until(200)
    answer = httpx.post(server.url + "/predict", json={"inputs": images.tolist(), "members": True})
    assert answer.status_code == 200
    body = answer.json()
    members = np.stack([softmax(linear_logits(linear(seed), images), 1.7) for seed in (0, 1, 2)])
    assert np.array([row["probs"] for row in body["predictions"]]) == pytest.approx(members.mean(axis=0), abs=1e-5)
    assert np.array([row["members"] for row in body["predictions"]]).transpose(1, 0, 2) == pytest.approx(
        members, abs=1e-5
    )
    assert (body["ensemble"], body["version"], body["mode"], body["members_used"]) == ("animals", 1, "average", 3)
    assert set(body["predictions"][0]["uncertainty"]) == {
        "predictive_entropy", "expected_entropy", "mutual_information", "disagreement",
    }  # fmt: skip

    # A new version is picked up without a restart.
    publish(store, "animals", seeds=(3,))
    server.until(200, "/ensembles/animals")
    for _ in range(100):
        found = httpx.get(server.url + "/ensembles/animals").json()
        if found["version"] == 2:
            break
        time.sleep(0.1)
    assert (found["version"], found["members"], found["default"]) == (2, 1, True)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert [e["name"] for e in httpx.get(server.url + "/ensembles").json()["ensembles"]] == ["animals"]

    # Refusals have the form of an error and the correct status.
    def status(**request):
        answer = httpx.request(**{"method": "POST", "url": server.url + "/predict", **request})
        assert set(answer.json()) == {"error"}, answer.text
        return answer.status_code

    assert status(json={"inputs": [[1.0]]}) == 400
    assert status(content=b"{", headers={"content-type": "application/json"}) == 400
    assert status(json={"inputs": images.tolist(), "ensemble": "nope"}) == 404
    assert status(json={"inputs": images.tolist(), "ensemble": "../animals"}) == 404
    assert status(content=b"x", headers={"content-type": "text/plain"}) == 415
    assert status(json={"inputs": np.zeros((1025, *SHAPE)).tolist()}) == 413
    assert status(content=b" " * (17 * 2**20), headers={"content-type": "application/json"}) == 413
    assert status(method="GET") == 405
    assert status(url=server.url + "/nowhere") == 404
    assert status(method="GET", url=server.url + "/ensembles/nope") == 404
    assert httpx.get(server.url + "/docs.json").json()["openapi"].startswith("3.1")

    # Ctrl-C stops all processes without a crash.
    assert server.stop() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url + "/livez")
    assert "Traceback" not in server.log.read_text()


def test_torch_is_not_there_or_not_loaded_after_a_served_prediction(store, serve):
    publish(store, "animals")
    server = serve(store)
    server.until(200)
    assert httpx.post(server.url + "/predict", json={"inputs": images.tolist()}).status_code == 200
    # Every library a process has loaded is in its memory map.
    psutil = pytest.importorskip("psutil")

    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    mapped = {m.path for process in processes for m in process.memory_maps()}
    assert any("onnxruntime" in path for path in mapped)
    assert not [path for path in mapped if "libtorch" in path]


def test_a_large_body_is_told_that_nothing_is_ready_instead_of_that_it_is_wrong(store, serve):
    server = serve(store, MODEPATH_WORKERS="1")
    server.until(503)
    large = {"inputs": np.zeros((1, 3, 224, 224)).tolist()}
    assert httpx.post(server.url + "/predict", json=large).status_code == 503


def test_what_takes_longer_than_its_limit_is_stopped_and_the_next_one_answered(store, serve):
    publish(store, "animals")
    server = serve(store, MODEPATH_WORKERS="1", MODEPATH_TIMEOUT="1", MODEPATH_STALL_SECONDS="30")
    server.until(200)
    half = bad_requests.message("/predict", b'{"inputs"', "application/json", headers=["Content-Length: 1000"])
    address = urlparse(server.url)
    status, body = bad_requests.answer((address.hostname, address.port), half)
    assert status == 504
    assert "MODEPATH_TIMEOUT" in body["error"]
    assert httpx.post(server.url + "/predict", json={"inputs": images.tolist()}).status_code == 200
    assert 'modepath_refused_total{reason="deadline"} 1.0' in httpx.get(server.url + "/metrics").text


def test_importing_the_application_reads_no_settings_and_loads_no_bentoml():
    code = "import sys, service.app; print({'bentoml', 'torch'} & set(sys.modules))"
    environment = {**os.environ, "MODEPATH_MAX_ROWS": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr


def test_an_application_made_from_settings_and_a_worker_answers_in_process(store, monkeypatch):
    publish(store, "animals")
    monkeypatch.setenv("MODELS_STORE", str(store.root))
    chosen = Settings(max_rows=2, key=SecretStr("k" * 16))
    worker = Worker(chosen)
    app = create_app(chosen, worker)

    async def go():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            before = await client.get("/readyz")
            await asyncio.to_thread(worker.ensembles.refresh)
            answered = await client.post("/predict", json={"inputs": images[:1].tolist()})
            refused = await client.post("/predict", json={"inputs": np.zeros((3, 1, 4, 4)).tolist()})
            foreign = await client.get("/livez", headers={"Host": "evil.example"})
        return [before.status_code, answered.status_code, refused.status_code, foreign.status_code], answered.json()

    try:
        statuses, answer = asyncio.run(go())
    finally:
        worker.close()
    assert statuses == [503, 200, 413, 421]
    assert answer["ensemble"] == "animals"


def test_an_answered_request_leaves_no_timer():
    code = """
import asyncio, gc, uvloop
from service import bento
from service.app import create_app
from service.bento import Modepath
from service.operations.settings import settings
from types import SimpleNamespace
bento._app = create_app(settings(), SimpleNamespace(guard=None))
async def received(): return {"type": "http.request", "body": b"", "more_body": False}
async def ask(app):
    async def sent(message): pass
    scope = {"type": "http", "method": "GET", "path": "/nowhere", "raw_path": b"/nowhere", "query_string": b"", "headers": [], "http_version": "1.1",
             "scheme": "http", "server": ("localhost", 1), "client": ("localhost", 2), "root_path": "", "asgi": {"version": "3.0"}}
    await app(scope, received, sent)
async def main():
    app = Modepath.to_asgi()
    for _ in range(50):
        await ask(app)
    gc.collect()
    return sum(type(thing).__name__ == "TimerHandle" for thing in gc.get_objects())
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    print("timers", runner.run(main()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "timers 0" in found.stdout, found.stdout + found.stderr
