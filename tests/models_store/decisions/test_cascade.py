import numpy as np
import pytest

from models_store.decisions import cascade, temperature
from models_store.decisions.calibration import halves
from models_store.uncertainty import softmax

rng = np.random.default_rng(0)


def ensemble(members=8, images=8000, classes=5, noise=1.0, seed=0):
    """Logits of members that agree on easy images; labels drawn from their common part."""
    draws = np.random.default_rng(seed)
    common = draws.normal(size=(images, classes)) * draws.gamma(2, 2, (images, 1))
    labels = (softmax(common).cumsum(axis=1) < draws.random((images, 1))).sum(axis=1).clip(0, classes - 1)
    return (common + noise * draws.normal(size=(members, images, classes))).astype(np.float32), labels


def test_the_cascade_keeps_its_bound_on_new_images_and_saves_members():
    logits, labels = ensemble(images=46_000, noise=0.7)
    weights = np.full(8, 1 / 8)
    found = cascade.fit(logits[:, :6000], labels[:6000], weights, 1.0, halves(6000), temperature.fit)
    assert sorted(found.order) == list(range(8))
    assert sum(found.groups) == 8
    assert found.disagreement == pytest.approx(0.001)
    new = logits[found.order][:, 6000:]
    full = cascade.averaged(new, weights, 1.0).argmax(axis=1)
    used, label = np.full(len(full), 8), full.copy()
    staying = np.ones(len(full), bool)
    for end, t, margin in zip(np.cumsum(found.groups)[:-1], found.temperatures, found.margins, strict=False):
        mean = cascade.averaged(new[:end], weights[:end], t)
        leaves = staying & (cascade.gap(mean) >= margin)
        used[leaves], label[leaves] = end, mean[leaves].argmax(axis=1)
        staying &= ~leaves
    assert (label != full).mean() <= 0.001
    assert used.mean() < 6


def test_with_too_few_images_the_bound_is_what_they_allow_and_with_next_to_none_there_is_none():
    logits, labels = ensemble(images=600, noise=0.1)
    found = cascade.fit(logits, labels, np.full(8, 1 / 8), 1.0, halves(600), temperature.fit)
    assert found.disagreement == pytest.approx(1 - 0.05 ** (1 / 300))
    few = cascade.fit(logits[:, :60], labels[:60], np.full(8, 1 / 8), 1.0, halves(60), temperature.fit)
    assert few.margins is None
    assert few.disagreement is None


def test_the_full_average_comes_last_at_its_own_temperature_and_one_member_is_no_cascade():
    logits, labels = ensemble(images=400)
    found = cascade.fit(logits, labels, np.full(8, 1 / 8), 1.7, halves(400), temperature.fit)
    assert found.temperatures[-1] == 1.7
    assert cascade.fit(logits[:1], labels, np.ones(1), 1.0, halves(400), temperature.fit) is None


def test_the_member_that_agrees_most_with_the_average_comes_first():
    logits, labels = ensemble(members=4, images=2000, noise=0.2)
    logits[[0, 1, 3]] += rng.normal(size=(3, *logits.shape[1:]))
    found = cascade.fit(logits, labels, np.full(4, 1 / 4), 1.0, halves(2000), temperature.fit)
    assert found.order[0] == 2
