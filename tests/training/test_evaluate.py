import json

import numpy as np
import onnx
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from models_store.importing import ImportOptions, import_members
from models_store.store import Store
from models_store.uncertainty import combine, softmax
from tests.onnx_members import linear, linear_logits
from training import evaluate
from training.data import DataOptions, as_arrays
from training.data import load as load_data
from training.errors import ConfigError


@pytest.fixture
def ensemble(tmp_path):
    models = [linear(seed, (1, 8, 8), 10) for seed in range(3)]
    files = [tmp_path / f"{seed}.onnx" for seed in range(3)]
    for model, file in zip(models, files, strict=True):
        onnx.save(model, file)
    import_members(Store(), "lin", files, ImportOptions())
    return models


def test_the_report_is_what_the_files_answer(ensemble, tmp_path):
    report = evaluate.run(evaluate.Config(name="lin", dataset="digits", ood="digits", output=tmp_path / "out"))
    images, labels = as_arrays(load_data(DataOptions(dataset="digits"), lambda line: None).test)
    probs = np.stack([softmax(linear_logits(m, images)) for m in ensemble])
    average = combine(probs, np.full(3, 1 / 3))
    scores = {row["who"]: row for row in report["scores"]}
    assert set(scores) == {"average", "member 0", "member 1", "member 2"}
    assert scores["average"]["accuracy"] == pytest.approx(accuracy_score(labels, average.label))
    assert scores["average"]["nll"] == pytest.approx(log_loss(labels, average.mean_probs), abs=1e-4)
    assert scores["member 1"]["accuracy"] == pytest.approx(accuracy_score(labels, probs[1].argmax(1)))
    found = report["error_detection_auroc"]["predictive_entropy"]
    assert found == pytest.approx(roc_auc_score(average.label != labels, average.predictive_entropy), abs=1e-3)
    assert report["ood_auroc"]["mutual_information"] == pytest.approx(0.5)  # its own data set is not foreign
    pairs = np.array(report["pairwise_disagreement"])
    assert pairs[0, 1] == pytest.approx((probs[0].argmax(1) != probs[1].argmax(1)).mean())
    assert (np.diag(pairs) == 0).all()
    assert json.loads((tmp_path / "out/report.json").read_text())["images"] == 360
    assert "| average" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/reliability.png").read_bytes().startswith(b"\x89PNG")


def test_an_imported_ensemble_needs_the_data_set_named(ensemble):
    with pytest.raises(ConfigError, match="--dataset"):
        evaluate.run(evaluate.Config(name="lin"))


def test_foreign_images_are_made_to_fit():
    colour = np.random.default_rng(0).random((5, 3, 20, 10), dtype=np.float32)
    grey = evaluate.fit_images(colour, (1, 8, 8))
    assert grey.shape == (5, 1, 8, 8)
    assert grey.mean() == pytest.approx(colour.mean(), abs=0.02)
    assert evaluate.fit_images(grey, (3, 8, 8)).shape == (5, 3, 8, 8)
    assert np.array_equal(evaluate.fit_images(grey, (1, 8, 8)), grey)
