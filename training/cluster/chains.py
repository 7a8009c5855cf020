"""Which legs of a plan can be trained beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from training.optimisation.loop import Leg


def chains(legs: Sequence[Leg]) -> list[list[int]]:
    """Indices of the legs, in groups that do not depend on one another, each in order.

    A leg depends on the one before it if it has no start of its own, and on the leg that keeps the file that it starts from.
    """
    kept = {file: index for index, leg in enumerate(legs) for _, file in leg.keep}
    of: list[int] = []  # the first leg of each leg's chain
    for index, leg in enumerate(legs):
        before = index - 1 if leg.start is None and index else kept.get(leg.start) if leg.start else None
        of.append(index if before is None or before >= index else of[before])
    return [[index for index, first in enumerate(of) if first == begin] for begin in sorted(set(of))]
