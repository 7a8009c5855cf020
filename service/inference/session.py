"""What a mode gives the queue to run, and what is asked of it: modes.py has the modes, batching.py the queue."""

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
    """What is asked of an ensemble, one image a row."""

    images: Images
    networks: tuple[Network, ...] = ()  # of each row, where each has one of its own

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.images[rows], self.networks[rows])

    @classmethod
    def joined(cls, pieces: Sequence[Rows]) -> Rows:
        """One after the other; all of one ensemble, asked in one way."""
        if len(pieces) == 1:
            return pieces[0]
        networks = tuple(network for piece in pieces for network in piece.networks)
        return cls(np.concatenate([piece.images for piece in pieces]), networks)


class Session(Protocol):
    """What is run: all members of an ensemble or a network of its own for each row."""

    def tasks(self, rows: int) -> int:
        """Into how many parts a batch of so many rows falls, which threads run side by side."""
        ...

    def run(self, task: int, rows: Rows) -> NDArray[np.float32]:
        """One of them."""
        ...

    def joined(self, results: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """What all of them gave, as logits (members, batch, classes)."""
        ...

    def probs(self, logits: NDArray[np.float32]) -> Floats:
        """(members, batch, classes), both."""
        ...

    def combine(self, member_probs: Floats) -> Prediction:
        """(members, batch, classes) -> the answers."""
        ...
