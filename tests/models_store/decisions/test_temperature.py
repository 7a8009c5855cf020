import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from models_store.decisions.temperature import (
    CLIP,
    PRIOR_WIDTH,
    THRESHOLD,
    estimate,
    fit,
    posterior,
    shrunk,
    summed_nll,
)
from models_store.uncertainty import softmax


def sampled(temperature, rows=20_000, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, 4)) * 3
    probs = softmax(logits, temperature)
    labels = (probs.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
    return logits, labels


def nll(members, labels, weights, t):
    probs = np.einsum("k,kbc->bc", weights, np.exp(log_softmax(members / t, axis=2)))
    return -np.log(probs[np.arange(len(labels)), labels])


def several(true, rows):
    rng = np.random.default_rng(1)
    logits, labels = sampled(true, rows)
    return np.stack([logits + rng.normal(size=logits.shape) for _ in range(3)]), labels, np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_it_finds_the_temperature_the_labels_were_drawn_at(true):
    logits, labels = sampled(true)
    assert fit(logits[None], labels, np.ones(1)) == pytest.approx(true, rel=0.05)


def test_on_a_large_split_no_other_temperature_has_a_lower_nll_of_the_average():
    members, labels, weights = several(2.0, 20_000)
    grid = np.geomspace(1.5, 3, 60)
    best = grid[np.argmin([nll(members, labels, weights, t).mean() for t in grid])]
    found = estimate(members, labels, weights)
    assert abs(math.log(found.temperature / best)) < found.standard_error + math.log(grid[1] / grid[0])
    assert found.standard_error < 0.03


def test_the_estimate_is_the_penalised_one_that_a_grid_finds():
    members, labels, weights = several(2.0, 300)
    grid = np.linspace(0, 1.5, 751)
    total = np.array([nll(members, labels, weights, math.exp(x)).sum() for x in grid]) + grid**2 / (2 * PRIOR_WIDTH**2)
    mode = grid[total.argmin()]
    near = abs(grid - mode) < 0.1
    error = (2 * np.polyfit(grid[near], total[near], 2)[0]) ** -0.5
    found = estimate(members, labels, weights)
    assert found.standard_error == pytest.approx(error, rel=0.02)
    assert math.log(found.temperature) == pytest.approx(shrunk(mode, error), abs=5e-3)


@pytest.mark.parametrize("mode", [0.0, 0.15, -0.3, 0.39, -0.5, 0.7, 0.8, -2.0])
def test_the_shrunk_estimate_minimises_the_clipped_penalty(mode):
    """Compared with the penalty's derivative (Fan and Li 2001, eq. 2.7), integrated along a grid."""
    error = 0.1
    level = THRESHOLD / error
    unit = THRESHOLD * error
    grid = np.linspace(0, 3, 30_001)
    slope = level * np.where(grid <= unit, 1, np.maximum(CLIP * unit - grid, 0) / ((CLIP - 1) * unit))
    penalty = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(grid))])
    best = grid[((grid - abs(mode)) ** 2 / (2 * error**2) + penalty).argmin()]
    assert shrunk(mode, error) == pytest.approx(math.copysign(best, mode), abs=3e-4)


@pytest.mark.parametrize("rows", [3, 10, 144])
def test_a_split_without_errors_leaves_it_at_1_and_is_warned_of(rows):
    labels = np.arange(rows) % 3
    found = estimate(np.eye(3)[labels][None] * 5, labels, np.ones(1))
    assert found.temperature == 1
    assert (found.images, found.errors) == (rows, 0)
    assert f"{rows} validation images, 0 of them" in found.warning


def test_a_single_error_does_not_drive_it_to_a_bound():
    labels = np.arange(144) % 10
    logits = np.eye(10)[labels] * 8
    logits[0] = np.roll(logits[0], 1) * 0.2  # wrong and uncertain
    found = estimate(logits[None], labels, np.ones(1))
    assert 0.8 < found.temperature <= 1
    assert found.errors == 1


def test_ten_images_are_warned_of_and_many_are_not():
    logits, labels = sampled(1.5, 10)
    assert estimate(logits[None], labels, np.ones(1)).warning
    logits, labels = sampled(1.5, 1000)
    assert estimate(logits[None], labels, np.ones(1)).warning is None


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), scale=st.floats(1e-3, 1e4), seed=st.integers(0, 1000))
def test_any_logits_give_a_positive_finite_temperature_and_an_error_no_larger_than_the_priors(rows, scale, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, rows, 3)) * scale
    found = estimate(logits, rng.integers(0, 3, rows), np.array([0.5, 0.5]))
    assert 0 < found.temperature < math.inf
    assert 0 < found.standard_error <= PRIOR_WIDTH * (1 + 1e-9)


def test_confident_errors_raise_it_however_confident_they_are():
    """Such confidence exceeds the range of floating-point probabilities: exp(-3000) is 0."""
    labels = np.arange(200) % 4
    logits = np.eye(4)[labels] * 3000.0
    logits[:40] = np.roll(logits[:40], 1, axis=1)
    assert fit(logits[None], labels, np.ones(1)) > 10


def test_it_hardly_ever_makes_a_calibrated_network_worse():
    """With labels sampled at T = 1, the fit stays at 1 for most small splits, and no split moves it far."""
    logits, labels = sampled(1.0, 100_000)
    splits = np.split(np.arange(20_000), 100)
    found = np.array([fit(logits[None, rows], labels[rows], np.ones(1)) for rows in splits])
    plain = np.array([posterior(summed_nll(logits[None, r], labels[r], np.ones(1)), 100.0)[0] for r in splits])
    assert (found == 1).mean() > 0.9  # a normal statistic is within two standard errors with probability 0.954
    assert (np.log(found) ** 2).mean() < 0.1 * (plain**2).mean()
