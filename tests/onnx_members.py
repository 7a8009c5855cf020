"""Members made with onnx alone, so that the store and the service are tested where torch is not installed."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models_store.manifest import Draft, InputSpec, Member, Origin

SHAPE = (1, 4, 4)
CLASSES = 3


def linear(
    seed,
    shape=SHAPE,
    classes=CLASSES,
    *,
    opset=18,
    input_name="images",
    output_name="logits",
    softmax=False,
    batch="batch",
):
    """flatten(images) @ weights + bias."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(int(np.prod(shape)), classes)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32)
    last = "raw" if softmax else output_name
    nodes = [
        helper.make_node("Flatten", [input_name], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], [last]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["raw"], [output_name], axis=1))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def linear_logits(model, images):
    """The same in numpy."""
    weights, bias = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    return images.reshape(len(images), -1) @ weights + bias


def publish(store, name, seeds=(0, 1, 2), *, temperature=1.0, shape=SHAPE, activate=True):
    """An ensemble of linear members."""
    with store.staging(name) as staged:
        (staged / "members").mkdir()
        members = []
        for index, seed in enumerate(seeds):
            file = f"members/{index:03d}.onnx"
            onnx.save(linear(seed, shape), staged / file)
            members.append(Member(file=file, origin=Origin(cycle=index + 1), weight=1 / len(seeds)))
        draft = Draft(
            method="fge",
            input=InputSpec(shape=shape),
            classes=["cat", "dog", "bird"],
            members=members,
            temperature=temperature,
        )
        return store.publish(name, Path(staged), draft, activate=activate)
