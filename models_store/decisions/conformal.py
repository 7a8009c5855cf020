"""Prediction sets by split conformal prediction: sets of classes that contain the true class with a chosen probability.

Every class gets a score, small for plausible classes. The threshold for a coverage 1 − α is the ⌈(n + 1)(1 − α)⌉-th
smallest score of the true classes of n calibration images; a set holds the classes with scores up to the threshold. If
calibration images and new images are exchangeable, a set contains the true class with a probability of at least 1 − α.

    lac    1 − p_y                                          Sadinle et al. 2019: the smallest sets
    aps    Σ_{p_j > p_y} p_j + u · p_y                      Romano et al. 2020: sets that grow with difficulty
    raps   aps + PENALTY · max(0, rank(y) − FREE_RANKS)     Angelopoulos et al. 2021: without its long tails

u is uniform on [0, 1), one number for each image; it makes the coverage of `aps` and `raps` exact instead of excessive.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models_store.uncertainty import Floats

Method = Literal["lac", "aps", "raps"]
METHODS: tuple[Method, ...] = get_args(Method)
PENALTY, FREE_RANKS = 0.01, 5


def scores(probs: Floats, method: Method, u: Floats) -> Floats:
    """Score of every class, (batch, classes).

    Args:
        probs: (batch, classes).
        method: see the module.
        u: (batch,), uniform on [0, 1); `lac` does not use it.
    """
    if method == "lac":
        return 1 - probs
    if not len(probs):
        return probs
    order = np.argsort(-probs, axis=1, kind="stable")
    ordered = np.take_along_axis(probs, order, axis=1)
    values = ordered.cumsum(axis=1) - (1 - u[:, None]) * ordered
    if method == "raps":
        ranks = np.arange(1.0, len(probs[0]) + 1)
        values = values + PENALTY * np.maximum(0.0, ranks - FREE_RANKS)
    found = np.empty_like(values)
    np.put_along_axis(found, order, values, axis=1)
    return found


def most_coverage(images: int) -> float:
    """The largest coverage that a number of calibration images can guarantee."""
    return images / (images + 1)


def threshold(sorted_scores: Floats, coverage: float) -> float:
    """The threshold for a coverage in (0, 1).

    Args:
        sorted_scores: scores of the true classes of the calibration images, ascending.
        coverage: share of sets that contain the true class.

    Raises:
        ValueError: there are too few calibration images for this coverage.
    """
    count = len(sorted_scores)
    rank = math.ceil((count + 1) * coverage - 1e-9)  # (n + 1) · 0.9 may lie just above a whole number
    if rank > count:
        raise ValueError(f"{count} calibration images guarantee a coverage of at most {most_coverage(count):.4g}")
    return float(sorted_scores[max(rank, 1) - 1])


def thresholds_by_class(true_scores: Floats, labels: NDArray[np.integer], classes: int, coverage: float) -> Floats:
    """A threshold for each class, (classes,): the coverage then holds for each true class (Vovk 2012, label-conditional).

    A class with too few calibration images for the coverage gets the threshold of all images, without a guarantee of
    its own; see `classes_without_guarantee`.
    """
    common = threshold(np.sort(true_scores), coverage)
    found = np.full(classes, common)
    without = set(classes_without_guarantee(labels, classes, coverage))
    for label in set(range(classes)) - without:
        found[label] = threshold(np.sort(true_scores[labels == label]), coverage)
    return found


def classes_without_guarantee(labels: NDArray[np.integer], classes: int, coverage: float) -> list[int]:
    """Classes whose calibration images are too few for a coverage of their own."""
    counts = np.bincount(labels, minlength=classes)
    return [label for label in range(classes) if math.ceil((counts[label] + 1) * coverage - 1e-9) > counts[label]]


def sets(probs: Floats, class_scores: Floats, limit: float | Floats, *, allow_empty: bool) -> NDArray[np.bool_]:
    """Which classes are in the set of each row, (batch, classes).

    Args:
        probs: (batch, classes).
        class_scores: from `scores`.
        limit: one threshold, or one for each class.
        allow_empty: False adds the most probable class to sets that would be empty; the coverage only grows.
    """
    chosen = class_scores <= limit
    if not allow_empty:
        empty = np.flatnonzero(~chosen.any(axis=1))
        chosen[empty, probs[empty].argmax(axis=1)] = True
    return chosen
