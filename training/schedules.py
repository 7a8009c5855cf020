"""Learning rates as functions of the iteration i = 1, 2, …"""

from __future__ import annotations


def plain_rate(i: int, total: int, rate: float) -> float:
    """The rate for a single network (Garipov et al. 2018): constant to half the budget, linear to 1 % at 0.9, then flat.

    Args:
        i: iteration, from 1.
        total: iterations of the whole budget.
        rate: the initial rate.
    """
    done = i / total
    if done <= 0.5:
        return rate
    if done <= 0.9:
        return rate * (1 - 0.99 * (done - 0.5) / 0.4)
    return rate * 0.01


def fge_rate(i: int, cycle: int, alpha_1: float, alpha_2: float) -> float:
    """The cyclical rate of FGE (Garipov et al. 2018, section 5): α2 exactly at mid-cycle, α1 at its end.

    Args:
        i: iteration, from 1.
        cycle: iterations in a cycle; even.
        alpha_1: the largest rate.
        alpha_2: the smallest; members are collected there.
    """
    t = ((i - 1) % cycle + 1) / cycle
    if t <= 0.5:
        return (1 - 2 * t) * alpha_1 + 2 * t * alpha_2
    return (2 - 2 * t) * alpha_2 + (2 * t - 1) * alpha_1


def fge_collections(iterations: int, cycle: int) -> list[int]:
    """Iterations up to `iterations` at which the rate is α2: cycle/2, 3·cycle/2, …"""
    return list(range(cycle // 2, iterations + 1, cycle))
