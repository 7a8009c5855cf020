"""A split that is held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from training.data.contract import Batch
from training.data.streaming import scale


@dataclass(frozen=True)
class InMemory:
    """A split as two tensors. uint8 images have values 0 … 255, and are scaled to [0, 1] batch by batch."""

    images: torch.Tensor  # or other inputs, (N, *shape): uint8, float32 or int64
    labels: torch.Tensor  # (N,), int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of every input."""
        return tuple(self.images.shape[1:])

    def batches(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Inputs (batch, *shape), images as float32 in [0, 1], and labels int64 (batch,), in the given order of rows."""
        for rows in order.to(self.labels.device).split(size):
            yield scale(self.images[rows]), self.labels[rows]

    def take(self, rows: torch.Tensor) -> InMemory:
        """Returns a split with these rows only."""
        return InMemory(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> InMemory:
        """Returns the split on a device."""
        return InMemory(self.images.to(device), self.labels.to(device))
