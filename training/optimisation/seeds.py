"""A seed of its own for every place that draws, all from the one that the user gives."""

from __future__ import annotations

import numpy as np


def derive(seed: int, *place: int) -> int:
    """32 bits that belong to a place of a run: the same for the same place, unrelated for another.

    The first number of a place says who draws: 0 initial weights and points, 1 the order of images, 2 + rank augmentation, 1002 + rank dropout
    (training/optimisation/loop.py); 7 simplexes, 11 SWAG. The sixth and the tenth of many processes have 7 and 11, too, in generators of their own.
    """
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint32)[0])
