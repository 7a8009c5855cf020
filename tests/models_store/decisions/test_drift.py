"""The test of drift keeps its false-alarm rate and finds changes; the bins are those of numpy's quantiles."""

import math

import numpy as np
import pytest
from scipy import stats

from models_store.decisions import drift
from models_store.decisions.drift import Bins, SequentialTest

rng = np.random.default_rng(0)


def p_values(calibration, values, seed=0):
    test = SequentialTest(calibration, seed=seed)
    return np.concatenate([test.p_values(part) for part in np.array_split(values, max(1, len(values) // 7))])


@pytest.mark.parametrize(
    "draw", [rng.normal, lambda size: rng.integers(0, 4, size).astype(float)], ids=["real", "ties"]
)
def test_p_values_of_exchangeable_values_are_independent_and_uniform(draw):
    found = p_values(draw(size=300), draw(size=20_000))
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.03


def test_a_p_value_is_the_rank_among_calibration_and_earlier_values():
    values = rng.normal(size=50)
    calibration = rng.normal(size=100)
    # Of values between the same two calibration values the order is not kept.
    ranks = np.searchsorted(np.sort(calibration), np.concatenate([calibration, values]), side="right")
    for index, p in enumerate(p_values(calibration, values)):
        before, own = ranks[: 100 + index], ranks[100 + index]
        above, equal = (before > own).sum(), (before == own).sum()
        assert (above - 1) / (len(before) + 1) <= p <= (above + equal + 1) / (len(before) + 1)


@pytest.mark.parametrize("size", [1, 20, 3000])
def test_extreme_p_values_are_as_frequent_as_all_others(size):
    """The first value after n calibration values lies above or below all of them with probability 1 / (n + 1) each."""
    repetitions = 4000 if size < 1000 else 2000
    found = np.array([p_values(np.random.default_rng(s).normal(size=size), np.random.default_rng(10**6 + s).normal(size=1), s)[0] for s in range(repetitions)])  # fmt: skip
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    edge = 1 / (size + 1)
    for extreme in ((found < edge).sum(), (found > 1 - edge).sum()):
        assert stats.binomtest(int(extreme), repetitions, edge).pvalue > 1e-3


def test_without_a_change_the_evidence_grows_as_the_number_of_values(monkeypatch):
    """Its expectation after n values is n: the bound on false alarms follows from that by Doob's inequality."""
    monkeypatch.setattr(drift, "HORIZON", 20)
    monkeypatch.setattr(drift, "FALSE_ALARMS", 0.2)  # an alarm where R reaches 100
    repetitions, alarms = 1500, 0
    for seed in range(repetitions):
        own = np.random.default_rng(seed)
        alarms += SequentialTest(own.normal(size=50), count=1, seed=seed).add(own.normal(size=20)) > 0
    assert alarms <= stats.binom.ppf(0.999, repetitions, 0.2)


def test_a_hundred_long_streams_without_a_change_raise_no_alarm():
    alarms = sum(SequentialTest(rng.gamma(2, size=1000), seed=seed).add(rng.gamma(2, size=2000)) for seed in range(100))
    assert alarms == 0  # the bound is 0.01 for a million values


@pytest.mark.parametrize(
    ("change", "within"),
    [
        (lambda values: values + 1, 300),
        (lambda values: values * 0.3, 400),
        (lambda values: values * 3, 300),
        (lambda values: values[np.abs(values) > 0.3], 2000),  # a gap in the middle
    ],
    ids=["larger", "narrower", "wider", "gap"],
)
def test_changes_are_found_also_after_a_long_time_and_again_while_they_last(change, within):
    test = SequentialTest(rng.normal(size=2000), seed=0)
    assert test.add(rng.normal(size=5000)) == 0
    assert test.add(change(rng.normal(size=2 * within))[:within]) >= 1
    assert test.add(change(rng.normal(size=20 * within))[: 8 * within]) >= 2


def test_a_class_that_is_missing_is_found():
    test = SequentialTest(rng.integers(0, 10, 2000).astype(float), seed=0)
    values = rng.integers(0, 10, 3000).astype(float)
    assert test.add(values[values != 4]) >= 1


def test_bins_are_deciles_or_classes_and_the_index_is_zero_for_equal_shares():
    values = rng.normal(size=10_000)
    bins = Bins("novelty", values)
    assert bins.calibration == pytest.approx(np.full(10, 1000), abs=1)
    assert bins.counts(values[:0]).tolist() == [0] * 10
    assert drift.stability_index(bins.calibration, bins.counts(rng.normal(size=10_000))) < 0.01
    shifted = bins.counts(rng.normal(1, size=10_000))
    shares = shifted / shifted.sum()
    expected = sum((s - 0.1) * math.log(s / 0.1) for s in shares)
    assert drift.stability_index(bins.calibration, shifted) == pytest.approx(expected, rel=1e-2)
    many = Bins("predicted", rng.integers(0, 1000, 3000).astype(float))
    assert len(many.calibration) == 10
    classes = Bins("predicted", np.array([0.0, 1, 1, 2]))
    assert classes.calibration.tolist() == [1, 2, 1]
    assert classes.counts(np.array([2.0, 2, 0])).tolist() == [1, 0, 2]


def test_constant_values_neither_fail_nor_alarm():
    constant = np.zeros(500)
    assert SequentialTest(constant, seed=0).add(constant) == 0
    assert Bins("input_std", constant).calibration.sum() == 500
