"""Tables, signals and texts from a command to a published version."""

import numpy as np
import pytest

import modepath
from models_store.graphs.runtime import EnsembleSession
from models_store.store import Store
from training import curve, data, evaluate, fge
from training.config import data_options
from training.data.sources.embedded import BUILT_IN

CSV = "age,colour,label\n" + "".join(
    f"{'' if i % 9 == 0 else 20 + i},{['red', 'blue'][i % 2]},{['no', 'yes'][(i // 2) % 2]}\n" for i in range(200)
)
SMALL = {
    "breast-cancer": {"network": "mlp", "epochs": 8},
    "wine": {"network": "mlp", "epochs": 10},
    "digit-rows": {"network": "lstm", "epochs": 6, "network_options": ("hidden=24",)},
    "languages": {"network": "transformer", "epochs": 4, "limit": 2000, "optimizer": "adamw", "lr": 5e-3, "batch_size": 32, "network_options": ("width=16", "depth=1")},
}  # fmt: skip


def published(name, **options):
    version = fge.run(
        fge.Config(name=name, dataset=options.pop("dataset", name), members=3, **{"batch_size": 16, **options})
    )
    Store().verify(version)
    return version, data.load(data_options(version.manifest.provenance.config))


@pytest.mark.parametrize("name", SMALL)
def test_an_ensemble_of_each_kind_is_trained_published_and_answers_as_its_onnx_files(name):
    version, found = published(name, **SMALL[name])
    assert version.manifest.schema_version == 3
    assert version.manifest.input.kind == ("tokens" if name == "languages" else "features")
    x, y = data.as_arrays(found.test, 100)
    answer = modepath.ensemble.of_version(version).predict(x)
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    assert answer.probs == pytest.approx(session.predict(x).mean_probs, abs=1e-5)
    assert (answer.labels == y).mean() > 1.5 / len(found.classes)
    assert answer.novelty is not None
    if name == "languages":
        assert version.manifest.input.open_length
        for row in range(5):  # alone and without padding
            text = x[row][x[row] > 0][None]
            read = bytes((text[0] - 1).tolist()).decode()
            for given in (text, [read]):
                assert modepath.ensemble.of_version(version).predict(given).probs[0] == pytest.approx(
                    answer.probs[row], abs=1e-5
                )


def test_a_table_with_categories_and_missing_numbers_is_asked_by_its_fields(tmp_path):
    (tmp_path / "t.csv").write_text(CSV)
    version, found = published("table", dataset=f"csv:{tmp_path / 't.csv'}", network="mlp", epochs=4)
    ensemble = modepath.ensemble.of_version(version)
    named = ensemble.predict([{"age": 30, "colour": "red"}, {"age": None, "colour": "blue"}])
    mean = found.mean[0]
    plain = ensemble.predict(np.array([[30, 0, 1], [mean, 1, 0]], np.float32))
    assert named.probs == pytest.approx(plain.probs, abs=1e-5)


def test_a_curve_and_its_bank_between_networks_for_texts_trained_by_adamw():
    options = {"optimizer": "adamw", "network_options": ("width=16", "depth=1"), "limit": 600, "clip_norm": 1.0}
    version = curve.run(
        curve.Config(
            name="c", dataset="languages", network="transformer", epochs=2, end_epochs=2, bank=6, members=3, **options
        )
    )
    Store().verify(version)
    assert version.manifest.bank.points == 6
    assert version.manifest.geometry.shape == "bezier"


def test_an_evaluation_of_a_table_reports_scores_and_noise_as_a_foreign_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published("wine", network="mlp", epochs=6)
    evaluate.run(evaluate.Config(name="wine", ood=("noise",)))
    assert "noise" in next(tmp_path.rglob("report.md")).read_text()


def test_every_embedded_data_set_is_split_and_has_its_classes():
    for name in BUILT_IN:
        found = data.load(data.DataOptions(name))
        assert len(found.train) > len(found.test) > 0
        assert len(found.classes) == int(found.test.labels.max()) + 1
