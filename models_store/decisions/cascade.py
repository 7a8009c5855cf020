"""Cascades: members run in groups, and an image leaves as soon as the members so far decide it.

Two rules decide after each group but the last, from the members so far. With the weights w of the members, and the
rows' two largest averaged probabilities p1 and p2:

    exact        p1 − p2 > remaining weight / weight so far, at the temperature of the full average. Even if all remaining members
                 were certain of the second class, the first would stay ahead: the label is that of the full average.
    calibrated   p1 − p2 ≥ the group's margin, at the group's own temperature. The margins were chosen such that, with a
                 probability of at least CONFIDENCE over the choice of the calibration images, the label differs from the
                 full average's for at most `disagreement` of images like these. Labels are not needed for that.

Order, groups and temperatures are chosen on the first half of the validation split for the lowest expected cost; so are
basic margins, SLACK times the largest gaps at which a label of that half differs. The second half then decides whether they must
be tightened: fixed sequence testing from the strictest margins to the basic ones (see abstention).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from models_store.decisions.abstention import CONFIDENCE
from models_store.manifest import Cascade
from models_store.uncertainty import Floats, softmax

DISAGREEMENT = 0.001
STAGE_COST = 1.0  # cost of one more group, in members: for small members a call of the graph and of Python costs about as much as a member
# Basic margins are this many times the largest gap at which a label differed. Over 12 random divisions of 16 000 images of Fashion-MNIST
# (12 members) labels then differed for 0.017 % of new images at 1.9 members each, with 1.0 for 0.031 % at 2.1.
SLACK = 1.5
_FACTORS = np.linspace(0, 1, 41)  # of what lies between a basic margin and 1

Logits = NDArray[np.floating]
FitTemperature = Callable[[Logits, NDArray[np.integer], Floats], float]


def gap(probs: Floats) -> Floats:
    """Difference of the two largest probabilities, (batch,), of (batch, classes)."""
    two = np.partition(probs, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def averaged(logits: Logits, weights: Floats, temperature: float) -> Floats:
    """Average of some members with their weights normalised, (batch, classes), of logits (members, batch, classes)."""
    return np.einsum("k,kbc->bc", weights / weights.sum(), softmax(logits, temperature))


def fit(
    logits: Logits,
    labels: NDArray[np.integer],
    weights: Floats,
    temperature: float,
    rows: tuple[NDArray[np.intp], NDArray[np.intp]],
    fit_temperature: FitTemperature,
) -> Cascade | None:
    """Choose a cascade; None if there is one member.

    Args:
        logits: (members, images, classes).
        labels: (images,).
        weights: (members,), summing to 1.
        temperature: T of the full average.
        rows: images for choices, and images for the guarantee.
        fit_temperature: (logits, labels, weights) -> T.
    """
    if len(logits) < 2:
        return None
    first, second = rows
    order = _order(logits[:, first], weights, temperature)
    own = logits[order]
    chosen = _groups(own[:, first], labels[first], weights[order], temperature, fit_temperature)
    stages, temperatures, basic = chosen
    ends = np.cumsum(stages)
    gaps, differs = _outcomes(own[:, second], weights[order], temperature, ends, temperatures)
    margins, bound = _certified(gaps, differs, basic)
    return Cascade(order=order, groups=stages, temperatures=temperatures, margins=margins, disagreement=bound)


def _order(logits: Logits, weights: Floats, temperature: float) -> list[int]:
    """Members in the order in which most rows could leave early: each next member is the one that lets most rows leave."""
    probs = weights[:, None, None] * softmax(logits, temperature)
    label = probs.sum(axis=0).argmax(axis=1)
    order: list[int] = []
    total = np.zeros_like(probs[0])
    while len(order) < len(probs):
        left = [member for member in range(len(probs)) if member not in order]
        leaving = [_may_leave((total + probs[k]) / (weights[order].sum() + weights[k]), label) for k in left]
        best = left[int(np.argmax(leaving))]
        order.append(best)
        total = total + probs[best]
    return order


def _may_leave(mean: Floats, label: NDArray[np.intp]) -> int:
    """Rows that a margin lets leave if at most DISAGREEMENT of all rows may then have another label than the final one."""
    widest_first = np.argsort(-gap(mean), kind="stable")
    differing = np.cumsum((mean.argmax(axis=1) != label)[widest_first])
    return int(np.searchsorted(differing, DISAGREEMENT * len(label), side="right"))


def _groups(
    logits: Logits, labels: NDArray[np.integer], weights: Floats, temperature: float, fit_temperature: FitTemperature
) -> tuple[list[int], list[float], list[float]]:
    """Sizes of the groups with the lowest expected cost, their temperatures, and basic margins."""
    members = len(logits)
    fitted: dict[int, float] = {members: temperature}
    best: tuple[float, list[int], list[float], list[float]] | None = None
    for sizes in _candidates(members):
        ends = np.cumsum(sizes)
        for end in ends:
            if int(end) not in fitted:
                part = weights[:end] / weights[:end].sum()
                fitted[int(end)] = fit_temperature(logits[:end], labels, part)
        temperatures = [fitted[int(end)] for end in ends]
        gaps, differs = _outcomes(logits, weights, temperature, ends, temperatures)
        basic = [_smallest_margin(gap_, wrong) for gap_, wrong in zip(gaps, differs, strict=True)]
        cost = _cost(gaps, basic, sizes)
        if best is None or cost < best[0] - 1e-9:
            best = cost, sizes, temperatures, basic
    assert best is not None
    return best[1], best[2], best[3]


def _candidates(members: int) -> list[list[int]]:
    """Sizes of groups: a first one of up to four members, and further ones that stay as large or double."""
    found: list[list[int]] = []
    for first in range(1, min(4, members - 1) + 1):
        for growth in (1, 2):
            sizes, size, left = [first], first, members - first
            while left:
                size = min(left, size * growth)
                sizes.append(size)
                left -= size
            if sizes not in found:
                found.append(sizes)
        if [first, members - first] not in found:
            found.append([first, members - first])
    return found


def _outcomes(
    logits: Logits, weights: Floats, temperature: float, ends: NDArray[np.integer], temperatures: Sequence[float]
) -> tuple[list[Floats], list[NDArray[np.bool_]]]:
    """After each group but the last: the gap of each row, and whether its label differs from the full average's."""
    label = averaged(logits, weights, temperature).argmax(axis=1)
    means = [averaged(logits[:end], weights[:end], t) for end, t in zip(ends[:-1], temperatures, strict=False)]
    return [gap(mean) for mean in means], [mean.argmax(axis=1) != label for mean in means]


def _smallest_margin(gaps: Floats, differs: NDArray[np.bool_]) -> float:
    return min(1.0, SLACK * float(np.nextafter(gaps[differs].max(), 2))) if differs.any() else 0.0


def _cost(gaps: Sequence[Floats], margins: Sequence[float], sizes: Sequence[int]) -> float:
    """Expected number of members for a row, with STAGE_COST for each group that it waits for."""
    staying = np.ones(len(gaps[0]), bool)
    cost = float(sizes[0])
    for of_rows, margin, size in zip(gaps, margins, sizes[1:], strict=True):
        staying &= of_rows < margin
        cost += (size + STAGE_COST) * float(staying.mean())
    return cost


def _certified(
    gaps: Sequence[Floats], differs: Sequence[NDArray[np.bool_]], basic: Sequence[float]
) -> tuple[list[float] | None, float | None]:
    """The most relaxed margins with a guarantee, and its bound: DISAGREEMENT, or the smallest that so few images allow."""
    count = len(gaps[0])
    if not count:
        return None, None
    bound = max(DISAGREEMENT, -math.expm1(math.log(1 - CONFIDENCE) / count) * (1 + 1e-9))
    if bound >= 0.05:
        return None, None
    found: list[float] | None = None
    for factor in _FACTORS:
        margins = [max(0.0, 1 - factor * (1 - margin)) for margin in basic]
        if bdtr(float(_disagreements(gaps, differs, margins)), count, bound) > 1 - CONFIDENCE:
            break
        found = margins
    return found, bound if found is not None else None


def _disagreements(gaps: Sequence[Floats], differs: Sequence[NDArray[np.bool_]], margins: Sequence[float]) -> int:
    staying, count = np.ones(len(gaps[0]), bool), 0
    for of_rows, wrong, margin in zip(gaps, differs, margins, strict=True):
        leaves = staying & (of_rows >= margin)
        count += int((leaves & wrong).sum())
        staying &= ~leaves
    return count
