"""Scores of late labels are those of scikit-learn and models_store.scores; answers survive the database."""

import numpy as np
import pytest

from models_store import scores
from models_store.manifest import ECE_BINS
from models_store.uncertainty import combine
from service.feedback.answers import Kept, of_answer, scored
from service.feedback.database import new_id

rng = np.random.default_rng(0)
probs = rng.dirichlet(np.ones(5) * 0.5, size=(3, 400))
prediction = combine(probs, np.ones(3) / 3)
labels = rng.integers(0, 5, 400)
sets = [np.flatnonzero(row > 0.2).tolist() for row in prediction.mean_probs]
decisions = [("predict", None) if sure > 0.5 else ("abstain", "uncertain") for sure in prediction.confidence]


def answer(*, shown=True, **changes):
    given = {"coverage": 0.9, "sets": sets, "decisions": decisions, **changes}
    return of_answer(new_id(1e9), 1e9, "pets", 3, "average", prediction, shown=shown, **given)


def same(a, b):
    assert (a is None) == (b is None)
    assert a is None or np.array_equal(a, b)


@pytest.mark.parametrize("shown", [True, False])
def test_an_answer_is_read_from_its_record_as_it_was(shown):
    kept = answer(shown=shown)
    read = Kept.of_record(kept.record())
    for name in ("labels", "confidence", "probs", "sets", "answered"):
        same(getattr(kept, name), getattr(read, name))
    names = ("request_id", "time", "ensemble", "version", "mode", "classes", "coverage", "rows")
    assert [getattr(kept, name) for name in names] == [getattr(read, name) for name in names]
    assert (kept.probs is None) == (not shown)


def test_sums_over_labels_give_the_scores_of_the_answers():
    kept = answer()
    results = [scored(kept, row, int(label)) for row, label in enumerate(labels)]
    expected = scores.score(prediction.mean_probs, labels)
    assert np.mean([one.correct for one in results]) == pytest.approx(expected.accuracy)
    assert np.mean([one.nll or 0 for one in results]) == pytest.approx(expected.nll, abs=1e-6)
    assert np.mean([one.brier or 0 for one in results]) == pytest.approx(expected.brier, abs=1e-6)
    gaps = np.zeros(ECE_BINS + 1)
    for one in results:
        gaps[one.bin] += one.correct - one.confidence
    assert np.abs(gaps).sum() / 400 == pytest.approx(expected.ece, abs=1e-9)
    assert [one.covered for one in results] == [label in row for label, row in zip(labels, sets, strict=True)]
    assert [one.answered for one in results] == [decision == "predict" for decision, _ in decisions]


def test_what_the_policy_hides_is_not_kept():
    result = scored(answer(shown=False), 0, 1)
    assert (result.confidence, result.bin, result.nll, result.brier, result.covered) == (None,) * 5
    assert result.correct == (prediction.label[0] == 1)


def test_a_certain_and_wrong_answer_has_a_finite_score():
    sure = combine(np.eye(3)[None, :1], np.ones(1))
    kept = of_answer(new_id(0), 0, "a", 1, "average", sure, shown=True, coverage=None, sets=None, decisions=None)
    result = scored(kept, 0, 2)
    assert result.nll == pytest.approx(-np.log(1e-12))
    assert (result.brier, result.bin) == (2.0, ECE_BINS)


def test_images_are_kept_as_png_of_the_same_pixels():
    from io import BytesIO

    from PIL import Image

    for channels in (1, 3):
        image = rng.random((channels, 6, 4), np.float32)
        kept = answer(images=((7, image),))
        [record] = kept.images()
        assert (record["request_id"], record["row"]) == (kept.request_id, 7)
        read = np.asarray(Image.open(BytesIO(record["file"])), np.float32) / 255
        assert read.reshape(6, 4, channels) == pytest.approx(np.moveaxis(image, 0, -1), abs=0.5 / 255 + 1e-6)
