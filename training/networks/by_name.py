"""A network with several named inputs, on the features that they are packed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models_store.inputs import fields
from models_store.manifest import InputSpec


class ByName(nn.Module):
    """Calls a network with keyword arguments: a tensor (batch, *shape) for each field; numbers are (batch, 1), categories one-hot."""

    def __init__(self, network: nn.Module, spec: InputSpec):
        super().__init__()
        self.network = network
        self._fields: Sequence[tuple[str, slice, tuple[int, ...]]] = [
            (field.name, where, field.shape or (field.width,)) for field, where in fields.split(spec)
        ]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, n) -> logits (batch, classes)."""
        named = {name: features[:, where].reshape(-1, *shape) for name, where, shape in self._fields}
        return self.network(**named)


def shapes(spec: InputSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each named tensor, as the factory of such a network receives it."""
    return {field.name: field.shape or (field.width,) for field in spec.fields or ()}


def wanted(spec: InputSpec) -> bool:
    """Whether a network takes these fields by name: if one of them is a tensor."""
    return any(field.shape for field in spec.fields or ())
