"""The modes `random` and `keyed`: one drawn network answers each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models_store.graphs.runtime import Outputs
from models_store.uncertainty import combine, softmax
from service.http.images import Images
from service.inference.modes.pool import Network
from service.inference.session import Rows, Settled


class OneEach:
    """Answers each row with the network drawn for it, at that network's temperature. A task runs every n-th row of n
    tasks.

    Every network does the same work, so that the response time does not reveal which network answered.
    """

    def __init__(self, threads: int):
        self._threads = threads

    def tasks(self, rows: int) -> int:
        """See session.Session. At most one task per thread, because starting one costs as much as a small network."""
        return min(rows, self._threads)

    def run(self, task: int, rows: Rows) -> Outputs:
        """See session.Session."""
        own = range(task, len(rows), self.tasks(len(rows)))
        return Outputs(np.concatenate([_alone(rows.networks[row], rows.images[row : row + 1]) for row in own])[None])

    def joined(self, results: Sequence[Outputs]) -> Outputs:
        """See session.Session."""
        parts = [result.logits for result in results]
        logits = np.empty((1, sum(part.shape[1] for part in parts), parts[0].shape[2]), np.float32)
        for task, part in enumerate(parts):
            logits[:, task :: len(parts)] = part
        return Outputs(logits)

    def settle(self, rows: Rows, outputs: Outputs) -> Settled:
        """See session.Session."""
        probs = softmax(outputs.logits)
        return Settled(combine(probs, np.ones(1)), probs, 1)


def _alone(network: Network, image: Images) -> NDArray[np.float32]:
    return network.session.logits(image) / np.float32(network.temperature)
