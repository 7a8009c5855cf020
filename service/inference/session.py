"""The interface between modes and the queue: modes/ implements sessions, batching.py runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models_store.graphs.runtime import Outputs
from models_store.inputs import kinds
from models_store.uncertainty import Floats, Prediction
from service.http.images import Images
from service.inference.modes.pool import Network


@dataclass(frozen=True, slots=True)
class Rows:
    """The input of an ensemble, one input per row."""

    images: Images  # (rows, *shape), of any kind of input
    networks: tuple[Network, ...] = ()  # the network of each row, in modes that draw one
    carried: NDArray[np.float32] | None = (
        None  # logits of the members that ran already, (members, rows, classes), in a cascade
    )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.images[rows], self.networks[rows], None if self.carried is None else self.carried[:, rows])

    @classmethod
    def joined(cls, pieces: Sequence[Rows]) -> Rows:
        """Concatenate pieces that are for one ensemble and one mode."""
        if len(pieces) == 1:
            return pieces[0]
        networks = tuple(network for piece in pieces for network in piece.networks)
        carried = [piece.carried for piece in pieces if piece.carried is not None]
        return cls(
            kinds.joined([piece.images for piece in pieces]),
            networks,
            np.concatenate(carried, axis=1) if carried else None,
        )


@dataclass(frozen=True, slots=True)
class Settled:
    """What the outputs of a batch lead to: answers, and in a cascade the rows that need more members."""

    prediction: Prediction  # of the rows that are answered, in order
    member_probs: Floats | None  # (members, answered rows, classes); None in a cascade
    used: int  # members that ran for these rows
    stays: NDArray[np.bool_] | None = None  # (rows,): which rows need more members; None: none does
    further: tuple[Session, Rows] | None = None  # what runs those rows next


class Session(Protocol):
    """Runs an ensemble in one mode: all members on all rows, or one drawn network for each row."""

    def tasks(self, rows: int) -> int:
        """Return the number of tasks for a batch of `rows` rows; threads run them in parallel."""
        ...

    def run(self, task: int, rows: Rows) -> Outputs:
        """Run one task and return its outputs."""
        ...

    def joined(self, results: Sequence[Outputs]) -> Outputs:
        """Join the results of all tasks, in order."""
        ...

    def settle(self, rows: Rows, outputs: Outputs) -> Settled:
        """Turn the joined outputs of these rows into answers."""
        ...
