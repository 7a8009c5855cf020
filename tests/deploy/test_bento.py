"""Build a bento, unpack it, and serve it from the unpacked folder."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

from models_store.store import Store
from models_store.uncertainty import softmax
from service.client import Client
from tests.onnx_members import SHAPE, linear, linear_logits, publish
from tests.service.conftest import ROOT, Server

images = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)


def build(store, out, home, name="animals"):
    return subprocess.run(
        [sys.executable, "-m", "deploy.bento", name, "--out", out],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "MODELS_STORE": str(store.root), "BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bento")
    store = Store(folder / "store")
    publish(store, "animals", seeds=(0, 1, 2))
    publish(store, "other")
    done = build(store, folder / "out", folder / "home")
    assert done.returncode == 0, done.stderr
    assert "pip install -r" in done.stdout
    return folder / "out" / "modepath-animals-1"


def test_it_holds_the_code_and_the_one_ensemble_and_nothing_of_training(built):
    files = {path.relative_to(built / "src").as_posix() for path in (built / "src").rglob("*") if path.is_file()}
    assert {"service/app.py", "models_store/store.py", "models_store/ensembles/animals/active"} <= files
    assert not [
        file for file in files if "other" in file or file.startswith(("training", "tests")) or "__pycache__" in file
    ]
    assert "/predict" in (built / "README.md").read_text()
    store = Store(built / "src/models_store/ensembles")
    assert store.activation_order() == ["animals"]
    store.verify(store.load("animals"))


def test_its_requirements_are_what_the_service_needs_at_the_versions_of_here(built):
    lines = (built / "env/python/requirements.txt").read_text().splitlines()
    found = {requirement.name: requirement for requirement in map(Requirement, lines)}
    assert {"bentoml", "onnxruntime-gpu", "pillow", "orjson", "starlette"} <= set(found)
    assert not {"torch", "torchvision"} & set(found)
    assert str(found["bentoml"].specifier) == f"=={importlib.metadata.version('bentoml')}"


def test_it_serves_from_where_it_lies(built, tmp_path):
    settings = yaml.safe_load((built / "bento.yaml").read_text())
    assert settings["service"] == "service.bento:Modepath"
    server = Server(None, tmp_path, bento=built)
    try:
        server.until(200)
        with Client(server.url) as client:
            answer = client.predict(images)
            expected = np.mean([softmax(linear_logits(linear(seed), images)) for seed in (0, 1, 2)], axis=0)
            assert answer.probs == pytest.approx(expected, abs=1e-5)
            assert [e["name"] for e in client.ensembles()] == ["animals"]
    finally:
        server.stop()


def test_what_is_not_published_is_told(built, tmp_path):
    done = build(Store(tmp_path / "empty"), tmp_path / "out", tmp_path / "home", "nope")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_unpacked_bento_is_not_written_over(built):
    store = Store(built.parents[1] / "store")
    done = build(store, built.parent, built.parents[1] / "home")
    assert done.returncode == 1
    assert "exists already" in done.stderr


def test_what_deploys_names_files_and_settings_that_exist():
    from service.operations.settings import Settings

    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    service = compose["services"]["modepath"]
    known = {f"MODEPATH_{name.upper()}" for name in Settings.model_fields}
    assert set(service["environment"]) <= known
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for name in ("prometheus", "grafana"):
        for volume in compose["services"][name]["volumes"]:
            assert (ROOT / "deploy" / volume.split(":")[0]).is_file()
    mounted = {volume.split(":")[1].rsplit("/", 1)[1] for volume in compose["services"]["prometheus"]["volumes"]}
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    assert set(prometheus["rule_files"]) | {"prometheus.yml"} == mounted
    # Grafana reads the Prometheus of this file, at the port that its image listens on, and finds the dashboard.
    [source] = yaml.safe_load((ROOT / "deploy/grafana/datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:" + compose["services"]["prometheus"]["ports"][0].rsplit(":", 1)[1]
    [provider] = yaml.safe_load((ROOT / "deploy/grafana/provider.yml").read_text())["providers"]
    assert any(
        volume.split(":")[1].startswith(provider["options"]["path"])
        for volume in compose["services"]["grafana"]["volumes"]
    )
    # The volume of the feedback database is declared, and its folder belongs to the user of the image.
    place = service["environment"]["MODEPATH_FEEDBACK"].removeprefix("sqlite:///")
    [volume] = service["volumes"]
    assert place.startswith(volume.split(":")[1] + "/")
    assert volume.split(":")[0] in compose["volumes"]
    assert f"install -d -o 10001 {volume.split(':')[1]}" in (ROOT / "deploy/Containerfile").read_text()
    scrape = prometheus["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"modepath:{service['environment']['MODEPATH_METRICS_PORT']}"]
    for rules in yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]:
        assert rules["rules"]
    assert Path(ROOT / "deploy/Containerfile").read_text().count("${BENTO}") == 2
