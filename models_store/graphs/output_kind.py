"""Detect whether a classifier returns logits, or values to which a softmax or sigmoid was already applied.

The average, the temperature and the training loss need logits. A softmax of probabilities looks plausible but is
silently wrong, so the kind is determined from the network's outputs and from the last operator of its graph.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

Kind = Literal["logits", "probs", "sigmoid"]

_SUM_OFF = 1e-3  # tolerance: probabilities in half precision sum to 1 within this
# Operators that only copy or rearrange values.
_PASSING = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Dropout"}


def kind(answers: NDArray[np.float32], last: str | None) -> Kind:
    """The kind of `answers`, (batch, classes) for several different images, given the last operator of the graph."""
    finite = answers[np.isfinite(answers).all(axis=1)].astype(np.float64)
    if len(finite) == 0 or finite.min() < 0 or finite.max() > 1 + _SUM_OFF:
        return "logits"
    if np.abs(finite.sum(axis=1) - 1).max() <= _SUM_OFF:
        return "probs"
    return "sigmoid" if last == "Sigmoid" else "logits"


def last_operator(model: onnx.ModelProto, output: str | None = None) -> str | None:
    """The operator that computes an output, by default the first one; operators that only copy or rearrange values are skipped."""
    return _last(model, list(model.graph.node), output or model.graph.output[0].name)


def _last(model: onnx.ModelProto, nodes: list[onnx.NodeProto], output: str) -> str | None:
    makers = {name: node for node in nodes for name in node.output}
    while (node := makers.get(output)) is not None:
        for function in model.functions:
            if (function.domain, function.name) == (node.domain, node.op_type):
                inner = function.output[list(node.output).index(output)]
                return _last(model, list(function.node), inner)
        if node.op_type not in _PASSING or not node.input:
            return node.op_type
        output = node.input[0]
    return None
