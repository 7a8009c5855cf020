"""Seeds of independent random streams, all derived from the one seed that the user gives."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Uses of random streams. The numbers are never changed or reused, because they decide the result of a run."""

    WEIGHTS = 0  # initial weights (0, network); points between vertices (1 + leg, epoch)
    ORDER = 1  # order of the training images (leg, epoch)
    AUGMENTATION = 2  # (leg, epoch)
    SIMPLEXES = 7  # first position of a vertex (0, vertex); published points (1, stream)
    SWAG = 11  # samples (run, sample)
    DROPOUT = 1002  # everything that a network, a loss or a data set draws by itself (leg, epoch)


def derive(seed: int, stream: Stream, *key: int, rank: int = 0) -> int:
    """A 32-bit seed: the same for the same arguments, unrelated for others.

    Args:
        seed: the user's seed.
        stream: what the numbers are used for.
        key: which use within the stream, for example (leg, epoch).
        rank: the process; 0 where all processes draw the same numbers.
    """
    parts = [seed, stream, *key, *([rank] if rank else [])]
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
