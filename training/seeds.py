"""A seed of its own for every place that draws, all from the one that the user gives."""

from __future__ import annotations

import numpy as np


def derive(seed: int, *place: int) -> int:
    """32 bits that belong to a place of a run: the same for the same place, unrelated for another.

    Places are numbered so that none is the beginning of another.
    """
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint32)[0])
