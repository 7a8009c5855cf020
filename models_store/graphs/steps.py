"""Operators in a row, put before or after a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Steps:
    """Operators in a row, from a value to a value."""

    def __init__(self, label: str, value: str):
        self._label, self._value = label, value
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def add(self, operator: str, *constants: Any, **attributes: Any) -> None:
        """Apply an operator to the value so far and to constants."""
        names = [f"modepath_{self._label}_{len(self.nodes)}_{i}" for i in range(len(constants) + 1)]
        self.tensors += [numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names[1:], strict=True)]
        self.nodes.append(helper.make_node(operator, [self._value, *names[1:]], [names[0]], **attributes))
        self._value = names[0]

    def end(self, name: str) -> None:
        """Give the value so far this name."""
        self.nodes.append(helper.make_node("Identity", [self._value], [name]))
