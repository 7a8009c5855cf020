"""Versions are calibrated through the runtime that serves them, and published as new versions."""

import json

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from models_store.__main__ import main
from models_store.decisions import calibrating, conformal
from models_store.decisions.calibration import Calibration, halves, load_answers
from models_store.errors import CorruptionError, ManifestError, StoreError
from models_store.graphs.runtime import EnsembleSession
from models_store.manifest import Manifest
from models_store.store import Store
from models_store.uncertainty import combine, softmax
from tests.onnx_members import SHAPE, bank, linear, linear_logits, point_logits, publish


def labelled(images=300, seed=0, temperature=2.0):
    """Images whose classes are drawn from the mean of the members 0, 1 and 2 at a temperature."""
    rng = np.random.default_rng(seed)
    x = rng.random((images, *SHAPE), np.float32)
    probs = softmax(np.stack([linear_logits(linear(k), x) for k in range(3)]), temperature).mean(axis=0)
    return x, (probs.cumsum(axis=1) < rng.random((images, 1))).sum(axis=1).clip(0, 2)


def test_foreign_members_are_calibrated_from_an_npz_file(store, tmp_path, capsys):
    for k in range(3):
        onnx.save(linear(k), tmp_path / f"{k}.onnx")
    x, y = labelled(2000)
    np.savez(tmp_path / "held-out.npz", x=x, y=y)
    command = ["--store", str(store.root)]
    assert main([*command, "import", "pets", *(str(tmp_path / f"{k}.onnx") for k in range(3))]) == 0
    assert main([*command, "calibrate", "pets", "--dataset", f"npz:{tmp_path / 'held-out.npz'}"]) == 0
    assert "published pets@2: calibrated on 1000 of 2000 images" in capsys.readouterr().out
    version = store.load("pets")
    store.verify(version)
    record = version.manifest.calibration
    assert version.manifest.schema_version == 2
    assert version.manifest.temperature == pytest.approx(2, abs=0.5)
    assert record.ways == ["average", "drawn"]
    own = softmax(np.stack([linear_logits(linear(k), x) for k in range(3)]), version.manifest.temperature)
    assert version.manifest.validation.nll == pytest.approx(
        -np.log(own.mean(axis=0)[np.arange(2000), y]).mean(), abs=1e-4
    )
    assert sorted(record.cascade.order) == [0, 1, 2]
    # What was measured is what the runtime answers on the second half of the images.
    _, second = halves(2000)
    session = EnsembleSession(version.folder, version.manifest)
    prediction = session.combine(session.member_probs(x[second]))
    found = load_answers(version.folder, record.ways, record.images, 3)
    assert found["average"].scores["lac"] == pytest.approx(1 - prediction.mean_probs[np.arange(1000), y[second]])
    assert (found["average"].wrong == (prediction.label != y[second])).all()
    assert found["average"].uncertainty["mutual_information"] == pytest.approx(prediction.mutual_information)
    assert store.load("pets", 1).manifest.calibration is None  # the version before stays as it was


def test_the_drawn_way_is_calibrated_on_answers_of_single_networks(store):
    """With a bank the networks are its points, each at its own temperature; each image gets one of them."""
    points = bank(points=5)
    version = publish(store, "path", bank=points)
    x, y = labelled(200)
    calibrated = calibrating.calibrate(store, version, calibrating.Labelled(x, y, "these"))
    _, second = halves(200)
    record = calibrated.manifest.calibration
    scores = load_answers(calibrated.folder, record.ways, record.images, 3)["drawn"].scores["lac"]
    alone = np.stack([softmax(point_logits(points, k, x[second]), points.temperature[k]) for k in range(5)])
    possible = 1 - alone[:, np.arange(100), y[second]]
    nearest = np.abs(possible - scores).min(axis=0)
    assert nearest.max() < 1e-5
    which = np.abs(possible - scores).argmin(axis=0)
    assert len(set(which.tolist())) == 5


def test_prediction_sets_of_a_calibrated_version_cover_new_images(store):
    x, y = labelled(6000, seed=1)
    version = publish(store, "a", temperature=1.0)
    calibrated = calibrating.calibrate(store, version, calibrating.Labelled(x[:3000], y[:3000], "these"))
    record = calibrated.manifest.calibration
    answers = load_answers(calibrated.folder, record.ways, record.images, 3)["average"]
    session = EnsembleSession(calibrated.folder, calibrated.manifest)
    probs = session.combine(session.member_probs(x[3000:])).mean_probs
    u = np.random.default_rng(0).random(3000)
    for method in conformal.METHODS:
        chosen = Calibration(answers, 3).sets(probs, 0.9, method, u, per_class=False, allow_empty=True)
        assert chosen[np.arange(3000), y[3000:]].mean() == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((30, 1, 5, 5), np.float32)}, "takes images"),
        ({"x": np.full((30, *SHAPE), 2.0, np.float32)}, "must lie in"),
        ({"y": np.full(30, 3)}, "3 classes"),
        ({"y": np.zeros(30)}, "whole numbers"),
        ({"x": np.zeros((5, *SHAPE), np.float32), "y": np.zeros(5, int)}, "at least 20"),
        ({"x": np.array([{}], object)}, "not an npz file"),
    ],
    ids=["shape", "pixels", "labels", "type", "few", "pickle"],
)
def test_images_that_do_not_fit_are_refused_and_nothing_is_published(store, tmp_path, change, message):
    version = publish(store, "a")
    arrays = {"x": np.zeros((30, *SHAPE), np.float32), "y": np.zeros(30, int)} | change
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(StoreError, match=message):
        calibrating.calibrate(store, version, calibrating.from_npz(tmp_path / "x.npz"))
    assert store.versions("a") == [1]


def test_a_file_without_the_arrays_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    for content in (b"text", b"", (tmp_path / "x.npy").read_bytes()):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(StoreError, match="not an npz file"):
            calibrating.from_npz(tmp_path / "x.npz")
    with pytest.raises(StoreError, match="not an npz file"):
        calibrating.from_npz(tmp_path / "missing.npz")


def test_a_calibration_that_was_changed_is_refused(store):
    x, y = labelled(100)
    version = calibrating.calibrate(store, publish(store, "a"), calibrating.Labelled(x, y, "these"))
    file = version.folder / "calibration.safetensors"
    tensors = load_file(file)
    for broken in (
        {"average.score.lac": tensors["average.score.lac"][:-1]},
        {"average.score.lac": tensors["average.score.lac"] * np.nan},
        {"drawn.labels": tensors["drawn.labels"] + 9},
        {"average.wrong": tensors["average.wrong"][:-1]},
    ):
        save_file(tensors | broken, file)
        with pytest.raises(CorruptionError, match="finite number for each of 50 images"):
            load_answers(version.folder, ["average", "drawn"], 50, 3)
    file.write_bytes(b"x")
    with pytest.raises(CorruptionError, match="is not a calibration"):
        load_answers(version.folder, ["average"], 50, 3)
    with pytest.raises(CorruptionError, match="sha256 differs"):
        store.verify(version)


def test_manifests_of_schema_version_1_stay_readable_and_hold_no_calibration(store):
    version = publish(store, "a")
    assert version.manifest.schema_version == 1
    x, y = labelled(100)
    calibrated = calibrating.calibrate(store, version, calibrating.Labelled(x, y, "these")).manifest
    record = json.loads(calibrated.dump()) | {"schema_version": 1}
    record.pop("digest")
    with pytest.raises(ManifestError, match="needs schema version 2"):
        Manifest.parse(json.dumps(record), "here")


def test_the_command_names_what_is_missing(store, capsys):
    publish(store, "a")
    assert main(["--store", str(store.root), "calibrate", "a"]) == 2
    assert "--dataset" in capsys.readouterr().err
    assert Store(store.root).versions("a") == [1]


def test_the_combination_is_the_weighted_mean():
    """The measure that is stored is the one that models_store.uncertainty computes; here for one image by hand."""
    probs = np.array([[[0.8, 0.2]], [[0.4, 0.6]]])
    assert combine(probs, np.array([0.5, 0.5])).mean_probs.tolist() == [[pytest.approx(0.6), pytest.approx(0.4)]]
