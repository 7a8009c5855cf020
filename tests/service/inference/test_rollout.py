import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_store.records.rollout import Rule
from service.inference.rollout import Tally, position

NAMES = st.text(max_size=30).filter(bool)


@given(NAMES)
def test_a_caller_always_has_the_same_position(caller):
    assert position("e@2", caller) == position("e@2", caller)
    assert 0 <= position("e@2", caller) < 1


def test_callers_are_spread_evenly_and_differently_for_each_version():
    stats = pytest.importorskip("scipy.stats")

    positions = [position("e@2", f"caller-{i}") for i in range(4000)]
    others = [position("e@3", f"caller-{i}") for i in range(4000)]
    assert stats.kstest(positions, "uniform").pvalue > 1e-4
    assert abs(stats.spearmanr(positions, others).statistic) < 0.08


def test_requests_without_a_caller_are_spread_at_random():
    assert len({position("e@2", "") for _ in range(100)}) > 90


COUNTS = st.integers(0, 2000)


@given(COUNTS, COUNTS, st.floats(0, 0.9), st.integers(1, 500))
def test_a_share_is_exceeded_as_soon_as_the_rest_of_the_requests_could_not_mend_it(requests, failures, most, least):
    tally = Tally(requests=requests, failures=min(failures, requests))
    rule = Rule(errors=most, disagreement=None, slowdown=None, requests=least)
    rest = max(0, least - requests)
    best = tally.failures / (requests + rest)
    assert (tally.exceeds(rule) == "errors") == (tally.failures > most * (requests + rest))
    if best > most + 1e-9:
        assert tally.exceeds(rule) == "errors"


def test_a_version_that_always_fails_is_found_out_after_few_requests():
    rule = Rule()
    counts = next(n for n in range(1000) if Tally(requests=n, failures=n).exceeds(rule))
    assert counts == 3


@pytest.mark.parametrize(("tally", "reason"), [
    (Tally(requests=300, rows=300, different=60, own_seconds=1, active_seconds=1), None),
    (Tally(requests=300, rows=300, different=61, own_seconds=1, active_seconds=1), "disagreement"),
    (Tally(requests=300, rows=199, timed=199, different=0, own_seconds=9, active_seconds=1), None),
    (Tally(requests=300, rows=0, timed=200, different=0, own_seconds=9, active_seconds=1), "slowdown"),
    (Tally(requests=300, rows=200, timed=200, different=0, own_seconds=3, active_seconds=1), None),
])  # fmt: skip
def test_each_limit_is_its_own(tally, reason):
    assert tally.exceeds(Rule()) == reason


def test_a_limit_of_null_is_not_checked():
    rule = Rule(errors=None, disagreement=None, slowdown=None)
    assert Tally(requests=1e6, failures=1e6, rows=1e6, different=1e6, own_seconds=1e6).exceeds(rule) is None
