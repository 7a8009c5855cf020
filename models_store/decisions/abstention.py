"""When to answer: the lowest confidence at which answers are wrong at most as often as a risk allows.

An answer is given if its confidence lies above a threshold. The threshold is chosen on n calibration images such that,
with a probability of at least CONFIDENCE over the choice of these images, P(wrong | answered) ≤ risk. The guarantee
needs no assumption about the network; it needs new images that are exchangeable with the calibration images.

The images are ordered by confidence. A candidate threshold is the confidence of the image at a rank that was fixed
beforehand. Given its value, the images above it are independent draws from the distribution of answered images, so the
number of errors among them is binomial, and P(Bin(m, risk) ≤ errors) is a p-value for "the risk is larger" (Geifman and
El-Yaniv 2017, algorithm 1). Ranks are tested from small to large until a test fails: fixed sequence testing needs no
correction for the number of tests (Angelopoulos et al. 2021, "Learn then Test", section 4). One early error would end
such a sequence, so there are several, which begin at ranks that grow fourfold and share 1 − CONFIDENCE equally.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from models_store.uncertainty import Floats

CONFIDENCE = 0.95
_RATIO = 1.03  # between the ranks of two candidates


@dataclass(frozen=True)
class Threshold:
    """Answers are given above this confidence."""

    confidence: float
    answered: int  # calibration images above it
    wrong: int  # errors among them


def threshold(confidence: Floats, wrong: NDArray[np.bool_], risk: float) -> Threshold | None:
    """The lowest threshold whose risk is at most `risk`; None if no threshold has a guarantee.

    Args:
        confidence: (images,), of the calibration images that may be answered.
        wrong: (images,), True where the answer is wrong.
        risk: P(wrong | answered), in (0, 1).
    """
    count = len(confidence)
    if count * risk < 1:  # even without an error P(Bin(count, risk) = 0) is above 1 − CONFIDENCE
        return None
    sequences = max(1, math.floor(math.log(count * risk, 4)))
    level = (1 - CONFIDENCE) / sequences
    fewest = math.ceil(math.log(level) / math.log1p(-risk))  # fewer images never pass, even without an error
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    errors = np.concatenate([[0], np.cumsum(wrong[order])])
    # At the last rank all images are answered. Candidates with equal confidences are one and the same.
    ranks = np.array(_ranks(fewest, count), dtype=np.intp)
    candidates = np.append(ordered, -np.inf)[ranks].tolist()
    limits: Floats = np.array(sorted(set(candidates), reverse=True), dtype=np.float64)
    above = np.searchsorted(-ordered, -limits, side="left")  # images strictly above each limit
    limits, above = limits[above >= fewest], above[above >= fewest]
    passed = bdtr(errors[above].astype(np.float64), above, risk) <= level
    best = -1
    for number in range(sequences):
        end = int(np.searchsorted(above, float(fewest * 4**number)))
        while end < len(limits) and passed[end]:
            best = max(best, end)
            end += 1
    if best < 0:
        return None
    return Threshold(float(limits[best]), int(above[best]), int(errors[above[best]]))


def least_risk(confidence: Floats, wrong: NDArray[np.bool_]) -> float | None:
    """The smallest risk, to two digits, that a threshold can guarantee; None if even 0.5 cannot be guaranteed."""
    candidates = [digit * 10.0**power for power in (-4, -3, -2) for digit in range(1, 10)]
    candidates += [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
    return next((risk for risk in candidates if threshold(confidence, wrong, risk) is not None), None)


def least_confidence(wrong_cost: float, review_cost: float) -> float:
    """The confidence above which an answer costs less than a review in expectation (Chow 1970): 1 − review / wrong.

    It relies on calibrated probabilities, and has no guarantee beyond them.
    """
    return 1 - review_cost / wrong_cost


def _ranks(first: int, count: int) -> list[int]:
    ranks = [first]
    while ranks[-1] < count:
        ranks.append(min(count, max(ranks[-1] + 1, math.ceil(ranks[-1] * _RATIO))))
    return [rank for rank in ranks if rank <= count]
