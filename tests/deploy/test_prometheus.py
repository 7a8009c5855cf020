"""A real Prometheus scrapes a real service with several workers, using the deployed configuration, rules and dashboard."""

import json
import re
import shutil
import subprocess
import time

import httpx
import numpy as np
import pytest
import yaml

from models_store import scores
from models_store.decisions import calibrating
from service.client import Client
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import SHAPE, publish
from tests.service.conftest import ROOT, free_port

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Debian's package prometheus is not installed"
)
DASHBOARD = json.loads((ROOT / "deploy/grafana/modepath.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_rules_fire_when_they_should_and_only_then():
    done = subprocess.run(
        ["promtool", "test", "rules", ROOT / "tests/deploy/rules_test.yml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = (ROOT / "tests/deploy/rules_test.yml").read_text()
    for group in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert tested.count(f"alertname: {rule['alert']}\n") + tested.count(f"alertname: {rule['alert']},") == 2


def test_metrics_that_rules_and_the_dashboard_name_exist():
    from service.operations import metrics

    exist = {sample for family in metrics._own.collect() for sample in _samples(family)}
    exist.add("modepath_metrics_incomplete")
    recorded = set()
    texts = list(QUERIES)
    for file in ("rules.yml", "alerts.yml"):
        for group in yaml.safe_load((ROOT / "deploy" / file).read_text())["groups"]:
            recorded |= {rule["record"] for rule in group["rules"] if "record" in rule}
            texts += [rule["expr"] for rule in group["rules"]]
    for text in texts:
        used = set(re.findall(r"modepath[_:][\w:]+", text))
        assert used <= exist | recorded, used - exist - recorded


def _samples(family):
    if family.type == "histogram":
        return {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    return {f"{family.name}_total"}


class Prometheus:
    """A Prometheus with the deployed files, scraping one service every second."""

    def __init__(self, folder, metrics_port):
        config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{metrics_port}"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for file in config["rule_files"]:
            shutil.copy(ROOT / "deploy" / file, folder)
        self.url = f"http://127.0.0.1:{free_port()}"
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ask(self, query):
        """The value of each series, by its labels."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in answer["data"]["result"]}

    def until(self, holds, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if holds():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError("not within the time")

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def watched(store, serve, tmp_path):
    """Start a service with two workers, and a Prometheus that scrapes it."""
    started = []

    def watched(**environment):
        port = free_port()
        server = serve(store, MODEPATH_WORKERS="2", MODEPATH_METRICS_PORT=str(port), **environment)
        server.until(200)
        started.append(Prometheus(tmp_path, port))
        return server, started[-1]

    yield watched
    for one in started:
        one.stop()


def only(found):
    """The value of the only series; NaN while there is none."""
    [value] = found.values() or [np.nan]
    return value


def test_it_sums_the_workers_and_accepts_the_rules(store, watched):
    publish(store, "animals")
    server, prometheus = watched()
    with Client(server.url) as client:
        for _ in range(50):
            client.predict(np.random.default_rng(0).random((3, *SHAPE)))
    prometheus.until(lambda: prometheus.ask("sum(modepath_confidence_ratio_count)").get(frozenset()) == 150)
    assert prometheus.ask("sum(modepath_predictions_total)") == {frozenset(): 150}
    assert prometheus.ask("sum(modepath_queue_seconds_count)") == {frozenset(): 50}
    groups = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in groups) == 22
    assert not [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")]


def test_scores_by_labels_are_those_of_the_answers_and_every_panel_has_a_query_that_runs(store, watched, tmp_path):
    x, y = labelled(1000, temperature=0.3)
    calibrating.calibrate(store, publish(store, "animals"), calibrating.Labelled(x, y, "these"))
    server, prometheus = watched(MODEPATH_FEEDBACK=f"sqlite:///{tmp_path}/feedback.db")
    rng = np.random.default_rng(0)
    images, truth = labelled(300, seed=7, temperature=0.3)
    with Client(server.url) as client:
        client.predict(images[:1], coverage=0.9, risk=0.45)  # so that the counters are there before they are increased
        prometheus.until(lambda: only(prometheus.ask("count(modepath_feedback_rows_total)")) > 0)
        time.sleep(2.5)  # until a second scrape has them
        answers = [client.predict(images[i : i + 3], coverage=0.9, risk=0.45) for i in range(0, 300, 3)]
        for number in rng.permutation(100).tolist():
            client.feedback(answers[number].request_id, truth[3 * number : 3 * number + 3].tolist())
    probs = np.concatenate([answer.probs for answer in answers if answer.probs is not None])
    expected = scores.score(probs, truth)
    prometheus.until(lambda: only(prometheus.ask("sum(modepath_feedback_rows_total)")) == 300)

    def recorded():
        found = prometheus.ask('{__name__=~"modepath:(accuracy|nll|brier|ece):feedback1d"}')
        return {dict(labels)["__name__"].split(":")[1]: value for labels, value in found.items()}

    prometheus.until(lambda: recorded().get("accuracy") == pytest.approx(expected.accuracy, abs=1e-6))
    time.sleep(3)
    assert recorded() == pytest.approx(
        {"accuracy": expected.accuracy, "nll": expected.nll, "brier": expected.brier, "ece": expected.ece}, abs=1e-6
    )
    chosen = [one for answer in answers for one in answer.prediction_sets or ()]
    covered = np.mean([label in one for label, one in zip(truth.tolist(), chosen, strict=True)])
    assert only(prometheus.ask("modepath:coverage:feedback1d")) == pytest.approx(covered, abs=1e-6)
    given = np.array([one == "predict" for answer in answers for one in answer.decisions or ()])
    wrong = (probs.argmax(axis=1) != truth)[given].mean()
    assert only(prometheus.ask("modepath:risk:feedback1d")) == pytest.approx(wrong, abs=1e-6)
    assert only(prometheus.ask("modepath:accuracy:estimated1h")) == pytest.approx(probs.max(axis=1).mean(), abs=0.01)
    empty = []
    for query in QUERIES:
        filled = query.replace("$ensemble", ".*").replace("$mode", ".*")
        if not prometheus.ask(filled) and "> 0" not in query and "psi" not in query:  # it needs more rows
            empty.append(query)
    assert empty == []


def test_changed_images_raise_the_alert_and_unchanged_ones_do_not(store, watched):
    x, y = labelled(2000, temperature=0.3)
    calibrating.calibrate(store, publish(store, "animals"), calibrating.Labelled(x, y, "these"))
    server, prometheus = watched()

    def firing():
        found = httpx.get(f"{prometheus.url}/api/v1/alerts").json()["data"]["alerts"]
        return {(one["labels"]["alertname"], one["labels"].get("measure")) for one in found if one["state"] == "firing"}

    with Client(server.url) as client:
        for number in range(40):
            client.predict(labelled(40, seed=100 + number)[0])
            time.sleep(0.1)
        prometheus.until(lambda: only(prometheus.ask("sum(modepath_drift_rows_total)")) > 500)
        assert ("ModepathDrift", "input_std") not in firing()
        began = time.monotonic()
        while ("ModepathDrift", "input_std") not in firing():
            blurred = 0.5 + 0.5 * (labelled(40, seed=500 + int(10 * time.monotonic()))[0] - 0.5)
            client.predict(blurred)
            time.sleep(0.1)
            assert time.monotonic() - began < 90
    assert "has changed since calibration" in server.log.read_text()
