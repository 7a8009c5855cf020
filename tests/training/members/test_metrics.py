import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from training.members import metrics

rng = np.random.default_rng(0)
probs = rng.dirichlet(np.ones(5), size=400)
labels = rng.integers(0, 5, 400)


def test_accuracy_nll_and_brier_are_scikit_learns():
    assert metrics.accuracy(probs, labels) == pytest.approx(sk.accuracy_score(labels, probs.argmax(1)))
    assert metrics.nll(probs, labels) == pytest.approx(sk.log_loss(labels, probs, labels=range(5)))
    assert metrics.brier(probs, labels) == pytest.approx(sk.brier_score_loss(labels, probs, labels=range(5)))


def test_ece_is_the_mean_gap_of_scikit_learns_calibration_curve():
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    accuracy, mean_confidence = calibration_curve(right, confidence, n_bins=15)
    counts, _ = np.histogram(confidence, 15, (0, 1))
    expected = np.average(np.abs(accuracy - mean_confidence), weights=counts[counts > 0])
    assert metrics.ece(probs, labels) == pytest.approx(float(expected))


def test_ece_is_that_of_torchmetrics():
    """The value of torchmetrics 1.9, multiclass_calibration_error with 15 bins and norm l1, for these probabilities."""
    assert metrics.ece(probs, labels) == pytest.approx(0.2428586, abs=1e-6)


def test_ece_by_hand():
    two = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    assert metrics.ece(two, np.array([0, 1, 0])) == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.6)) / 3, abs=1e-6)


def test_nll_of_an_impossible_label_is_finite():
    assert np.isfinite(metrics.nll(np.array([[1.0, 0.0]]), np.array([1])))


def brute_aurc(uncertainty, wrong):
    order = np.argsort(uncertainty)
    return np.mean([wrong[order[: n + 1]].mean() for n in range(len(order))])


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_aurc_is_the_mean_error_over_coverages(wrongs):
    wrong = np.array(wrongs)
    uncertainty = np.random.default_rng(0).permutation(len(wrong)).astype(float)
    assert metrics.aurc(uncertainty, wrong) == pytest.approx(brute_aurc(uncertainty, wrong))


def test_aurc_does_not_depend_on_the_order_of_ties():
    uncertainty, wrong = np.zeros(6), np.array([1, 0, 0, 1, 0, 0], bool)
    assert (
        metrics.aurc(uncertainty, wrong)
        == pytest.approx(metrics.aurc(uncertainty, wrong[::-1]))
        == pytest.approx(1 / 3)
    )


def test_auroc_is_scikit_learns_and_nan_where_undefined():
    wrong = labels != probs.argmax(1)
    assert metrics.auroc(-probs.max(1), wrong) == pytest.approx(sk.roc_auc_score(wrong, -probs.max(1)))
    assert np.isnan(metrics.auroc(-probs.max(1), np.zeros(400, bool)))
