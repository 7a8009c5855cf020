"""Which images are kept with their answers, if the operator asked for that."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from models_store.decisions.calibration import Calibration
from models_store.uncertainty import Prediction

MEASURE = "predictive_entropy"


class Sampler:
    """Chooses images of requests to keep: a random share, or the most uncertain ones."""

    def __init__(self, share: float, *, uncertain: bool):
        """Keep this share of the images; with `uncertain`, those whose predictive entropy exceeds that of all but `share` of
        the calibration images. Of a version without a calibration a random share is kept.
        """
        self._share, self._uncertain = share, uncertain
        self._random = random.Random()

    def __call__(
        self, calibration: Calibration | None, images: NDArray[np.float32], prediction: Prediction
    ) -> tuple[tuple[int, NDArray[np.float32]], ...]:
        """Rows and images (C, H, W) to keep. Only grey and colour images, because they are kept as PNG files."""
        if not self._share or images.ndim != 4 or images.shape[1] not in (1, 3):
            return ()
        if self._uncertain and calibration is not None:
            percentiles = calibration.percentile(MEASURE, prediction.predictive_entropy)
            chosen = np.flatnonzero(percentiles > 100 * (1 - self._share)).tolist()
        else:
            chosen = [row for row in range(len(images)) if self._random.random() < self._share]
        return tuple((row, images[row].copy()) for row in chosen)
