"""How an ensemble answers: all members together (`average`), or a network of its own for each row (`random`, `keyed`).

Each is a session (session.py) that batching.py runs; they share nothing but that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models_store.graphs.runtime import EnsembleSession
from models_store.uncertainty import Floats, Prediction, combine, softmax
from service.http.images import Images
from service.inference.pool import Network
from service.inference.session import Rows


class Average:
    """The weighted mean of all members; a task is some members on all rows."""

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

    def probs(self, logits: NDArray[np.float32]) -> Floats:
        """See session.Session."""
        return self._session.probs(logits)

    def combine(self, member_probs: Floats) -> Prediction:
        """See session.Session."""
        return self._session.combine(member_probs)


class OneEach:
    """The network that each row has drawn, at that network's own temperature; a task is every n-th row, with n tasks.

    The same work for every network, so that the time tells none of them.
    """

    def __init__(self, threads: int):
        self._threads = threads

    def tasks(self, rows: int) -> int:
        """See session.Session. No more than there are threads: taking up a task costs a small network's time."""
        return min(rows, self._threads)

    def run(self, task: int, rows: Rows) -> NDArray[np.float32]:
        """See session.Session."""
        own = range(task, len(rows), self.tasks(len(rows)))
        return np.concatenate([_alone(rows.networks[row], rows.images[row : row + 1]) for row in own])

    def joined(self, results: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """See session.Session."""
        logits = np.empty((1, sum(map(len, results)), results[0].shape[1]), np.float32)
        for task, result in enumerate(results):
            logits[0, task :: len(results)] = result
        return logits

    def probs(self, logits: NDArray[np.float32]) -> Floats:
        """See session.Session."""
        return softmax(logits)

    def combine(self, member_probs: Floats) -> Prediction:
        """See session.Session."""
        return combine(member_probs, np.ones(1))


def _alone(network: Network, image: Images) -> NDArray[np.float32]:
    return network.session.logits(image) / np.float32(network.temperature)
