"""Several named tensors as one row of features: what a network with several inputs is trained and served on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from models_store.errors import FieldError
from models_store.inputs import fields
from models_store.manifest import InputSpec, TableField
from training.data.forms import tensor
from training.errors import DataError


class Packed(tuple[torch.Tensor, Any]):
    """Features (N, n) and labels, with the fields that the features are made of."""

    fields: tuple[TableField, ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any], labels: Any, like: Packed | None = None) -> Packed:
        """Pack a batch of each tensor: numbers (N,) or (N, *shape). Bytes (N, C, H, W) are images, scaled to [0, 1].

        Args:
            inputs: the tensors by name.
            labels: of the rows.
            like: another split, whose fields these are.

        Raises:
            DataError: a tensor has no rows, or another number of them than the others.
        """
        arrays = {str(name): _array(name, value) for name, value in inputs.items()}
        described = like.fields if like else tuple(_field(name, array) for name, array in arrays.items())
        spec = InputSpec(
            kind="features", shape=(sum(f.width for f in described),), fields=list(described), missing="mean"
        )
        try:
            found = cls((torch.from_numpy(fields.from_columns(arrays, spec)), labels))
        except FieldError as error:
            raise DataError(f"Named inputs: {error}.") from None
        found.fields = described
        return found


def packed(part: Any, like: Any = None) -> Any:
    """A split as it is, or packed, like another one, if its inputs are a dict of tensors.

    Raises:
        DataError: see Packed.of.
    """
    if isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[0], Mapping):
        return Packed.of(part[0], part[1], like if isinstance(like, Packed) else None)
    return part


def pooled(
    described: Sequence[TableField], mean: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and mean squares (n,) of features, those of a tensor pooled along its first axis: of channels, not of pixels."""
    mean, squares = mean.clone(), squares.clone()
    end = 0
    for field in described:
        begin, end = end, end + field.width
        if field.shape and len(field.shape) > 1:
            for values in (mean, squares):
                own = values[begin:end].view(field.shape[0], -1)
                values[begin:end] = own.mean(dim=1, keepdim=True).expand_as(own).reshape(-1)
    return mean, squares


def _array(name: Any, value: Any) -> np.ndarray[Any, Any]:
    array = tensor(value, f"The input {name!r}").numpy()
    if array.ndim == 0 or 0 in array.shape:
        raise DataError(f"The input {name!r} has the shape {array.shape}; it must be a batch.")
    if array.dtype == np.uint8 and array.ndim == 4:
        return (array / np.float32(255)).astype(np.float32)
    return array.astype(np.float32)


def _field(name: str, array: np.ndarray[Any, Any]) -> TableField:
    image = array.ndim == 4 and float(array.min()) >= 0 and float(array.max()) <= 1
    bounds: dict[str, Any] = {"low": 0.0, "high": 1.0} if image else {}
    shape = tuple(array.shape[1:]) or (1,)  # a number is a tensor, too: the network is called by name
    return TableField(name=name, shape=shape, **bounds)
