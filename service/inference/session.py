"""The interface between modes and the queue: modes.py implements sessions, batching.py runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models_store.uncertainty import Floats, Prediction
from service.http.images import Images
from service.inference.pool import Network


@dataclass(frozen=True, slots=True)
class Rows:
    """The input of an ensemble, one image per row."""

    images: Images  # (rows, C, H, W)
    networks: tuple[Network, ...] = ()  # the network of each row; empty in `average`

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.images[rows], self.networks[rows])

    @classmethod
    def joined(cls, pieces: Sequence[Rows]) -> Rows:
        """Concatenate pieces that are for one ensemble and one mode."""
        if len(pieces) == 1:
            return pieces[0]
        networks = tuple(network for piece in pieces for network in piece.networks)
        return cls(np.concatenate([piece.images for piece in pieces]), networks)


class Session(Protocol):
    """Runs an ensemble in one mode: all members on all rows, or one drawn network for each row."""

    def tasks(self, rows: int) -> int:
        """Return the number of tasks for a batch of `rows` rows; threads run them in parallel."""
        ...

    def run(self, task: int, rows: Rows) -> NDArray[np.float32]:
        """Run one task and return its logits."""
        ...

    def joined(self, results: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Join the results of all tasks, in order, to logits (members, batch, classes)."""
        ...

    def probs(self, logits: NDArray[np.float32]) -> Floats:
        """Convert logits (members, batch, classes) to probabilities of the same shape."""
        ...

    def combine(self, member_probs: Floats) -> Prediction:
        """Combine probabilities (members, batch, classes) to one prediction per row."""
        ...
