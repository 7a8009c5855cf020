"""What a classifier's output is: logits, or something that a softmax was already applied to.

The average, the temperature and the loss of training need logits. A softmax of probabilities looks like an answer, and is
wrong without a sign of it, so the kind is looked for in what the network answers and in the last operator of its graph.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

Kind = Literal["logits", "probs", "sigmoid"]

_SUM_OFF = 1e-3  # half-precision members sum to 1 within this
# They rearrange or copy numbers, and leave them what they are.
_PASSING = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Dropout"}


def kind(answers: NDArray[np.float32], last: str | None) -> Kind:
    """What these answers are, (batch, classes) of several different images, given by a graph that ends in `last`."""
    finite = answers[np.isfinite(answers).all(axis=1)].astype(np.float64)
    if len(finite) == 0 or finite.min() < 0 or finite.max() > 1 + _SUM_OFF:
        return "logits"
    if np.abs(finite.sum(axis=1) - 1).max() <= _SUM_OFF:
        return "probs"
    return "sigmoid" if last == "Sigmoid" else "logits"


def last_operator(model: onnx.ModelProto) -> str | None:
    """The operator that computes the first output; operators that only copy or rearrange are passed over."""
    return _last(model, list(model.graph.node), model.graph.output[0].name)


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
