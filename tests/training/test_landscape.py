import csv
import json

import numpy as np
import pytest

from models_store.graphs.runtime import EnsembleSession
from tests.training.conftest import SMALL
from training import csgmcmc, data, fge, independent, landscape, snapshot
from training.errors import ConfigError
from training.measurement.figures.plane import Plane
from training.members.metrics import accuracy


def test_the_planes_coordinates_are_distances_and_its_points_are_affine():
    rng = np.random.default_rng(0)
    three = rng.normal(size=(3, 50))
    plane = Plane.through(three)
    for i in range(3):
        for j in range(3):
            distance = np.linalg.norm(three[i] - three[j])
            assert np.linalg.norm(plane.corners[i] - plane.corners[j]) == pytest.approx(distance)
    assert plane.coefficients(plane.corners) == pytest.approx(np.eye(3), abs=1e-12)
    places = rng.normal(size=(20, 2)) * 5
    c = plane.coefficients(places)
    assert c.sum(axis=1) == pytest.approx(1)
    assert c @ plane.corners == pytest.approx(places)
    with pytest.raises(ConfigError, match="on one line"):
        line = np.outer([0, 1, 2], rng.normal(size=50))
        Plane.through(line)


def test_the_landscape_of_a_curve_holds_its_ends_and_goes_on_where_it_was(here, tmp_path):
    config = landscape.Config(of=("c",), grid=3, margin=0.0, train_images=64, bn_images=128, output=tmp_path / "out")
    report = landscape.run(config)
    assert np.array(report["train_loss"]).shape == (3, 3)
    rows = list(csv.DictReader((tmp_path / "out/plane.csv").read_text().splitlines()))
    first = next(row for row in rows if float(row["c1"]) == pytest.approx(1))
    assert float(first["x"]) == pytest.approx(0)
    along = report["path"]
    assert along[0] == pytest.approx([0, 0], abs=1e-9)
    assert along[-1] == pytest.approx(report["corners"][1])
    before = (tmp_path / "out/plane.jsonl").read_text()
    assert json.dumps(landscape.run(config)) == json.dumps(report)
    assert (tmp_path / "out/plane.jsonl").read_text() == before
    assert (tmp_path / "out/plane.png").stat().st_size > 1000
    three = landscape.run(
        landscape.Config(of=("c/0", "c/2", "c/1"), grid=2, train_images=64, bn_images=128, output=tmp_path / "three")
    )
    assert three["path"] is None


def test_the_run_of_an_fge_ensemble_is_trained_again_to_the_same_members(tmp_path):
    version = fge.run(fge.Config(name="f", epochs=5, members=2, **SMALL))
    report = landscape.run(landscape.Config(of=("f",), each_cycle=4, output=tmp_path / "out"))
    members = [row for row in report["rows"] if row["member"]]
    assert len(members) == len(version.manifest.members)
    found = data.load(fge.Config(**SMALL).data_options())
    images, labels = data.as_arrays(found.test)
    probs = EnsembleSession(version.folder, version.manifest).member_probs(images)
    subset_errors = [1 - accuracy(one, labels) for one in probs]
    assert [row["test_error"] for row in members] == pytest.approx(subset_errors, abs=1e-9)
    assert report["rows"][0]["distance"] == pytest.approx(0, abs=1e-9)
    assert all(row["distance"] > 0 for row in report["rows"][1:])
    assert all(row["rate"] == pytest.approx(5e-4) for row in members)


@pytest.mark.parametrize(
    ("method", "options"),
    [(snapshot, {"cycles": 2}), (csgmcmc, {"cycles": 2, "samples": 2})],
    ids=["snapshot", "csgmcmc"],
)
def test_any_run_that_collected_members_is_drawn(method, options, tmp_path):
    version = method.run(method.Config(name="run", epochs=4, keep_all_members=True, **options, **SMALL))
    report = landscape.run(landscape.Config(of=("run",), each_cycle=3, output=tmp_path / "out"))
    members = [row for row in report["rows"] if row["member"]]
    assert [row["epoch"] for row in members] == pytest.approx([m.origin.epoch for m in version.manifest.members])
    probs = EnsembleSession(version.folder, version.manifest).member_probs
    images, labels = data.as_arrays(data.load(fge.Config(**SMALL).data_options()).test)
    errors = [1 - accuracy(one, labels) for one in probs(images)]
    assert [row["test_error"] for row in members] == pytest.approx(errors, abs=1e-9)
    assert (tmp_path / f"out/{method.Config.method}-run.png").stat().st_size > 1000


def test_networks_that_were_trained_apart_have_no_run_to_draw(tmp_path):
    independent.run(independent.Config(name="apart", epochs=1, runs=2, **SMALL))
    with pytest.raises(ConfigError, match="nor an ensemble collected along a run"):
        landscape.run(landscape.Config(of=("apart",), output=tmp_path / "out"))
    snapshot.run(snapshot.Config(name="single", epochs=1, cycles=1, **SMALL))
    with pytest.raises(ConfigError, match="do not lie along one run"):
        landscape.run(landscape.Config(of=("single",), output=tmp_path / "out"))
