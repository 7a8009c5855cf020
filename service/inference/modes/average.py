"""The mode `average`: all members answer together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models_store.graphs.runtime import EnsembleSession
from service.inference.session import Rows, Settled


class Average:
    """Answers with the weighted mean of all members. A task runs some of the members on all rows."""

    def __init__(self, session: EnsembleSession):
        self._session = session

    def tasks(self, rows: int) -> int:
        """See session.Session."""
        return len(self._session.parts)

    def run(self, task: int, rows: Rows) -> NDArray[np.float32]:
        """See session.Session."""
        return self._session.parts[task].logits(rows.images)

    def joined(self, results: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """See session.Session."""
        return self._session.joined(results)

    def settle(self, rows: Rows, logits: NDArray[np.float32]) -> Settled:
        """See session.Session."""
        probs = self._session.probs(logits)
        return Settled(self._session.combine(probs), probs, len(logits))
