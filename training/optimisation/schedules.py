"""Learning rates as functions of the iteration i = 1, 2, …"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from training.config import Config


def rate_of(config: Config, i: int, total: int) -> float:
    """The rate of the plain part of a training with these options: the plain schedule or a cosine, after a warm-up.

    Args:
        config: the options.
        i: iteration, from 1.
        total: iterations of the whole budget.
    """
    if config.schedule == "cosine":
        rate = config.lr / 2 * (math.cos(math.pi * (i - 1) / total) + 1)
    else:
        rate = plain_rate(i, total, config.lr)
    return rate * min(1.0, i / (config.warmup * total)) if config.warmup else rate


def plain_rate(i: int, total: int, rate: float, final: float = 0.01) -> float:
    """The plain schedule (Garipov et al. 2018): constant to half of the budget, linear to 1 % at 0.9, then constant.

    SWAG (Maddox et al. 2019) uses another final share, and continues at that rate.

    Args:
        i: iteration, from 1.
        total: iterations of the whole budget.
        rate: the initial rate.
        final: the last rate as a share of the initial rate.
    """
    done = i / total
    if done <= 0.5:
        return rate
    if done <= 0.9:
        return rate * (1 - (1 - final) * (done - 0.5) / 0.4)
    return rate * final


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


def snapshot_rate(i: int, ends: Sequence[int], rate: float) -> float:
    """The cosine with restarts (Huang et al. 2017, eq. 2): from `rate` down to nearly 0 in each cycle.

    Args:
        i: iteration, from 1.
        ends: the last iteration of each cycle.
        rate: the initial rate of each cycle.
    """
    cycle = bisect.bisect_left(ends, i)
    begin = ends[cycle - 1] if cycle else 0
    return rate / 2 * (math.cos(math.pi * (i - 1 - begin) / (ends[cycle] - begin)) + 1)


def snapshot_collections(total: int, cycles: int) -> list[int]:
    """The last iteration of each of `cycles` equal cycles, rounded."""
    return [round(number * total / cycles) for number in range(1, cycles + 1)]
