import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, roc_auc_score

from models_store.decisions.calibrating import Labelled, calibrate
from models_store.decisions.calibration import load_answers
from models_store.importing import ImportOptions, import_members
from models_store.store import Store
from models_store.uncertainty import combine, softmax
from tests.onnx_members import linear, linear_logits
from training import evaluate, fge
from training.data import DataOptions, as_arrays, generated
from training.data import load as load_data
from training.errors import ConfigError
from training.measurement.foreign import fit_images


@pytest.fixture
def ensemble(tmp_path):
    models = [linear(seed, (1, 8, 8), 10) for seed in range(3)]
    files = [tmp_path / f"{seed}.onnx" for seed in range(3)]
    for model, file in zip(models, files, strict=True):
        onnx.save(model, file)
    import_members(Store(), "lin", files, ImportOptions())
    return models


def test_the_report_is_what_the_files_answer(ensemble, tmp_path):
    report = evaluate.run(evaluate.Config(name="lin", dataset="digits", ood=("digits",), output=tmp_path / "out"))
    images, labels = as_arrays(load_data(DataOptions(dataset="digits")).test)
    probs = np.stack([softmax(linear_logits(m, images)) for m in ensemble])
    average = combine(probs, np.full(3, 1 / 3))
    scores = {row["who"]: row for row in report["scores"]}
    assert set(scores) == {"average", "member 0", "member 1", "member 2"}
    assert scores["average"]["accuracy"] == pytest.approx(accuracy_score(labels, average.label))
    assert scores["average"]["nll"] == pytest.approx(log_loss(labels, average.mean_probs), abs=1e-4)
    assert scores["member 1"]["accuracy"] == pytest.approx(accuracy_score(labels, probs[1].argmax(1)))
    found = report["error_detection_auroc"]["predictive_entropy"]
    assert found == pytest.approx(roc_auc_score(average.label != labels, average.predictive_entropy), abs=1e-3)
    assert report["foreign"][0]["auroc"]["mutual_information"] == pytest.approx(0.5)  # its own data set is not foreign
    pairs = np.array(report["pairwise_disagreement"])
    assert pairs[0, 1] == pytest.approx((probs[0].argmax(1) != probs[1].argmax(1)).mean())
    assert (np.diag(pairs) == 0).all()
    assert json.loads((tmp_path / "out/report.json").read_text())["images"] == 360
    assert "| average" in (tmp_path / "out/report.md").read_text()
    assert report["confusion"] == confusion_matrix(labels, average.label).tolist()
    assert set(report.figures) == {"reliability", "confusion"}
    for figure in report.figures:
        assert (tmp_path / f"out/{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_an_imported_ensemble_needs_the_data_set_named(ensemble):
    with pytest.raises(ConfigError, match="--dataset"):
        evaluate.run(evaluate.Config(name="lin"))


def test_all_images_of_a_foreign_folder_are_used_with_or_without_class_folders(ensemble, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for index in range(10):
        Image.new("RGB", (30, 20), (index, 9, 200)).save(folder / ("trip" if index < 3 else "") / f"{index}.png")
    (folder / "trip" / "broken.jpg").write_bytes(b"x")
    config = evaluate.Config(name="lin", dataset="digits", ood=(f"imagefolder:{folder}",), output=tmp_path / "out")
    report = evaluate.run(config)
    assert report["foreign"][0]["images"] == 10
    printed = capsys.readouterr().out
    assert "1 files cannot be read and are left out" in printed
    assert f"Foreign images: 10 of imagefolder:{folder}." in printed


def factory():
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    return SimpleNamespace(
        train=(images, labels), validation=None, test=(images, labels), classes=[f"class {9 - k}" for k in range(10)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "refused"),
    [
        (None, None),  # without class names the ensemble only numbers its classes
        ([f"class {9 - k}" for k in range(10)], None),
        ([f"class {k}" for k in range(10)], "in another order: class 0 is 'class 0' in one and 'class 9' in the other"),
        ([f"dog {k}" for k in range(10)], "under other names: class 0 is 'dog 0'"),
    ],
)
def test_the_classes_of_the_data_are_those_of_the_ensemble(tmp_path, classes, refused):
    onnx.save(linear(0, (1, 8, 8), 10), tmp_path / "0.onnx")
    import_members(Store(), "named", [tmp_path / "0.onnx"], ImportOptions(classes=classes))
    config = evaluate.Config(name="named", dataset="tests.training.test_evaluate:factory", output=tmp_path / "out")
    if refused is None:
        assert evaluate.run(config)["images"] == 40
    else:
        with pytest.raises(ConfigError, match=refused):
            evaluate.run(config)


def test_foreign_images_are_made_to_fit():
    colour = np.random.default_rng(0).random((5, 3, 20, 10), dtype=np.float32)
    grey = fit_images(colour, (1, 8, 8))
    assert grey.shape == (5, 1, 8, 8)
    assert grey.mean() == pytest.approx(colour.mean(), abs=0.02)
    assert fit_images(grey, (3, 8, 8)).shape == (5, 3, 8, 8)
    assert np.array_equal(fit_images(grey, (1, 8, 8)), grey)


def test_decisions_of_a_calibrated_version_are_measured(ensemble, tmp_path):
    """Coverage, risk and cascade in the report are those of a computation on the same split."""
    source = load_data(DataOptions(dataset="digits"))
    images, labels = as_arrays(source.train)
    calibrated = calibrate(Store(), Store().load("lin"), Labelled(images, labels, "these"))
    report = evaluate.run(evaluate.Config(name="lin", dataset="digits", ood=("digits",), output=tmp_path / "out"))
    images, labels = as_arrays(source.test)
    found = report["decisions"]
    assert found["images"] == len(source.train) // 2
    row = next(
        one for one in found["sets"] if (one["method"], one["coverage"], one["per_class"]) == ("lac", 0.9, False)
    )
    probs = np.stack([softmax(linear_logits(m, images), calibrated.manifest.temperature) for m in ensemble]).mean(
        axis=0
    )
    record = calibrated.manifest.calibration
    scores = load_answers(calibrated.folder, record.ways, record.images, 10)["average"].scores["lac"]
    chosen = 1 - probs <= np.sort(scores)[int(np.ceil((record.images + 1) * 0.9)) - 1]
    assert row["covered"][0] == pytest.approx(chosen[np.arange(360), labels].mean(), abs=0.003)
    assert row["classes_in_a_set"] == pytest.approx(chosen.sum(axis=1).mean(), abs=0.01)
    exact = next(one for one in found["cascades"] if one["rule"] == "exact")
    assert exact["agreement"] == 1
    assert found["risks"][0]["answered"] is None  # these members know nothing, so nothing can be guaranteed
    assert report["foreign"][0]["detected"] == found["false_alarms"]  # the foreign images are those of the test split
    assert "risk-coverage" in report.figures
    assert "## Decisions, calibrated on" in (tmp_path / "out/report.md").read_text()


def test_classes_that_were_held_out_of_the_training_are_a_foreign_set(tmp_path):
    fge.run(fge.Config(name="nine", network="mlp", epochs=6, members=2, hold_out=("9",)))
    assert Store().load("nine").manifest.classes == [str(digit) for digit in range(9)]
    report = evaluate.run(evaluate.Config(name="nine", ood=("noise", "textures"), output=tmp_path / "out"))
    near, noise, textures = report["foreign"]
    assert near["name"] == "held-out classes: 9"
    assert near["images"] == int((as_arrays(load_data(DataOptions(dataset="digits")).test)[1] == 9).sum())
    assert report["images"] + near["images"] == 360
    assert near["auroc"]["novelty"] > 0.7
    assert noise["auroc"]["novelty"] > 0.95
    assert textures["images"] == generated.IMAGES
    assert "held-out classes: 9" in (tmp_path / "out/report.md").read_text()


def test_corruptions_need_their_library_and_known_severities(ensemble, monkeypatch):
    with pytest.raises(ConfigError, match="from 1 to 5"):
        evaluate.run(evaluate.Config(name="lin", dataset="digits", corruptions=(6,)))
    monkeypatch.setitem(sys.modules, "torch_uncertainty.transforms.corruption", None)
    with pytest.raises(ConfigError, match="pip install"):
        evaluate.run(evaluate.Config(name="lin", dataset="digits", corruptions=(1,)))
