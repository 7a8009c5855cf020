"""The temperature that makes an averaged prediction calibrated."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from models_store.uncertainty import softmax


def fit(logits: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating]) -> float:
    """T > 0 with the lowest NLL of Σ_k weight_k · softmax(z_k / T).

    Args:
        logits: (members, batch, classes), of the validation split.
        labels: (batch,).
        weights: (members,), summing to 1.
    """
    rows = np.arange(len(labels))

    def nll(log_temperature: float) -> float:
        probs = softmax(logits, math.exp(log_temperature))[:, rows, labels]
        return float(-np.log(np.maximum(weights @ probs, 1e-12)).mean())

    # Bounded: on a split without an error the best T is 0, and the answers would have no uncertainty left.
    best = minimize_scalar(nll, bounds=(math.log(0.2), math.log(20)), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(best.x))
