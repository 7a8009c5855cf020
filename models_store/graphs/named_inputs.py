"""Foreign models with several inputs: each becomes a named field, and the graph cuts them out of one tensor of features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from models_store.errors import MemberError
from models_store.graphs.onnx_contract import dimensions
from models_store.graphs.steps import Steps
from models_store.inputs import fields
from models_store.manifest import InputSpec, TableField

NUMBERS = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT8, TensorProto.BOOL,
}  # fmt: skip


def spec_of(file: Path, inputs: Sequence[onnx.ValueInfoProto], *, as_they_are: bool) -> InputSpec:
    """What an ensemble of such a model takes: features with a field for each input.

    Args:
        file: the model.
        inputs: its inputs.
        as_they_are: whether no option converts the inputs.

    Raises:
        MemberError: an input is not a batch of numbers of a fixed shape.
    """
    described: list[TableField] = []
    for value in inputs:
        axes = dimensions(value)
        if value.type.tensor_type.elem_type not in NUMBERS or not axes:
            name = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
            raise MemberError(
                f"{file.name} takes {value.name!r} of {name} with axes {axes}; several inputs must be batches of numbers."
            )
        if None in axes[1:]:
            raise MemberError(
                f"{file.name} leaves an axis of {value.name!r} open {axes}. Of several inputs, only the batch may be open: export it with fixed sizes."
            )
        shape = tuple(int(axis) for axis in axes[1:] if axis)
        described.append(TableField(name=value.name, shape=None if shape in ((), (1,)) else shape))
    if not as_they_are:
        raise MemberError(
            f"{file.name} has the inputs {', '.join(v.name for v in inputs)}: each is taken as it is, so leave out --mean, --std, --pixels, "
            "--channels-last, --input-shape and --kind."
        )
    return InputSpec(kind="features", shape=(sum(field.width for field in described),), fields=described)


def unpacked(spec: InputSpec, inputs: Sequence[onnx.ValueInfoProto], own: dict[str, str]) -> Steps:
    """Cut each named input out of the features."""
    every = Steps("front", spec.tensor)
    for value, (_, where) in zip(inputs, fields.split(spec), strict=True):
        one = Steps(own[value.name], spec.tensor)
        one.add("Slice", np.array([where.start]), np.array([where.stop]), np.array([1]))
        one.add("Reshape", np.array(_shape(value, -1)))
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            one.add("Cast", to=value.type.tensor_type.elem_type)
        one.end(own[value.name])
        every.nodes += one.nodes
        every.tensors += one.tensors
    return every


def cut(spec: InputSpec, inputs: Sequence[onnx.ValueInfoProto], row: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The inputs of the original model, from features (1, n)."""
    return {
        value.name: row[:, where].reshape(_shape(value, 1))
        for value, (_, where) in zip(inputs, fields.split(spec), strict=True)
    }


def _shape(value: onnx.ValueInfoProto, batch: int) -> list[int]:
    return [batch, *(axis or 1 for axis in dimensions(value)[1:])]
