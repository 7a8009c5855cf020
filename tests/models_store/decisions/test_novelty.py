"""The detector of novelty is the distance of scipy and scikit-learn, as a part of a member's graph that changes no logit."""

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import load_file, save_file
from scipy.spatial.distance import cdist

from models_store.decisions import calibrating, novelty
from models_store.errors import CorruptionError
from models_store.graphs import merging
from models_store.graphs.novelty import NOVELTY_NAME, Detector, features_of
from models_store.graphs.runtime import EnsembleSession, MemberSession
from models_store.uncertainty import softmax
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import SHAPE, linear, publish

ledoit_wolf = pytest.importorskip("sklearn.covariance", reason="the training extra is not installed").ledoit_wolf
images = np.random.default_rng(0).random((40, *SHAPE), np.float32)
labels = np.arange(40) % 3


@pytest.mark.parametrize("count", [12, 60, 5000])
def test_the_covariance_is_shrunk_as_ledoit_and_wolf_do(count):
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(count, 30)) @ rng.normal(size=(30, 30))
    rows -= rows.mean(axis=0)
    assert novelty.shrunk_covariance(rows) == pytest.approx(ledoit_wolf(rows, assume_centered=True)[0], rel=1e-9)


def test_the_score_is_the_squared_mahalanobis_distance_to_the_nearest_class(tmp_path):
    onnx.save(linear(0), tmp_path / "0.onnx")
    detector = novelty.fit(tmp_path / "0.onnx", 0, images, labels)
    pixels = images.reshape(40, -1).astype(np.float64)
    means = np.stack([pixels[labels == label].mean(axis=0) for label in range(3)])
    precision = np.linalg.inv(ledoit_wolf(pixels - means[labels], assume_centered=True)[0])
    new = np.random.default_rng(1).random((7, *SHAPE), np.float32)
    expected = np.square(cdist(new.reshape(7, -1), means, "mahalanobis", VI=precision)).min(axis=1)
    assert novelty.scores(detector, tmp_path / "0.onnx", new, size=3) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("merged_bytes", [0, 2**30])
def test_the_version_gives_the_score_beside_unchanged_logits_merged_or_not(store, monkeypatch, threads, merged_bytes):
    monkeypatch.setattr(merging, "MERGED_BYTES", merged_bytes)
    x, y = labelled(300)
    version = calibrating.calibrate(store, publish(store, "a"), calibrating.Labelled(x, y, "these"))
    record = version.manifest.calibration.novelty
    assert (record.member, record.tensor, record.features, record.images, record.source) == (
        0,
        "flat",
        16,
        150,
        "these",
    )
    session = EnsembleSession(version.folder, version.manifest, "cpu", threads)
    outputs = session.run_in_batches(images, size=7)
    expected = [MemberSession(version.folder / m.file, "cpu").logits(images) for m in version.manifest.members]
    assert (outputs.logits == np.stack(expected)).all()
    detector = Detector.load(version.folder, version.manifest)
    alone = novelty.scores(detector, version.folder / version.manifest.members[0].file, images)
    assert outputs.novelty == pytest.approx(alone, rel=1e-5)
    assert session.predict(images).novelty == pytest.approx(alone, rel=1e-5)


def test_images_of_the_training_are_preferred_and_the_detector_stays_when_a_version_is_calibrated_again(store):
    x, y = labelled(300)
    seen = (images, labels, "the training")
    first = calibrating.calibrate(store, publish(store, "a"), calibrating.Labelled(x, y, "these", seen))
    again = calibrating.calibrate(store, first, calibrating.Labelled(*labelled(400, seed=5), "those"))
    assert first.manifest.calibration.novelty.source == again.manifest.calibration.novelty.source == "the training"
    assert first.manifest.calibration.novelty.images == 40
    kept, refitted = (load_file(one.folder / "novelty.safetensors") for one in (first, again))
    assert all((kept[name] == refitted[name]).all() for name in ("map", "shift", "means"))


def test_where_the_logits_come_from_no_matrix_product_novelty_is_the_predictive_entropy(store):
    def pooled(seed, shape=SHAPE):
        model = linear(seed)
        model.graph.output[0].name = "unused"
        # (images, 1, 4, 4) -> the mean of each of the first three rows
        nodes = [
            helper.make_node("ReduceMean", ["images", "two"], ["rows"], keepdims=0),
            helper.make_node("Flatten", ["rows"], ["all"]),
            helper.make_node("Gather", ["all", "three"], ["logits"], axis=1),
        ]
        constants = [("two", np.array([3])), ("three", np.array([0, 1, 2]))]
        graph = helper.make_graph(
            nodes, "pooled", model.graph.input, [helper.make_tensor_value_info("logits", 1, ["batch", 3])],
            [onnx.numpy_helper.from_array(values, name) for name, values in constants],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)

    assert features_of(pooled(0)) is None
    version = publish(store, "a", seeds=(0, 1), member=pooled)
    x, y = labelled(300)
    calibrated = calibrating.calibrate(store, version, calibrating.Labelled(x, y, "these"))
    assert calibrated.manifest.calibration.novelty is None
    assert not (calibrated.folder / "novelty.safetensors").exists()
    prediction = EnsembleSession(calibrated.folder, calibrated.manifest).predict(images)
    assert (prediction.novelty == prediction.predictive_entropy).all()


@pytest.mark.parametrize("constant", [True, False], ids=["features that do not vary", "too few images"])
def test_without_a_distribution_there_is_no_detector(tmp_path, constant):
    onnx.save(linear(0), tmp_path / "0.onnx")
    given = np.full((40, *SHAPE), 0.5, np.float32) if constant else images[:5]
    assert novelty.fit(tmp_path / "0.onnx", 0, given, labels[: len(given)]) is None


def test_features_beyond_float32_are_farther_than_all_others(store, tmp_path):
    x, y = labelled(300)
    version = calibrating.calibrate(store, publish(store, "a"), calibrating.Labelled(x, y, "these"))
    session = EnsembleSession(version.folder, version.manifest)
    far = np.stack([images[0], np.full(SHAPE, 1e30, np.float32), np.full(SHAPE, np.nan, np.float32)])
    outputs = session.run(far)
    found = session.combine(softmax(np.zeros_like(outputs.logits)), outputs.novelty).novelty
    assert np.isfinite(found).all()
    assert found[0] < 1e3 < 1e38 < found[1] == found[2]


@pytest.mark.parametrize(
    "change",
    [
        {"map": np.zeros((16, 15), np.float32)},
        {"shift": np.zeros(16, np.float64)},
        {"means": np.zeros((4, 16), np.float32)},
        {"means": np.full((3, 16), np.nan, np.float32)},
        {"means": None},
    ],
    ids=["shape", "type", "classes", "nan", "missing"],
)
def test_a_file_that_breaks_the_format_is_refused(store, change):
    x, y = labelled(300)
    version = calibrating.calibrate(store, publish(store, "a"), calibrating.Labelled(x, y, "these"))
    file = version.folder / "novelty.safetensors"
    tensors = {name: values for name, values in {**load_file(file), **change}.items() if values is not None}
    save_file(tensors, file)
    with pytest.raises(CorruptionError, match="novelty"):
        EnsembleSession(version.folder, version.manifest)
    file.write_bytes(b"not a file of tensors")
    with pytest.raises(CorruptionError, match="not a detector"):
        Detector.load(version.folder, version.manifest)


def test_an_attached_member_is_a_valid_graph(tmp_path):
    onnx.save(linear(0), tmp_path / "0.onnx")
    detector = novelty.fit(tmp_path / "0.onnx", 0, images, labels)
    model = detector.attached(linear(0))
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == ["logits", NOVELTY_NAME]
