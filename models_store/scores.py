"""Scores of predicted distributions against labels. probs (batch, classes), labels (batch,)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models_store.manifest import ECE_BINS, Scores

Floats = NDArray[np.floating]
Labels = NDArray[np.integer]


def score(probs: Floats, labels: Labels) -> Scores:
    """Accuracy, NLL, Brier and ECE."""
    return Scores(
        accuracy=accuracy(probs, labels), nll=nll(probs, labels), brier=brier(probs, labels), ece=ece(probs, labels)
    )


def accuracy(probs: Floats, labels: Labels) -> float:
    """Share of correct predictions."""
    return float((probs.argmax(axis=1) == labels).mean())


def nll(probs: Floats, labels: Labels) -> float:
    """Mean negative log-likelihood in nats; a probability of 0 counts as 1e-12."""
    return float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12)).mean())


def brier(probs: Floats, labels: Labels) -> float:
    """Mean squared distance to the one-hot label, summed over classes (Brier 1950): in [0, 2]."""
    return float(((probs - np.eye(probs.shape[1])[labels]) ** 2).sum(axis=1).mean())


def ece(probs: Floats, labels: Labels, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the confidence over equal-width bins (l, u] (Guo et al. 2017, eq. 3)."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # For each bin: number of answers × (accuracy − mean confidence).
    gap = np.bincount(bin_of, right - confidence, bins)
    return float(np.abs(gap).sum() / len(labels))
