"""Scores of predicted distributions against labels. probs (batch, classes), labels (batch,)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models_store.scores import accuracy, brier, ece, nll, score

Floats = NDArray[np.floating]
__all__ = ["accuracy", "aurc", "auroc", "brier", "ece", "nll", "score"]


def aurc(uncertainty: Floats, wrong: NDArray[np.bool_]) -> float:
    """Area under the risk-coverage curve (Geifman et al. 2019): mean over coverages 1/n … 1 of the error among the
    least uncertain. Ties share their mean error, so the order of rows does not matter.
    """
    order = np.argsort(uncertainty, kind="stable")
    values, wrongs = uncertainty[order], wrong[order].astype(np.float64)
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    expected = (np.bincount(group, wrongs) / sizes)[group]
    return float((np.cumsum(expected) / np.arange(1, len(wrongs) + 1)).mean())


def auroc(uncertainty: Floats, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive is more uncertain than a negative; NaN if there are no positives or no negatives."""
    from sklearn.metrics import roc_auc_score  # imported where it is needed: commands start sooner

    if positive.all() or not positive.any():
        return float("nan")
    return float(roc_auc_score(positive, uncertainty))
