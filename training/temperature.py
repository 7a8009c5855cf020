"""The temperature that makes an averaged prediction calibrated.

With θ = log T and ℓ(θ) the summed negative log-likelihood of the validation split, in nats:

    θ̂  = argmin ℓ(θ) + θ² / 2σ²                 a normal prior on log T, centred at T = 1 (σ = 0.5: T from 0.37 to 2.7)
    s  = (ℓ''(θ̂) + 1/σ²)^(-1/2)                 the standard error of log T, from the curvature (Laplace's approximation)
    θ  = θ̂ · max(0, 1 − λ s²/θ̂²)                the non-negative garrote (λ = 2)

Maximum likelihood alone degenerates: where every validation image is classified correctly, ℓ falls for as long as T does, and one or two errors
hardly hold it. The prior keeps θ̂ finite. It is worth 1/σ² = 4 units of information about log T; the split gives ℓ'', which grows with
its images and errors, so that the prior's share vanishes. But a prior does not prevent a step in the wrong direction, it only makes the step
smaller. The last line does: c = 1 − λ s²/θ̂² minimises the penalised likelihood ½ (1 − c)² θ̂²/s² + λ c over c ≥ 0 (Breiman 1995, "Better subset
regression using the nonnegative garrote", with one coefficient; λ = 1 is the positive-part James-Stein estimate of Efron and Morris 1973). T stays at 1
exactly until the split shows that it should not (|θ̂| > √λ s); from there on the shrinkage falls with s², so that large splits get what
maximum likelihood gives. How σ and λ were chosen, and what other estimates do, is in benchmarks/temperature.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

PRIOR_WIDTH = 0.5  # σ
GARROTE = 2.0  # λ
LIMIT = math.log(50)  # of |θ̂|; the prior keeps it well within
UNCERTAIN = 0.25  # a standard error of log T above which the split says too little
_STEP = 0.02  # in log T, of the second difference


@dataclass(frozen=True)
class Fitted:
    """A temperature and how well the validation split determines it."""

    temperature: float
    standard_error: float  # of log T
    images: int
    errors: int  # images that the average classifies wrongly, at T = 1

    def __str__(self) -> str:
        return f"{self.temperature:.3f} (standard error of log T {self.standard_error:.2f})"

    @property
    def warning(self) -> str | None:
        """What to say where the split is too small, or has too few errors, to determine T."""
        if self.standard_error <= UNCERTAIN:
            return None
        kept = "T stays at 1" if self.temperature == 1 else f"T = {self.temperature:.3f} is uncertain"
        return (
            f"warning: {self.images} validation images, {self.errors} of them classified wrongly, say too little about the temperature "
            f"(standard error of log T {self.standard_error:.2f}): {kept}, and the confidences may be off. Set more images aside "
            "(--validation), or let the data set bring a larger validation split."
        )


def fit(logits: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating]) -> float:
    """T of Σ_k weight_k · softmax(z_k / T); see `estimate`."""
    return estimate(logits, labels, weights).temperature


def estimate(logits: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating]) -> Fitted:
    """T > 0 by penalised likelihood, as the module says; 1 where the split does not show that another one is better.

    Args:
        logits: (members, batch, classes), of the validation split.
        labels: (batch,).
        weights: (members,), summing to 1.
    """
    loss = summed_nll(logits, labels, weights)
    mode, error = posterior(loss)
    kept = max(0.0, 1 - GARROTE * error**2 / mode**2) if mode else 0.0
    probs = np.exp(logits - logits.max(axis=2, keepdims=True))
    mean = np.einsum("k,kbc->bc", weights, probs / probs.sum(axis=2, keepdims=True))
    errors = int((mean.argmax(axis=1) != labels).sum())
    return Fitted(math.exp(mode * kept), error, len(labels), errors)


def summed_nll(
    logits: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating]
) -> Callable[[float], float]:
    """ℓ: the summed negative log-likelihood in nats as a function of log T. Arguments as for `estimate`."""
    margins = np.asarray(logits, np.float64)
    margins = margins - margins.max(axis=2, keepdims=True)
    of_label = margins[:, np.arange(len(labels)), labels]  # (members, batch)
    log_weights = np.log(np.asarray(weights, np.float64))[:, None]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        each = of_label * scale - np.log(np.exp(margins * scale).sum(axis=2)) + log_weights
        # Not the logarithm of a mean of probabilities: a confident error would underflow, and no longer count.
        return float(-np.logaddexp.reduce(each, axis=0).sum())

    return loss


def posterior(loss: Callable[[float], float], width: float = PRIOR_WIDTH) -> tuple[float, float]:
    """The mode of log T under a normal prior of this width, and its standard error."""

    def penalised(log_temperature: float) -> float:
        return loss(log_temperature) + log_temperature**2 / (2 * width**2)

    found = minimize_scalar(penalised, bounds=(-LIMIT, LIMIT), method="bounded", options={"xatol": 1e-5})
    mode = float(found.x)
    curvature = (loss(mode - _STEP) - 2 * loss(mode) + loss(mode + _STEP)) / _STEP**2
    # A mixture's ℓ need not be convex; a split never says less than nothing.
    return mode, (max(curvature, 0.0) + 1 / width**2) ** -0.5
