import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models_store.decisions import conformal


def drawn(rows, classes=6, seed=0, sharpness=2.0):
    """Probabilities and labels that are drawn from them, so that the probabilities are right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * sharpness
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probs.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1).clip(0, classes - 1)
    return probs, labels, rng.random(rows)


def of_labels(values, labels):
    return values[np.arange(len(labels)), labels]


@pytest.mark.parametrize("method", conformal.METHODS)
def test_scores_are_those_of_the_definition(method):
    probs, _, u = drawn(50)
    values = conformal.scores(probs, method, u)
    for row in range(50):
        for label in range(6):
            p = probs[row, label]
            above = probs[row][probs[row] > p]
            expected = {
                "lac": 1 - p,
                "aps": above.sum() + u[row] * p,
                "raps": above.sum() + u[row] * p + 0.01 * max(0, len(above) + 1 - 5),
            }[method]
            assert values[row, label] == pytest.approx(expected)


@pytest.mark.parametrize("method", conformal.METHODS)
@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95, 0.99])
def test_coverage_over_many_cuts_is_that_of_the_exact_distribution(method, coverage):
    """The number of covered rows is beta-binomial: with n calibration and m test rows and rank k, a = k and b = n + 1 - k."""
    n, m, cuts = 499, 1000, 40
    covered = []
    for seed in range(cuts):
        probs, labels, u = drawn(n + m, seed=seed)
        values = conformal.scores(probs, method, u)
        limit = conformal.threshold(np.sort(of_labels(values, labels)[:n]), coverage)
        chosen = conformal.sets(probs[n:], values[n:], limit, allow_empty=True)
        covered.append(of_labels(chosen, labels[n:]).sum())
    rank = round(500 * coverage)
    low, high = stats.betabinom(m, rank, n + 1 - rank).interval(0.99)
    outside = sum(not low <= count <= high for count in covered)
    assert stats.binom.sf(outside - 1, cuts, 0.01) > 1e-4


def test_a_threshold_for_each_class_covers_each_class():
    probs, labels, u = drawn(20_000, classes=4)
    probs[:, 0] *= 0.3  # a class that the network underestimates
    probs /= probs.sum(axis=1, keepdims=True)
    values = conformal.scores(probs, "lac", u)
    own = of_labels(values, labels)
    limits = conformal.thresholds_by_class(own[:10_000], labels[:10_000], 4, 0.9)
    chosen = conformal.sets(probs[10_000:], values[10_000:], limits, allow_empty=True)
    together = conformal.sets(
        probs[10_000:], values[10_000:], conformal.threshold(np.sort(own[:10_000]), 0.9), allow_empty=True
    )
    for label in range(4):
        rows = labels[10_000:] == label
        assert chosen[rows, label].mean() == pytest.approx(0.9, abs=0.025)
    assert together[labels[10_000:] == 0, 0].mean() < 0.85


def test_classes_with_too_few_images_get_the_common_threshold_and_are_named():
    probs, labels, u = drawn(500, classes=4)
    labels[labels == 3] = 0
    labels[:5] = 3
    own = of_labels(conformal.scores(probs, "lac", u), labels)
    assert conformal.classes_without_guarantee(labels, 4, 0.9) == [3]
    limits = conformal.thresholds_by_class(own, labels, 4, 0.9)
    assert limits[3] == conformal.threshold(np.sort(own), 0.9)


@given(st.integers(1, 400), st.floats(0.01, 0.999))
@settings(max_examples=200, deadline=None)
def test_a_coverage_is_refused_if_and_only_if_the_images_cannot_guarantee_it(count, coverage):
    values = np.arange(count) / count
    if coverage <= conformal.most_coverage(count):
        limit = conformal.threshold(values, coverage)
        # A new score is exchangeable with these: its rank is uniform on 1 … n + 1.
        assert (np.count_nonzero(values <= limit)) / (count + 1) >= coverage - 1e-9
    else:
        with pytest.raises(ValueError, match="guarantee a coverage of at most"):
            conformal.threshold(values, coverage)


def test_a_set_is_empty_only_where_that_is_allowed():
    probs = np.array([[0.4, 0.35, 0.25], [0.9, 0.05, 0.05]])
    values = conformal.scores(probs, "lac", np.zeros(2))
    assert conformal.sets(probs, values, 0.2, allow_empty=True).tolist() == [[False] * 3, [True, False, False]]
    assert conformal.sets(probs, values, 0.2, allow_empty=False)[0].tolist() == [True, False, False]


@pytest.mark.parametrize("method", conformal.METHODS)
@pytest.mark.parametrize("per_class", [False, True])
def test_sets_are_those_of_crepes_for_the_same_scores(method, per_class):
    crepes = pytest.importorskip("crepes", reason="a test oracle, which the environment of the service lacks")
    probs, labels, u = drawn(3000, classes=4, seed=3)
    values = conformal.scores(probs, method, u)
    own = of_labels(values, labels)
    theirs = crepes.ConformalClassifier().fit(own[:2000], bins=labels[:2000] if per_class else None)
    for coverage in (0.8, 0.9, 0.95, 0.99):
        columns = [values[2000:, [label]] for label in range(4)]
        bins = [np.full(1000, label) if per_class else None for label in range(4)]
        p_values = [theirs.predict_p(c, bins=b, smoothing=False)[:, 0] for c, b in zip(columns, bins, strict=True)]
        limit = (
            conformal.thresholds_by_class(own[:2000], labels[:2000], 4, coverage)
            if per_class
            else conformal.threshold(np.sort(own[:2000]), coverage)
        )
        chosen = conformal.sets(probs[2000:], values[2000:], limit, allow_empty=True)
        assert (chosen == (np.stack(p_values, axis=1) > 1 - coverage + 1e-12)).all()
