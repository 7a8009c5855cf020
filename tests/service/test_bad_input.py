"""Bad input to a real service with two workers, while a client sends valid requests."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest

from models_store.decisions.calibrating import Labelled, calibrate
from models_store.uncertainty import softmax
from service.client import Client
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service import bad_requests
from tests.service.conftest import ROOT

images = np.random.default_rng(0).random((3, *SHAPE), dtype=np.float32)
expected = np.mean([softmax(linear_logits(linear(seed), images)) for seed in (0, 1, 2)], axis=0)


class Asker(threading.Thread):
    """Sends valid requests until stopped, and compares the responses with the expected ones."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.stopped, self.asked, self.wrong = url, threading.Event(), 0, []

    def run(self):
        with Client(self.url, attempts=1) as client:
            while not self.stopped.is_set():
                self.asked += 1
                try:
                    off = np.abs(client.predict(images).probs - expected).max()
                    if off > 1e-5:
                        self.wrong.append(off)
                except Exception as error:
                    self.wrong.append(error)

    def result(self):
        self.stopped.set()
        self.join(30)
        return self.wrong


def test_every_bad_input_is_refused_and_no_good_answer_is_lost_or_changed(store, serve):
    publish(store, "animals")
    # Short enough for a test, and long enough that the asker's pauses on a busy machine do not count as a stall.
    server = serve(store, MODEPATH_WORKERS="2", MODEPATH_MAX_ROWS="64", MODEPATH_STALL_SECONDS="4")
    server.until(200)
    address = urlparse(server.url).hostname, urlparse(server.url).port
    asker = Asker(server.url)
    asker.start()
    with socket.create_server(("127.0.0.1", 0)) as trap:
        elsewhere = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"
        bad = bad_requests.requests(body_limit=16 * 2**20, rows_limit=64, elsewhere=elsewhere)
        for _ in range(2):  # both workers are likely to receive each request
            for case in bad:
                status, body = bad_requests.answer(address, case.request)
                assert (case.what, status) == (case.what, case.status), body
                assert set(body) == {"error"}, case.what
                assert len(body["error"]) > 20, case.what
                assert "Traceback" not in body["error"]
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):  # no connection was made
            trap.accept()
    assert asker.result() == []
    assert asker.asked > 10
    assert server.stop() == 0
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


def test_what_schemathesis_makes_of_the_description_is_answered_as_described(store, serve, tmp_path):
    pytest.importorskip("schemathesis", reason="it is part of the dev extra")
    calibrate(store, publish(store, "animals"), Labelled(*labelled(2000, temperature=0.1), "these"))
    server = serve(store, MODEPATH_WORKERS="2", MODEPATH_MAX_ROWS="4")
    server.until(200)
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            Path(sys.executable).parent / "schemathesis", "--config-file",
            ROOT / "tests/service/schemathesis.toml", "run", server.url + "/docs.json", "--checks", "all",
            "--max-examples", os.environ.get("SCHEMATHESIS_EXAMPLES", "50"), "--seed", "1", "--continue-on-failure",
            "--no-color", "--report-json-path", report,
        ],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.service.schemathesis_hooks"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["test_cases"]["generated"] > 300
    assert found["operations"]["tested"] == found["operations"]["total"] >= 6
    assert found["valid_rates"]["POST /predict"]["fuzzing"]["accepted"] > 10  # not every generated request was refused
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    print(found["test_cases"])
