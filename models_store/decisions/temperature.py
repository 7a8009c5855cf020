"""The temperature that makes an averaged prediction calibrated.

With θ = log T and ℓ(θ) the summed negative log-likelihood of the validation split, in nats:

    θ̂ = argmin ℓ(θ) + θ² / 2σ²               a normal prior on log T, centred at T = 1 (σ = 0.5: T from 0.37 to 2.7)
    s = (ℓ''(θ̂) + 1/σ²)^(-1/2)               the standard error of log T, from the curvature (Laplace's approximation)
    θ = shrunk(θ̂, s)                         moved towards 0, depending on how many standard errors it is away

Maximum likelihood alone degenerates: if every validation image is classified correctly, ℓ falls for as long as T does,
and one or two errors hardly stop it. The prior keeps θ̂ finite. It is worth 1/σ² = 4 units of information about log T.
The split contributes ℓ'', which grows with its images and errors, so that the share of the prior vanishes.

But a prior does not prevent a step in the wrong direction, it only makes the step smaller: with every width, the NLL on
other images is sometimes worse than at T = 1. `shrunk` prevents this. If θ̂ is up to z = 2 standard errors from 0, T is
exactly 1. Up to 2 z it is the end of the interval θ̂ ± z s that is nearest to T = 1, so that T lies between 1 and the
best T whenever the interval contains the best T. From a z on (a = 3.7) it is θ̂ itself.

This is the minimum of ½ (θ − θ̂)²/s² plus the smoothly clipped absolute deviation penalty at level z/s (Fan and Li
2001, "Variable selection via nonconcave penalized likelihood and its oracle properties", eq. 2.8, with their a): a
penalty whose share falls as information grows, and that vanishes for large effects. benchmarks/training/temperature.py
shows how σ and z were chosen, and compares other estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

PRIOR_WIDTH = 0.5  # σ
THRESHOLD = 2.0  # z
CLIP = 3.7  # a
LIMIT = math.log(50)  # bound of |θ̂| in the search; the prior keeps it well below
UNCERTAIN = 0.25  # standard error of log T above which a warning is logged
_STEP = 0.02  # in log T, for the second difference


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
        """A warning if the split is too small, or has too few errors, to determine T; else None."""
        if self.standard_error <= UNCERTAIN:
            return None
        kept = "T stays at 1" if self.temperature == 1 else f"T = {self.temperature:.3f} is uncertain"
        return (
            f"{self.images} validation images, {self.errors} of them classified wrongly, are too few to determine the temperature "
            f"(standard error of log T {self.standard_error:.2f}): {kept}, and the confidences may be off. Set more images aside "
            "(--validation), or use a data set with a larger validation split."
        )


def fit(logits: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating]) -> float:
    """T of Σ_k weight_k · softmax(z_k / T); see `estimate`."""
    return estimate(logits, labels, weights).temperature


def estimate(logits: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating]) -> Fitted:
    """Estimate T > 0 by penalised likelihood (see the module); 1 unless the split shows that another T is better.

    Args:
        logits: (members, batch, classes), of the validation split.
        labels: (batch,).
        weights: (members,), summing to 1.
    """
    loss = summed_nll(logits, labels, weights)
    mode, error = posterior(loss)
    probs = np.exp(logits - logits.max(axis=2, keepdims=True))
    mean = np.einsum("k,kbc->bc", weights, probs / probs.sum(axis=2, keepdims=True))
    errors = int((mean.argmax(axis=1) != labels).sum())
    return Fitted(math.exp(shrunk(mode, error)), error, len(labels), errors)


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
    # A mixture's ℓ need not be convex, but the information in a split is never negative.
    return mode, (max(curvature, 0.0) + 1 / width**2) ** -0.5


def shrunk(mode: float, error: float, threshold: float = THRESHOLD) -> float:
    """Move an estimate of log T towards 0: to 0 below `threshold` standard errors, not at all above CLIP times that."""
    size, unit = abs(mode), threshold * error
    if size <= 2 * unit:
        size = max(0.0, size - unit)
    elif size <= CLIP * unit:
        size = ((CLIP - 1) * size - CLIP * unit) / (CLIP - 2)
    return math.copysign(size, mode)
