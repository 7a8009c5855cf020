"""Divides the rows of a split in two: at random, in the shares of the classes, and without dividing groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

Rows = NDArray[np.int64]
FOLDS = 16


def stratified(labels: NDArray[Any], share: float, seed: int) -> tuple[Rows, Rows]:
    """The rows that stay and those set aside: `share` of each class, rounded.

    Args:
        labels: (N,) integers or texts.
        share: in (0, 1).
        seed: of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    aside = np.zeros(len(labels), bool)
    for value in np.unique(labels):
        own = order[labels[order] == value]
        aside[own[: round(share * len(own))]] = True
    return order[~aside[order]], order[aside[order]]


def by_group(labels: NDArray[Any], groups: Sequence[Any], share: float, seed: int) -> tuple[Rows, Rows]:
    """The rows that stay and those set aside, such that no group has rows in both; classes have about equal shares.

    Folds of scikit-learn's StratifiedGroupKFold, as many as come closest to the share.

    Args:
        labels: (N,) integers or texts.
        groups: N values; rows with equal ones belong together.
        share: of the rows, in (0, 1); it is kept as closely as the sizes of the groups allow.
        seed: of the choice.

    Raises:
        DataError: there are fewer than two groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    numbers = np.unique(np.array([str(group) for group in groups]), return_inverse=True)[1]
    count = int(numbers.max()) + 1
    if count < 2:
        raise DataError(
            "All rows belong to one group, so none can be set aside. Is --group the right column or pattern?"
        )
    folds = StratifiedGroupKFold(min(count, FOLDS), shuffle=True, random_state=seed)
    own = np.unique(labels, return_inverse=True)[1]
    if np.bincount(own).max() < folds.get_n_splits():  # scikit-learn refuses if every class has fewer rows than folds
        own = np.zeros_like(own)
    parts = [np.asarray(part) for _, part in folds.split(np.zeros(len(labels)), own, numbers)]
    # All sets of folds but none and all of them: the one whose rows come closest to the share, of equal ones the largest.
    chosen = (np.arange(1, 2 ** len(parts) - 1)[:, None] >> np.arange(len(parts))) & 1  # (sets, folds)
    off = np.abs(chosen @ np.array([len(part) for part in parts]) - share * len(labels))
    best = chosen[np.lexsort((-chosen.sum(axis=1), off))[0]]
    aside = np.sort(np.concatenate([part for part, wanted in zip(parts, best, strict=True) if wanted]))
    return np.setdiff1d(np.arange(len(labels)), aside), aside


def note(aside: int, rows: int, share: float, what: str) -> list[str]:
    """A warning if groups are so large that a split is far from its share."""
    if abs(aside / rows - share) <= max(0.02, share / 4):
        return []
    return [
        f"warning: the {what} split has {aside / rows:.0%} of the rows instead of {share:.0%}, because groups are not divided"
    ]
