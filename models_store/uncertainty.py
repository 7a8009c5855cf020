"""Combine the members' logits into one prediction, and measure its uncertainty.

Axis order everywhere: (members, batch, classes). Entropies are in nats.

    mean_probs           p̄ = Σ_k weight_k · softmax(z_k / T)      probabilities are averaged, never logits
    predictive_entropy   H(p̄)                                      total uncertainty
    expected_entropy     Σ_k weight_k · H(p_k)                     mean uncertainty of a member alone
    mutual_information   predictive_entropy − expected_entropy     what the members disagree on
    disagreement         share (by weight) of members whose top class is not the ensemble's
    novelty              distance from the training images, see graphs/novelty.py; predictive_entropy where none is computed

Decomposition: Depeweg et al. 2018, "Decomposition of Uncertainty in Bayesian Deep Learning", §2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """Predictions for a batch. `mean_probs` is (batch, classes); all other fields are (batch,)."""

    mean_probs: Floats
    label: NDArray[np.intp]
    confidence: Floats
    predictive_entropy: Floats
    expected_entropy: Floats
    mutual_information: Floats
    disagreement: Floats
    novelty: Floats

    def rows(self, start: int, stop: int) -> Prediction:
        """Predictions for rows `start` to `stop` (exclusive) of the batch."""
        return Prediction(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def take(self, rows: NDArray[np.intp]) -> Prediction:
        """Predictions for some rows of the batch, in the order of their indices."""
        return Prediction(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Prediction]) -> Prediction:
        """Concatenate the predictions of several batches."""
        return Prediction(*(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Prediction)))


_FARTHEST = float(np.finfo(np.float32).max)  # JSON has no infinity
# Measures that rank predictions by uncertainty: attribute of Prediction -> sign (-1: small values are uncertain).
UNCERTAINTY_MEASURES = {
    "predictive_entropy": 1,
    "expected_entropy": 1,
    "mutual_information": 1,
    "disagreement": 1,
    "confidence": -1,
}


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Softmax of `logits / temperature` over the last axis, in float64."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return scaled / scaled.sum(axis=-1, keepdims=True)


def entropy(probs: Floats) -> Floats:
    """Shannon entropy over the last axis, in nats; 0·log 0 = 0."""
    return -np.sum(probs * np.log(np.where(probs > 0, probs, 1.0)), axis=-1)


def combine(probs: Floats, weights: Floats, novelty: NDArray[np.floating] | None = None) -> Prediction:
    """Average the members' probabilities and measure their uncertainty.

    Args:
        probs: (members, batch, classes), each row a distribution.
        weights: (members,), positive, summing to 1.
        novelty: (batch,), computed by a member's graph; None if no member computes it.
    """
    mean_probs = np.einsum("k,kbc->bc", weights, probs)
    label = mean_probs.argmax(axis=-1)
    predictive = entropy(mean_probs)
    expected = weights @ entropy(probs)
    return Prediction(
        mean_probs=mean_probs,
        label=label,
        confidence=mean_probs.max(axis=-1),
        predictive_entropy=predictive,
        expected_entropy=expected,
        # Entropy is concave, so this is non-negative except for rounding.
        mutual_information=np.maximum(predictive - expected, 0.0),
        disagreement=weights @ (probs.argmax(axis=-1) != label).astype(np.float64),
        # A distance that is not a number comes from features too large for float32: nothing is further away.
        novelty=predictive
        if novelty is None
        else np.nan_to_num(novelty.astype(np.float64), nan=_FARTHEST, posinf=_FARTHEST),
    )
