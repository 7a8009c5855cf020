import numpy as np
import pytest
from scipy.special import log_softmax

from models_store.uncertainty import softmax
from training.temperature import fit


def sampled(temperature, rows=20_000):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, 4)) * 3
    probs = softmax(logits, temperature)
    labels = (probs.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_it_finds_the_temperature_the_labels_were_drawn_at(true):
    logits, labels = sampled(true)
    assert fit(logits[None], labels, np.ones(1)) == pytest.approx(true, rel=0.05)


def test_no_other_temperature_has_a_lower_nll_of_the_average():
    rng = np.random.default_rng(1)
    logits, labels = sampled(2.0, 500)
    members = np.stack([logits + rng.normal(size=logits.shape) for _ in range(3)])
    weights = np.array([0.5, 0.3, 0.2])

    def nll(t):
        probs = np.einsum("k,kbc->bc", weights, np.exp(log_softmax(members / t, axis=2)))
        return -np.log(probs[np.arange(len(labels)), labels]).mean()

    best = fit(members, labels, weights)
    assert nll(best) <= min(nll(t) for t in np.geomspace(0.2, 20, 200)) + 1e-6


def test_a_split_without_errors_does_not_drive_it_to_zero():
    logits = np.eye(3)[None] * 50
    assert fit(logits, np.arange(3), np.ones(1)) >= 0.2
