import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.optimisation import schedules
from training.optimisation.schedules import fge_collections, fge_rate, plain_rate

even = st.integers(1, 500).map(lambda n: 2 * n)


@given(even, st.integers(1, 5))
def test_members_are_collected_exactly_where_the_rate_is_alpha_2_and_nowhere_else(cycle, cycles):
    rates = {i: fge_rate(i, cycle, 0.05, 5e-4) for i in range(1, cycle * cycles + 1)}
    lowest = [i for i, rate in rates.items() if rate == pytest.approx(5e-4, rel=1e-12)]
    assert lowest == fge_collections(cycle * cycles, cycle)
    assert len(lowest) == cycles


@given(even)
def test_the_rate_is_alpha_1_at_the_end_of_a_cycle_and_linear_between(cycle):
    assert fge_rate(cycle, cycle, 0.05, 5e-4) == pytest.approx(0.05)
    assert fge_rate(cycle + 1, cycle, 0.05, 5e-4) == fge_rate(1, cycle, 0.05, 5e-4)
    down = [fge_rate(i, cycle, 0.05, 5e-4) for i in range(1, cycle // 2 + 1)]
    steps = [a - b for a, b in pairwise(down)]
    assert steps == pytest.approx([2 * (0.05 - 5e-4) / cycle] * len(steps))


def test_the_papers_formula_at_a_quarter_and_three_quarters():
    assert fge_rate(25, 100, 1.0, 0.2) == pytest.approx(0.6)
    assert fge_rate(75, 100, 1.0, 0.2) == pytest.approx(0.6)


def test_nothing_is_collected_before_half_a_cycle():
    assert fge_collections(49, 100) == []
    assert fge_collections(150, 100) == [50, 150]


def test_the_plain_schedule_is_constant_then_linear_then_flat():
    rates = [plain_rate(i, 1000, 0.1) for i in range(1, 1001)]
    assert rates[:500] == [0.1] * 500
    assert rates[699] == pytest.approx(0.1 * (1 + 0.01) / 2)
    assert rates[899:] == pytest.approx([0.001] * 101)
    assert all(a >= b for a, b in pairwise(rates))


def test_the_snapshot_rate_is_the_papers_cosine():
    """Huang et al. 2017, eq. 2, if the number of cycles divides the budget."""
    total, cycles = 60, 4
    ends = schedules.snapshot_collections(total, cycles)
    assert ends == [15, 30, 45, 60]
    for t in range(1, total + 1):
        expected = 0.1 / 2 * (math.cos(math.pi * ((t - 1) % 15) / 15) + 1)
        assert schedules.snapshot_rate(t, ends, 0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("total", "cycles"), [(9, 6), (10, 4), (7, 7), (100, 3)])
def test_snapshots_are_distinct_and_the_last_is_the_end(total, cycles):
    ends = schedules.snapshot_collections(total, cycles)
    assert len(set(ends)) == cycles
    assert ends[-1] == total
