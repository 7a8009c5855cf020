import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models_store.graphs.output_kind import kind, last_operator
from models_store.uncertainty import softmax

LOGITS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
PROBS = softmax(LOGITS).astype(np.float32)


@pytest.mark.parametrize(
    ("answers", "last", "expected"),
    [
        (LOGITS, "Gemm", "logits"),
        (np.log(PROBS), "LogSoftmax", "logits"),
        (PROBS, "Softmax", "probs"),
        (PROBS, "Div", "probs"),
        (PROBS.astype(np.float16).astype(np.float32), "Cast", "probs"),
        (1 / (1 + np.exp(-LOGITS)), "Sigmoid", "sigmoid"),
        (np.abs(LOGITS) / 10, "Abs", "logits"),
        (np.zeros((6, 4), np.float32), "Gemm", "logits"),
        (np.concatenate([PROBS, np.full((1, 4), np.nan, np.float32)]), "Softmax", "probs"),
    ],
)
def test_kinds_of_outputs_are_told_apart(answers, last, expected):
    assert kind(answers, last) == expected


def test_the_last_operator_is_the_one_that_computes():
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"]),
        helper.make_node("Relu", ["x"], ["unused"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    assert last_operator(helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]))) == "Softmax"


def test_the_last_operator_is_looked_for_inside_functions():
    body = [helper.make_node("Neg", ["p"], ["q"]), helper.make_node("Sigmoid", ["q"], ["r"])]
    function = helper.make_function("own", "End", ["p"], ["r"], body, [helper.make_opsetid("", 18)])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("End", ["x"], ["y"], domain="own")], "g", value[:1], value[1:])
    model: onnx.ModelProto = helper.make_model(graph, functions=[function])
    assert last_operator(model) == "Sigmoid"
