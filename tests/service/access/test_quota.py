import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.access import quota
from service.access.quota import Quota
from service.operations.shared import LockedError, Shared

KEY, OTHER = "0a1b2c3d", "ffffffff"


@pytest.fixture
def buckets(monkeypatch):
    monkeypatch.setenv(quota.SHARED, "")
    return Quota.make()


def test_a_full_bucket_gives_the_rows_of_a_minute_and_fills_up_evenly(buckets):
    assert buckets.take(KEY, 60, 60, now=100) == 0
    assert buckets.take(KEY, 1, 60, now=100) == pytest.approx(1)
    assert buckets.take(KEY, 10, 60, now=105) == pytest.approx(5)
    assert buckets.take(KEY, 10, 60, now=110) == 0
    assert buckets.take(OTHER, 60, 60, now=110) == 0  # each key has its own
    assert buckets.take(KEY, 60, 60, now=10_000) == 0
    assert buckets.take(KEY, 1, 60, now=10_000) > 0  # never more than a minute's


def test_rows_that_were_not_answered_are_given_back_but_never_beyond_a_minute(buckets):
    buckets.take(KEY, 50, 60, now=0)
    assert buckets.take(KEY, -50, 60, now=0) == 0
    assert buckets.take(KEY, -50, 60, now=0) == 0
    assert buckets.take(KEY, 60, 60, now=0) == 0
    assert buckets.take(KEY, 1, 60, now=0) > 0


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 30)), min_size=1, max_size=60), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_in_any_window_at_most_a_full_bucket_and_its_refill_are_taken(requests, per_minute):
    buckets = Quota.make()
    taken, now = [], 0.0
    for rows, pause in requests:
        now += pause
        if buckets.take(KEY, rows, per_minute, now=now) == 0:
            taken.append((now, rows))
    for i, (first, _) in enumerate(taken):
        for j in range(i, len(taken)):
            within = sum(rows for _, rows in taken[i : j + 1])
            assert within <= per_minute * (1 + (taken[j][0] - first) / 60) + 1e-6


def test_asking_for_none_says_whether_any_are_left(buckets):
    assert buckets.take(KEY, 0, 5, now=0) == 0
    buckets.take(KEY, 5, 5, now=0)
    assert buckets.take(KEY, 0, 5, now=0) == pytest.approx(12)


def test_many_keys_have_their_own_buckets(buckets):
    names = [f"{i * 2048:08x}" for i in range(1000)]  # all with the same hash
    for name in names:
        assert buckets.take(name, 3, 3, now=0) == 0
    assert all(buckets.take(name, 1, 3, now=0) > 0 for name in names)


def _takes(file, barrier, found):
    buckets = Quota(Shared(file, quota.NUMBERS))
    barrier.wait()
    found.put(sum(buckets.take(KEY, 1, 500, now=0) == 0 for _ in range(400)))


def test_several_processes_together_take_exactly_the_quota(buckets):
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_takes, args=(buckets._buckets._file, barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    counts = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(counts) == 500


def _hold(file, held, end):
    import fcntl

    fcntl.lockf(file, fcntl.LOCK_EX)
    held.set()
    end.wait()


def test_a_process_that_holds_the_lock_delays_nobody_for_long_and_frees_it_when_it_dies(buckets):
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(buckets._buckets._file, held, end))
    process.start()
    held.wait()
    with pytest.raises(LockedError):
        buckets.take(KEY, 1, 10, now=0)
    process.kill()
    process.join()
    assert buckets.take(KEY, 1, 10, now=0) == 0
