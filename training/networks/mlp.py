"""A multilayer perceptron: the smallest network here, and a template for new families."""

from __future__ import annotations

import math

from torch import nn


def make(num_classes: int, input_shape: tuple[int, ...], *, hidden: int = 256, layers: int = 2) -> nn.Module:
    """`layers` hidden layers of `hidden` units with ReLU."""
    modules: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for _ in range(layers):
        modules += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*modules, nn.Linear(width, num_classes))
