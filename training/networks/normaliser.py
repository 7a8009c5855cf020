"""Normalisation along the first axis: of the channels of images, of the features of rows. Tokens have none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from training.data import Data


class Normaliser(nn.Module):
    """(x − mean) / std; missing numbers become 0, which is the mean."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], axes: int, *, missing: bool = False):
        """Create it.

        Args:
            mean: along the first axis of one input; empty: inputs stay as they are.
            std: as `mean`.
            axes: number of axes of one input.
            missing: whether NaN stands for a missing number.
        """
        super().__init__()
        self.missing = missing
        shape = (1, -1, *([1] * (axes - 1)))
        # Not named `mean`: the exporter names values after their operator, and a network may compute a mean.
        self.pixel_mean: torch.Tensor | None
        self.pixel_std: torch.Tensor | None
        self.register_buffer("pixel_mean", torch.tensor(mean).view(shape) if mean else None)
        self.register_buffer("pixel_std", torch.tensor(std).view(shape) if std else None)

    @classmethod
    def of(cls, data: Data) -> Normaliser:
        """The normaliser of a data set."""
        return cls(data.mean, data.std, len(data.shape), missing=data.input.missing == "mean")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, *shape) -> the same."""
        if self.pixel_mean is None or self.pixel_std is None:
            return inputs
        if self.missing:
            inputs = torch.where(torch.isnan(inputs), self.pixel_mean, inputs)
        return (inputs - self.pixel_mean) / self.pixel_std
