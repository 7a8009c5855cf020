"""Divides the rows of a split in two: at random, in the shares of the classes, and without dividing groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

Rows = NDArray[np.int64]


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

    One fold of scikit-learn's StratifiedGroupKFold with 1 / share folds, rounded.

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
    folds = StratifiedGroupKFold(min(count, max(2, round(1 / share))), shuffle=True, random_state=seed)
    own = np.unique(labels, return_inverse=True)[1]
    if np.bincount(own).max() < folds.get_n_splits():  # scikit-learn refuses if every class has fewer rows than folds
        own = np.zeros_like(own)
    stay, aside = next(iter(folds.split(np.zeros(len(labels)), own, numbers)))
    return np.asarray(stay), np.asarray(aside)
