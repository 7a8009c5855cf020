"""Networks for signals: windows of a sensor, series of measurements."""

from __future__ import annotations

import torch
from torch import nn

from training.errors import NetworkError


def cnn1d(num_classes: int, input_shape: tuple[int, ...], *, width: int = 32, layers: int = 3) -> nn.Module:
    """Convolutions along a signal (channels, length), each with batch norm and ReLU, and their mean over the length."""
    channels, _ = _two(input_shape, "channels, length")
    modules: list[nn.Module] = []
    for number in range(layers):
        modules += [
            nn.Conv1d(channels, width * 2**number, 3, padding=1, bias=False),
            nn.BatchNorm1d(width * 2**number),
            nn.ReLU(),
        ]
        channels = width * 2**number
    return nn.Sequential(*modules, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Lstm(nn.Module):
    """An LSTM over the steps of a signal; the classes follow from its last state."""

    def __init__(self, num_classes: int, features: int, hidden: int, layers: int):
        super().__init__()
        self.recurrent = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """(batch, steps, features) -> (batch, classes)."""
        states, _ = self.recurrent(signals)
        return self.head(states[:, -1])


def lstm(num_classes: int, input_shape: tuple[int, ...], *, hidden: int = 64, layers: int = 1) -> nn.Module:
    """`layers` recurrent layers of `hidden` units over a signal (steps, features)."""
    _, features = _two(input_shape, "steps, features")
    return Lstm(num_classes, features, hidden, layers)


def _two(shape: tuple[int, ...], axes: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise NetworkError(f"A network for signals takes inputs ({axes}); the data set has {shape}.")
    return shape[0], shape[1]
