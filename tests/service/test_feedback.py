"""Labels that come later are counted once each, by several workers, after a kill and after a restart."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from models_store import scores
from models_store.decisions import calibrating
from service.client import Client, RefusedError
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import SHAPE, bank, publish
from tests.service.conftest import workers_of

rng = np.random.default_rng(0)


def counters(server):
    """Sums of the feedback counters over all labels but the reason, from /metrics."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("modepath_feedback_"):
                name = sample.name.removeprefix("modepath_feedback_").removesuffix("_total")
                reason = sample.labels.get("reason", "")
                found[name, reason] = found.get((name, reason), 0) + sample.value
    return {key if key[1] else key[0]: value for key, value in found.items()}


def ece(server):
    bins = {}
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            if sample.name in ("modepath_feedback_correct_total", "modepath_feedback_confidence_total"):
                sign = 1 if "correct" in sample.name else -1
                bins[sample.labels["bin"]] = bins.get(sample.labels["bin"], 0) + sign * sample.value
    return sum(map(abs, bins.values()))


@pytest.fixture
def version(store):
    x, y = labelled(1000, temperature=0.3)
    return calibrating.calibrate(store, publish(store, "animals"), calibrating.Labelled(x, y, "these"))


def test_every_counter_equals_what_was_sent_also_after_a_kill_and_a_restart(version, store, serve, tmp_path):
    options = {
        "MODEPATH_WORKERS": "4",
        "MODEPATH_THREADS": "1",
        "MODEPATH_FEEDBACK": f"sqlite:///{tmp_path}/feedback.db",
    }
    server = serve(store, **options)
    server.until(200)
    images = rng.random((2000, *SHAPE), np.float32)
    sent, probs, decided = [], [], []
    with Client(server.url) as client:
        for number in range(2000):
            answer = client.predict(images[number : number + 1], coverage=0.9, wrong_cost=10, review_cost=4)
            sent.append((answer.request_id, 0, int(rng.integers(3))))
            probs.append(answer.probs)
            decided += [
                (label in chosen, decision == "predict", label == top)
                for (_, _, label), chosen, decision, top in zip(
                    sent[-1:], answer.prediction_sets, answer.decisions, answer.labels, strict=True
                )
            ]
    probs, truth = np.concatenate(probs), np.array([label for _, _, label in sent])
    order = random.Random(0).sample(range(2000), 1000)  # half of them
    first, second, third = order[:400], order[400:700], order[700:]

    def report(server, rows):
        some = [dict(zip(("request_id", "row", "label"), sent[row], strict=True)) for row in rows]
        noise = [*some[: len(some) // 20], *({**one, "request_id": "0" * 24} for one in some[: len(some) // 20])]
        done = httpx.post(server.url + "/feedback", json=[*some, *noise]).json()
        assert done["accepted"] == len(rows)
        assert [one["reason"] for one in done["rejected"]] == ["duplicate"] * (len(noise) // 2) + ["expired"] * (
            len(noise) // 2
        )
        return done

    for part in np.array_split(first, 10):
        report(server, part.tolist())
    os.kill(workers_of(server)[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(workers_of(server)) < 4 or httpx.get(server.url + "/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for part in np.array_split(second, 4):
        report(server, part.tolist())

    def check(server, rows):
        found, sure = counters(server), probs.max(axis=1)
        expected = scores.score(probs[rows], truth[rows])
        assert found["rows"] == len(rows)
        assert found["correct"] == (probs[rows].argmax(axis=1) == truth[rows]).sum()
        assert found["confidence"] == pytest.approx(sure[rows].sum())
        assert found["nll"] / len(rows) == pytest.approx(expected.nll, abs=1e-6)
        assert found["brier"] / len(rows) == pytest.approx(expected.brier, abs=1e-6)
        assert ece(server) / len(rows) == pytest.approx(expected.ece, abs=1e-6)
        assert found["sets"] == found["decided"] == len(rows)
        assert found["covered"] == sum(decided[row][0] for row in rows)
        assert found["wrong"] == sum(not decided[row][2] for row in rows)
        return found

    found = check(server, first + second)
    assert found["rejected", "duplicate"] == sum(len(part) // 20 for part in [*np.array_split(first, 10), *np.array_split(second, 4)])  # fmt: skip
    assert found["lost"] == 0
    server.stop()
    server = serve(store, **options)
    server.until(200)
    report(server, third)
    check(server, third)
    assert httpx.post(server.url + "/feedback", json=dict(zip(("request_id", "row", "label"), sent[first[0]], strict=True))).status_code == 409  # fmt: skip


def test_a_label_by_its_name_and_every_kind_of_wrong_label(version, store, serve, tmp_path):
    server = serve(store, MODEPATH_FEEDBACK=f"sqlite:///{tmp_path}/feedback.db")
    server.until(200)
    with Client(server.url) as client:
        answer = client.predict(rng.random((3, *SHAPE), np.float32))
        assert client.feedback(answer.request_id, {1: 2}) == {"accepted": 1, "rejected": []}
        one = {"request_id": answer.request_id, "row": 0, "label": "dog"}
        assert httpx.post(server.url + "/feedback", json=one).json() == {"accepted": 1, "rejected": []}
        for change, status, message in (
            ({}, 409, "counted before"),
            ({"row": 3}, 400, "fewer images"),
            ({"row": 2, "label": 3}, 400, "fewer classes"),
            ({"row": 2, "label": "horse"}, 400, "not the name of a class"),
            ({"row": 2, "label": "dog", "ensemble": "nobody"}, 400, "ensemble"),
            ({"row": -1}, 400, "row"),
            ({"label": None}, 400, "label"),
            ({"label": True}, 400, "label"),
            ({"extra": 1}, 400, "extra"),
            ({"request_id": "a\0b", "label": 1}, 404, "No answer of this service"),
            ({"request_id": "f" * 24, "label": 1}, 404, "No answer of this service"),
            ({"request_id": "abc", "label": 1}, 404, "No answer of this service"),
            ({"request_id": "0" * 24, "label": 1}, 410, "older than"),
        ):
            refused = httpx.post(server.url + "/feedback", json={**one, **change})
            assert (refused.status_code, message in refused.json()["error"]) == (status, True), refused.text
        for body in (b"", b"{", b"3", b'"a"', b"[1]", b"\xff"):
            done = httpx.post(server.url + "/feedback", content=body)
            assert done.status_code == (200 if body == b"[1]" else 400)
            assert body != b"[1]" or done.json()["rejected"][0]["reason"] == "malformed"
        too_many = httpx.post(server.url + "/feedback", json=[one] * 10_001)
        assert too_many.status_code == 413
    assert counters(server)["rows"] == 2


def test_without_a_database_requests_are_answered_and_labels_are_refused(version, store, serve, tmp_path):
    (tmp_path / "file").write_text("")
    server = serve(store, MODEPATH_FEEDBACK=f"sqlite:///{tmp_path}/file/feedback.db")
    server.until(200)
    with Client(server.url, attempts=1) as client:
        answer = client.predict(rng.random((1, *SHAPE), np.float32))
        with pytest.raises(RefusedError, match="503: The database of answers"):
            client.feedback(answer.request_id, 1)
        (tmp_path / "file").unlink()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                assert client.feedback(answer.request_id, 1)["accepted"] == 1  # it waited for the database
                break
            except RefusedError:
                time.sleep(0.2)
        assert counters(server)["rows"] == 1
    assert "The database of answers fails" in server.log.read_text()
    assert "works again" in server.log.read_text()
    off = serve(store)  # the tests' servers keep nothing
    off.until(200)
    with Client(off.url) as client, pytest.raises(RefusedError, match="404: This service keeps no answers"):
        client.feedback(answer.request_id, 1)


def test_of_a_defended_ensemble_only_the_label_is_kept_and_counted(store, serve, tmp_path):
    publish(store, "path", bank=bank(points=5))
    file = tmp_path / "feedback.db"
    policies = '{"path": {"modes": ["random"]}}'
    server = serve(store, MODEPATH_FEEDBACK=f"sqlite:///{file}", MODEPATH_POLICIES=policies)
    server.until(200)
    with Client(server.url) as client:
        answer = client.predict(rng.random((2, *SHAPE), np.float32))
        assert client.feedback(answer.request_id, [0, 1])["accepted"] == 2
    with sqlite3.connect(file) as connection:
        [kept] = connection.execute("SELECT confidence, probs, sets, answered FROM answers").fetchall()
    assert kept == (None,) * 4
    found = counters(server)
    assert found["rows"] == 2
    assert (found.get("confidence", 0), found.get("nll", 0)) == (0, 0)


def test_images_are_kept_if_the_operator_asks(version, store, serve, tmp_path):
    url = f"sqlite:///{tmp_path}/feedback.db"
    server = serve(
        store, MODEPATH_FEEDBACK=url, MODEPATH_FEEDBACK_IMAGES="0.2", MODEPATH_FEEDBACK_IMAGES_OF="uncertain"
    )
    server.until(200)
    images = rng.random((300, *SHAPE), np.float32)
    with Client(server.url) as client:
        answer = client.predict(images)
        client.feedback(answer.request_id, answer.labels.tolist())
    server.stop()
    entropy = answer.uncertainty["predictive_entropy"]
    with sqlite3.connect(tmp_path / "feedback.db") as connection:
        rows = sorted(row for (row,) in connection.execute("SELECT row FROM images"))
    assert 0.1 * 300 < len(rows) < 0.3 * 300
    assert entropy[rows].min() > np.delete(entropy, rows).max()
    command = [sys.executable, "-m", "modepath", "feedback", "export", str(tmp_path / "photos"), "--database", url]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MODELS_STORE": str(store.root)})
    assert done.returncode == 0, done.stderr
    assert f"{len(rows)} labelled images in" in done.stdout
    for row in rows:
        name = version.manifest.classes[answer.labels[row]]
        read = Image.open(tmp_path / "photos" / "labelled" / name / f"{answer.request_id}-{row}.png")
        assert np.asarray(read) / 255 == pytest.approx(images[row, 0], abs=0.003)
    assert not (tmp_path / "photos" / "unlabelled").exists()
