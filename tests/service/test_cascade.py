"""The mode `cascade` over HTTP, against a sequential computation from the published ONNX files."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from models_store.decisions import calibrating
from models_store.graphs.runtime import MemberSession
from models_store.uncertainty import combine, softmax
from service.client import Client, RefusedError
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import SHAPE, publish

MEMBERS = 8


def reference(version, images, rule):
    """Probabilities, labels, members used, and how near a row was to another decision; one image after another, one member after another."""
    manifest = version.manifest
    cascade = manifest.calibration.cascade
    sessions = [MemberSession(version.folder / manifest.members[k].file, "cpu", threads=1) for k in cascade.order]
    weights = np.array([manifest.members[k].weight for k in cascade.order])
    found = []
    for image in images:
        logits, label, confidence, count = [], 0, 0.0, 0
        own = combine(np.full((1, 1, 3), 1 / 3), np.ones(1))
        nearest = np.inf
        for number, size in enumerate(cascade.groups):
            logits += [s.logits(image[None])[0] for s in sessions[len(logits) : len(logits) + size]]
            ran, count = np.array(logits)[:, None], len(logits)
            own = combine(softmax(ran, cascade.temperatures[number]), weights[:count] / weights[:count].sum())
            label, confidence = own.label[0], own.confidence[0]
            if count < len(sessions):
                if rule == "calibrated":
                    first, second = np.sort(own.mean_probs[0])[::-1][:2]
                    decided = first - second - cascade.margins[number]
                else:
                    sums = (weights[:count, None] * softmax(ran, manifest.temperature)[:, 0]).sum(axis=0)
                    label, confidence = sums.argmax(), own.mean_probs[0, sums.argmax()]
                    first, second = np.sort(sums)[::-1][:2]
                    decided = first - second - weights[count:].sum()
                nearest = min(nearest, abs(decided))
                if decided > 0:
                    break
        found.append((own.mean_probs[0], label, confidence, count, nearest))
    probs, labels, confidence, used, nearest = map(np.array, zip(*found, strict=True))
    return probs, labels, confidence, used, nearest


@pytest.fixture
def version(store):
    x, y = labelled(12_000, temperature=0.1)
    # Sharp members, of which most agree on most images.
    plain = publish(store, "many", seeds=(0, 0, 1, 0, 0, 2, 0, 3), temperature=0.05)
    return calibrating.calibrate(store, plain, calibrating.Labelled(x, y, "these"))


def test_answers_of_many_clients_are_those_of_a_sequential_cascade(version, store, serve):
    policies = {"many": {"modes": ["cascade", "average"]}}
    server = serve(store, MODEPATH_POLICIES=json.dumps(policies), MODEPATH_WORKERS="1")
    server.until(200)
    rng = np.random.default_rng(0)
    images = rng.random((1500, *SHAPE), np.float32)
    expected = {rule: reference(version, images, rule) for rule in ("calibrated", "exact")}
    safe = {rule: np.flatnonzero(found[4] > 1e-5) for rule, found in expected.items()}  # rounding may decide others
    assert min(map(len, safe.values())) > 1400
    assert len(set(expected["calibrated"][3].tolist())) > 1
    requests = []
    for number in range(2000):
        rule = "exact" if number % 4 == 0 else "calibrated"
        requests.append((rule, rng.choice(safe[rule], rng.integers(1, 65))))

    def ask(numbers):
        with Client(server.url, timeout=60) as client:
            for number in numbers:
                rule, rows = requests[number]
                answer = client.predict(images[rows], mode="cascade", rule=rule)
                probs, labels, confidence, used, _ = expected[rule]
                assert answer.probs == pytest.approx(probs[rows], abs=1e-5)
                assert answer.labels.tolist() == labels[rows].tolist()
                assert answer.confidence == pytest.approx(confidence[rows], abs=1e-5)
                assert answer.members_used_by_row.tolist() == used[rows].tolist()
        return len(numbers)

    with ThreadPoolExecutor(32) as clients:
        assert sum(clients.map(ask, np.array_split(np.arange(2000), 32))) == 2000
    with Client(server.url) as client:
        images, expected_used = images[:1000], expected["calibrated"][3][:1000]
        average = client.predict(images, mode="average")
        exact = client.predict(images, mode="cascade", rule="exact")
        assert exact.labels.tolist() == average.labels.tolist()  # by construction, for every image
        calibrated = client.predict(images, mode="cascade")
        bound = client.ensembles()[0]["calibration"]["cascade_disagreement"]
        assert bound == pytest.approx(0.001)
        assert (calibrated.labels != average.labels).mean() <= 5 * bound
        assert calibrated.members_used_by_row.mean() == pytest.approx(expected_used.mean(), abs=0.1)
        assert expected_used.mean() < 0.95 * MEMBERS
        # Rows that needed all members are answered as by `average`.
        everyone = calibrated.members_used_by_row == MEMBERS
        assert everyone.any()
        assert calibrated.probs[everyone] == pytest.approx(average.probs[everyone], abs=1e-6)
        assert calibrated.uncertainty["mutual_information"][everyone] == pytest.approx(
            average.uncertainty["mutual_information"][everyone], abs=1e-6
        )
        for options, message in (
            ({"members": True}, "does not run all members"),
            ({"coverage": 0.9}, "in mode 'average'"),
            ({"rule": "best"}, "rule"),
        ):
            with pytest.raises(RefusedError, match=message) as refused:
                client.predict(images[:1], mode="cascade", **options)
            assert refused.value.status == 400
        with pytest.raises(RefusedError, match="400: `rule` belongs to the mode 'cascade'"):
            client.predict(images[:1], mode="average", rule="exact")
    metrics = httpx.get(server.url + "/metrics").text
    count = next(
        line
        for line in metrics.splitlines()
        if line.startswith('modepath_members_used_count{ensemble="many",mode="cascade",version="2"}')
    )
    assert float(count.split()[-1]) == sum(len(rows) for _, rows in requests) + 2 * len(images)


def test_versions_without_a_guarantee_give_the_exact_cascade_only_and_uncalibrated_ones_none(store, serve):
    x, y = labelled(60)
    calibrating.calibrate(store, publish(store, "few"), calibrating.Labelled(x, y, "these"))
    publish(store, "plain")
    server = serve(store, MODEPATH_POLICIES=json.dumps({"*": {"modes": ["average", "cascade"]}}))
    server.until(200)
    with Client(server.url) as client:
        few = {"ensemble": "few", "mode": "cascade"}
        assert (
            client.predict(x[:5], rule="exact", **few).labels.tolist()
            == client.predict(x[:5], ensemble="few").labels.tolist()
        )
        with pytest.raises(RefusedError, match="400: few was calibrated on too few images"):
            client.predict(x[:5], **few)
        with pytest.raises(RefusedError, match="400: plain has no cascade"):
            client.predict(x[:5], ensemble="plain", mode="cascade")
