"""Prediction sets, abstention and novelty over HTTP, against a computation from the published files."""

import json
import time

import httpx
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from models_store.__main__ import main
from models_store.decisions import abstention, calibrating, conformal
from models_store.decisions.calibration import load_answers, uniform
from models_store.graphs.runtime import EnsembleSession
from service.client import Client, RefusedError
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import bank, linear, publish

SURE = 0.1  # temperature of the labels: the members are mostly right
new, labels = labelled(400, seed=9, temperature=SURE)


@pytest.fixture
def calibrated(store):
    """Versions of `animals`, with a policy for each kind of access; and one that is not calibrated."""
    x, y = labelled(2000, temperature=SURE)
    published = {}
    for name, seeds in (("animals", (0, 1, 2)), ("rounded", (0, 1, 2)), ("careful", (0, 1, 2)), ("open", (0, 1, 2))):
        version = publish(store, name, seeds=seeds, bank=bank(points=6) if name == "open" else None)
        published[name] = calibrating.calibrate(store, version, calibrating.Labelled(x, y, "these"))
    publish(store, "plain", seeds=(7, 8))
    return published


POLICIES = {
    "rounded": {"probabilities": 2},
    "careful": {"risk": 0.45},
    "open": {"modes": ["average", "random", "keyed"], "probabilities": "exact"},
}


def answers_of(version):
    record = version.manifest.calibration
    return load_answers(version.folder, record.ways, record.images, 3)


def distances(version, images):
    """The novelty of images as FORMAT.md defines it; the features of a linear member are its pixels."""
    kept = load_file(version.folder / "novelty.safetensors")
    mapped = images.reshape(len(images), -1).astype(float) @ kept["map"] + kept["shift"]
    return np.square(mapped[:, None] - kept["means"]).sum(axis=2).min(axis=1)


def test_decisions_are_those_of_the_published_files(calibrated, store, serve):
    server = serve(store, MODEPATH_POLICIES=json.dumps(POLICIES), MODEPATH_DEFAULT="animals")
    server.until(200)
    version = calibrated["animals"]
    kept = answers_of(version)["average"]
    session = EnsembleSession(version.folder, version.manifest)
    expected = session.combine(session.member_probs(new))
    with Client(server.url) as client:
        for method in conformal.METHODS:
            for per_class in (False, True):
                options = {"coverage": 0.9, "set_method": method, "per_class": per_class, "allow_empty": True}
                answer = client.predict(new, **options)
                values = conformal.scores(expected.mean_probs, method, uniform(new))
                limit = (
                    conformal.thresholds_by_class(kept.scores[method], kept.labels, 3, 0.9)
                    if per_class
                    else conformal.threshold(np.sort(kept.scores[method]), 0.9)
                )
                sets = [set(np.flatnonzero(row)) for row in values <= limit]
                assert [set(one) for one in answer.prediction_sets or ()] == sets
                covered = np.mean([label in one for label, one in zip(labels, sets, strict=True)])
                assert 0.85 < covered < 0.95
        answer = client.predict(new, coverage=0.5)
        assert all(answer.prediction_sets or ())  # not empty, unless asked
        assert all(one[0] == label for one, label in zip(answer.prediction_sets or (), answer.labels, strict=True))
        # The same image always gets the same set, although the sets of aps are randomised.
        first, again = (client.predict(new[:20], coverage=0.9, set_method="aps").prediction_sets for _ in range(2))
        assert first == again

        risk = 0.4
        answer = client.predict(new, risk=risk)
        far = distances(version, new)
        novel = 1 + (kept.novelty[:, None] >= far).sum(axis=0) <= 0.01 * 1001
        own = 1 + (kept.novelty[:, None] >= kept.novelty).sum(axis=0) <= 0.01 * 1001
        limit = abstention.threshold(kept.uncertainty["confidence"][~own], kept.wrong[~own], risk).confidence
        for row in range(len(new)):
            given = expected.confidence[row] > limit and not novel[row]
            assert answer.decisions[row] == ("predict" if given else "abstain")
            assert answer.reasons[row] == (None if given else "unlike_training" if novel[row] else "uncertain")
        assert {"predict", "abstain"} == set(answer.decisions)
        by_cost = client.predict(new, wrong_cost=10, review_cost=4)
        assert [one == "predict" for one in by_cost.decisions or ()] == ((expected.confidence > 0.6) & ~novel).tolist()

        answer = client.predict(new, percentiles=True)
        share = (kept.novelty[:, None] <= far).mean(axis=0)
        assert answer.novelty["percentile"] == pytest.approx(100 * share, abs=0.1)
        assert answer.novelty["score"] == pytest.approx(far, rel=1e-4)
        least_sure = (kept.uncertainty["confidence"][:, None] >= expected.confidence).mean(axis=0)
        assert answer.percentiles["confidence"] == pytest.approx(100 * least_sure, abs=0.1)

        careful = client.predict(new, ensemble="careful")
        assert set(careful.decisions) <= {"predict", "abstain"}  # by the operator's risk, without asking
        wrong = (
            careful.labels[np.array(careful.decisions) == "predict"] != labels[np.array(careful.decisions) == "predict"]
        )
        assert wrong.mean() < 0.55
        plain = client.predict(new, ensemble="plain")
        assert (plain.novelty, plain.decisions, plain.prediction_sets) == (None, None, None)
        listed = {one["name"]: one["calibration"] for one in client.ensembles()}
        assert listed["plain"] is None
        assert listed["animals"]["images"] == 1000
        assert listed["animals"]["most_coverage"] == pytest.approx(1000 / 1001)
        assert "source" not in str(listed)

        for options, status, message in (
            ({"coverage": 1.0}, 400, "coverage"),
            ({"coverage": 0.0}, 400, "coverage"),
            ({"coverage": 0.9999}, 400, "guarantee a coverage of at most 0.999"),
            ({"risk": -1}, 400, "risk"),
            ({"risk": 1e-4}, 400, "No confidence of animals guarantees a risk"),
            ({"risk": 0.4, "wrong_cost": 2, "review_cost": 1}, 400, "not by both"),
            ({"wrong_cost": 2}, 400, "needs both"),
            ({"wrong_cost": 1, "review_cost": 2}, 400, "smaller than"),
            ({"set_method": "aps"}, 400, "give its `coverage`"),
            ({"coverage": 0.9, "set_method": "best"}, 400, "set_method"),
            ({"coverage": 0.9, "ensemble": "plain"}, 400, "models_store calibrate plain"),
            ({"coverage": 0.9, "ensemble": "rounded"}, 403, "would reveal"),
        ):
            with pytest.raises(RefusedError, match=message) as refused:
                client.predict(new[:1], **options)
            assert refused.value.status == status
        rounded = client.predict(new[:3], ensemble="rounded")
        assert rounded.novelty is None

    metrics = httpx.get(server.url + "/metrics").text
    assert 'modepath_decisions_total{decision="uncertain",ensemble="animals",mode="average",version="2"}' in metrics
    assert 'modepath_prediction_set_classes_count{ensemble="animals",mode="average",version="2"}' in metrics


def test_modes_that_draw_a_network_are_calibrated_on_their_own_answers(calibrated, store, serve):
    server = serve(store, MODEPATH_POLICIES=json.dumps(POLICIES), MODEPATH_DEFAULT="open")
    server.until(200)
    x, y = labelled(1500, seed=11, temperature=SURE)
    with Client(server.url) as client:
        for mode in ("random", "keyed"):
            parts = [
                client.predict(x[i : i + 250], mode=mode, coverage=0.8, allow_empty=True) for i in range(0, 1500, 250)
            ]
            sets = [one for part in parts for one in part.prediction_sets or ()]
            covered = np.mean([label in one for label, one in zip(y, sets, strict=True)])
            assert covered == pytest.approx(0.8, abs=0.05)
    bodies = {
        len(
            httpx.post(
                server.url + "/predict", json={"inputs": x[i : i + 1].tolist(), "mode": "random", "coverage": 0.9}
            ).content
        )
        for i in range(20)
    }
    assert len(bodies) == 1  # as long as one another, whatever the set holds


def test_a_version_that_cannot_keep_the_risk_of_the_policy_is_not_served_and_the_one_before_stays(
    calibrated, store, serve
):
    policies = {"careful": {"risk": 0.45}, "plain": {"risk": 0.02}, "quiet": {"uncertainty": False}}
    calibrating.calibrate(store, publish(store, "quiet"), calibrating.Labelled(*labelled(200), "these"))
    server = serve(store, MODEPATH_POLICIES=json.dumps(policies), MODEPATH_DEFAULT="careful")
    server.until(200)
    with Client(server.url, attempts=1) as client:
        assert set(client.predict(new[:20]).decisions or ()) <= {"predict", "abstain"}
        with pytest.raises(RefusedError, match="503"):
            client.predict(new[:1], ensemble="plain")
        assert "The policy limits the risk of plain, which is not calibrated" in server.log.read_text()
        publish(store, "careful")  # version 3, without a calibration, becomes active
        deadline = time.monotonic() + 30
        while "The policy limits the risk of careful" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answer = client.predict(new[:20])
        assert (answer.version, answer.decisions is None) == (2, False)
        # Percentiles are uncertainty by another name.
        with pytest.raises(RefusedError, match="403: The operator does not show the uncertainty of quiet"):
            client.predict(new[:1], ensemble="quiet", percentiles=True)
        # Not a number that overflows, but a risk that nothing can guarantee.
        with pytest.raises(RefusedError, match="400: No confidence of animals guarantees a risk of 1e-310"):
            client.predict(new[:1], ensemble="animals", risk=1e-310)


def test_foreign_models_are_imported_calibrated_from_an_npz_file_and_then_decide_and_cascade(store, serve, tmp_path):
    for k in range(3):
        onnx.save(linear(k, input_name="x", output_name="scores"), tmp_path / f"{k}.onnx")
    x, y = labelled(2000, temperature=SURE)
    np.savez(tmp_path / "held-out.npz", x=x, y=y)
    command = ["--store", str(store.root)]
    assert main([*command, "import", "foreign", *(str(tmp_path / f"{k}.onnx") for k in range(3))]) == 0
    assert main([*command, "calibrate", "foreign", "--dataset", f"npz:{tmp_path / 'held-out.npz'}"]) == 0
    server = serve(store, MODEPATH_POLICIES=json.dumps({"foreign": {"modes": ["average", "cascade"]}}))
    server.until(200)
    with Client(server.url) as client:
        answer = client.predict(new, coverage=0.9, allow_empty=True)
        covered = [label in one for label, one in zip(labels, answer.prediction_sets or (), strict=True)]
        assert np.mean(covered) == pytest.approx(0.9, abs=0.05)
        exact = client.predict(new, mode="cascade", rule="exact")
        assert exact.labels.tolist() == answer.labels.tolist()
        assert exact.members_used_by_row.mean() < 3
