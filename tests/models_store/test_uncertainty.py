import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models_store.uncertainty import combine, entropy, softmax

logits = arrays(
    np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-30, 30)
)


def test_entropy_of_the_uniform_distribution_is_log_classes_and_of_a_certain_one_zero():
    assert entropy(np.full((1, 8), 1 / 8)) == pytest.approx(np.log(8))
    assert entropy(np.eye(4)) == pytest.approx(np.zeros(4))


def test_probabilities_are_averaged_and_not_logits():
    z = np.array([[[10.0, 0.0]], [[0.0, 1.0]]])
    found = combine(softmax(z), np.array([0.5, 0.5])).mean_probs
    averaged_logits = softmax(z.mean(axis=0))
    assert found == pytest.approx((softmax(z[0]) + softmax(z[1])) / 2)
    assert abs(found - averaged_logits).max() > 0.2


def test_temperature_divides_logits():
    assert softmax(np.array([2.0, 0.0]), temperature=2.0) == pytest.approx(softmax(np.array([1.0, 0.0])))


def test_large_logits_do_not_overflow():
    assert softmax(np.array([1e4, -1e4])) == pytest.approx([1.0, 0.0])


@settings(deadline=None)
@given(logits)
def test_measures_keep_their_bounds_and_their_sum(z):
    members, _, classes = z.shape
    found = combine(softmax(z), np.full(members, 1 / members))
    assert found.mean_probs.sum(axis=1) == pytest.approx(1)
    assert found.predictive_entropy == pytest.approx(found.expected_entropy + found.mutual_information, abs=1e-9)
    assert (found.mutual_information >= 0).all()
    assert (found.predictive_entropy <= np.log(classes) + 1e-9).all()
    assert ((found.disagreement >= 0) & (found.disagreement <= 1)).all()


def test_equal_members_have_no_mutual_information_and_do_not_disagree():
    z = np.repeat(np.random.default_rng(0).normal(size=(1, 5, 4)), 3, axis=0)
    found = combine(softmax(z), np.full(3, 1 / 3))
    assert found.mutual_information == pytest.approx(np.zeros(5), abs=1e-12)
    assert found.disagreement == pytest.approx(np.zeros(5))


def test_mutual_information_is_the_jensen_shannon_divergence_of_the_members():
    jensenshannon = pytest.importorskip("scipy.spatial.distance", reason="scipy comes with [training]").jensenshannon

    probs = np.random.default_rng(1).dirichlet(np.ones(5), size=(2, 7))
    found = combine(probs, np.array([0.5, 0.5]))
    assert found.mutual_information == pytest.approx(jensenshannon(probs[0], probs[1], axis=1) ** 2)


def test_disagreement_is_the_weight_of_members_with_another_top_class():
    probs = np.array([[[0.9, 0.1]], [[0.8, 0.2]], [[0.4, 0.6]]])
    assert combine(probs, np.array([0.5, 0.3, 0.2])).disagreement == pytest.approx([0.2])
