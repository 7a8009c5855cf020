"""A real Prometheus scrapes a real service with several workers, using the deployed configuration."""

import shutil
import subprocess
import time

import httpx
import numpy as np
import pytest
import yaml

from service.client import Client
from tests.onnx_members import SHAPE, publish
from tests.service.conftest import ROOT, free_port

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Debian's package prometheus is not installed"
)


def test_it_sums_the_workers_and_accepts_the_rules(store, serve, tmp_path):
    publish(store, "animals")
    metrics_port, port = free_port(), free_port()
    server = serve(store, MODEPATH_WORKERS="2", MODEPATH_METRICS_PORT=str(metrics_port))
    server.until(200)
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{metrics_port}"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(ROOT / "deploy/alerts.yml", tmp_path)
    with Client(server.url) as client:
        for _ in range(50):
            client.predict(np.random.default_rng(0).random((3, *SHAPE)))
    with (tmp_path / "log").open("w") as log:
        prometheus = subprocess.Popen(
            [
                "prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip

    def ask(query):
        found = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}).json()["data"]["result"]
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in found}

    try:
        for _ in range(300):
            try:
                if ask("sum(modepath_confidence_ratio_count)").get(frozenset()) == 150:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        assert ask("sum(modepath_confidence_ratio_count)") == {frozenset(): 150}
        assert ask("sum(modepath_predictions_total)") == {frozenset(): 150}
        assert ask("sum(modepath_queue_seconds_count)") == {frozenset(): 50}
        groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        rules = groups[0]["rules"]
        assert len(rules) == 5
        assert not [rule["lastError"] for rule in rules if rule.get("lastError")]
    finally:
        prometheus.terminate()
        prometheus.wait(20)
