from models_store.decisions import calibrating
from models_store.reports.card import card
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import publish


def test_a_card_says_what_the_manifest_records_and_what_it_does_not(store):
    text = card(publish(store, "animals").manifest)
    assert text.startswith("# animals, version 1\n")
    assert "average of 3 networks (method `fge`)" in text
    assert "probabilities of 3 classes: cat, dog, bird" in text
    assert "There are no scores" in text
    assert "cannot mark inputs" in text
    assert "does not record who may use it" in text


def test_the_card_of_a_calibrated_version_has_its_scores_and_decisions(store):
    x, y = labelled(1000, temperature=0.1)
    version = calibrating.calibrate(store, publish(store, "animals"), calibrating.Labelled(x, y, "some images"))
    text, scores = card(version.manifest), version.manifest.validation
    assert "Calibrated on 500 images (some images)" in text
    assert "- Cascade: groups of" in text
    assert (f"| Accuracy | {scores.accuracy:.4f} |" in text) if scores else ("There are no scores" in text)
